"""Rewards in a process of their own: the same scores, and no way for them to take the run down."""

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from rewards import RewardError, RewardUnavailable, load_rewards, score
from rewards.calling import score_all
from rewards.remote import environments, wire
from rewards.remote.process import WorkerLost

ROOT = Path(__file__).parents[3]
ODD = str(ROOT / "tests/helpers/odd_rewards.py")
HERE = {"python": sys.executable}
IMAGES = [Image.effect_noise((30 + k, 20), 50).convert("RGB") for k in range(4)]


def isolated(attribute: str = "told", environment=HERE, **entry):
    (reward,) = load_rewards([{"use": f"{ODD}:{attribute}", "environment": environment, **entry}])
    return reward


@pytest.fixture
def told():
    reward = isolated(timeout=20, retries=1)
    yield reward
    reward.close()


def scores(reward, prompts="p", images=IMAGES, **columns):
    (values,), failures = score([reward], images, [prompts] * len(images), columns)
    return values, failures


def process_of(reward) -> subprocess.Popen:
    return reward.function._worker.process


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


# --- The same scores ---


def test_scores_are_those_of_this_process_to_the_bit(told):
    (here,) = load_rewards([f"{ODD}:told"])
    factor = [0.1, 1 / 3, 1e-300, -7.7]
    expected = scores(here, factor=factor)
    assert scores(told, factor=factor) == expected and not expected[1]
    assert (told.columns, told.required, told.weight) == (here.columns, here.required, here.weight)


@pytest.mark.parametrize("size", [(1, 1), (8000, 8000)])
def test_an_image_of_any_size_is_scored(told, size):
    image = Image.new("RGB", size, (3, 5, 7))
    (here,) = load_rewards([f"{ODD}:told"])
    assert scores(told, images=[image]) == scores(here, images=[image])


def test_what_it_returns_beside_its_scores_comes_back_too(told):
    found = score_all([told], IMAGES, ["more"] * len(IMAGES), {})
    assert found.scores == [[0.5] * len(IMAGES)] and not found.failures
    assert math.isnan(*found.extras.pop("told/odd"))  # it was None
    assert found.extras == {"told/width": [30.0, 31.0, 32.0, 33.0], "told/calls": [7.0]}
    with pytest.raises(RewardError, match="'told' returned an extra 'kind' that is str"):
        scores(told, "odd extra")


def test_async_rewards_factories_and_columns_work_there():
    patient = isolated("patient")
    assert scores(patient, "four") == ([4.0] * 4, {})
    making = isolated("Making", args={"scale": 2}, name="twice")
    assert (making.name, making.columns, making.required) == ("twice", ("target",), ("target",))
    assert scores(making, target=[1, 2, 3, 4]) == ([2.0, 4.0, 6.0, 8.0], {})
    needing = isolated("needing")
    assert (needing.columns, needing.required) == (None, ("target",))
    with pytest.raises(ValueError, match="'needing' needs the data column 'target'"):
        needing.check_columns(["prompt"])
    for reward in (patient, making, needing):
        reward.close()


def test_two_workers_score_side_by_side():
    first, second = isolated(name="first"), isolated(name="second")
    values, failures = score([first, second], IMAGES, ["p"] * 4, {})
    assert values[0] == values[1] and not failures
    assert process_of(first).pid != process_of(second).pid != os.getpid()
    first.close(), second.close()


# --- Failing ---


def test_what_it_raises_is_told_as_in_this_process_and_the_worker_goes_on(told):
    (here,) = load_rewards([f"{ODD}:told"])
    before = process_of(told).pid
    assert scores(told, "raise")[1] == scores(here, "raise")[1] == {"told": "ValueError: no such file: weights.bin"}
    assert scores(told) == scores(here) and process_of(told).pid == before


def test_not_scored_is_not_scored(told):
    values, failures = scores(told, "nothing")
    assert [value == value for value in values] == [False, False, False, True] and values[3] == 0.1 and not failures


@pytest.mark.parametrize("prompt", ["short", "text", "no list"])
def test_a_broken_contract_is_the_same_error_as_in_this_process(told, prompt):
    messages = []
    for reward in (told, *load_rewards([f"{ODD}:told"])):
        with pytest.raises(RewardError) as caught:
            scores(reward, prompt)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert not scores(told)[1]


def test_a_column_that_cannot_be_sent_is_a_failure_that_names_it(told):
    assert "column 'factor', row 0: tuple" in scores(told, factor=[(1,)] * 4)[1]["told"]


def test_a_call_lost_with_its_worker_is_tried_again(told, tmp_path):
    expected = scores(told)
    before = process_of(told).pid
    assert scores(told, f"die once {tmp_path / 'died'}") == expected
    assert process_of(told).pid != before


def test_a_reward_that_always_dies_is_given_up_with_its_last_words_and_serves_the_next_call(told):
    expected = scores(told)
    values, failures = scores(told, "die")
    assert all(value != value for value in values)
    assert "given up after 2 tries" in failures["told"] and "code 7" in failures["told"]
    assert "last words" in failures["told"]
    assert scores(told) == expected


def test_a_hang_is_killed_and_counted():
    reward = isolated(timeout=0.5, retries=0)
    first = process_of(reward).pid
    values, failures = scores(reward, "hang")
    assert failures == {"told": "given up after 1 tries: its worker took longer than 0.5 s and was killed"}
    assert gone(first) and all(value != value for value in values)
    assert not scores(reward)[1]
    reward.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_from_outside_in_a_call_is_replaced(number):
    reward = isolated(timeout=3, retries=1)
    expected = scores(reward, "sleep", factor=[0.5] * 4)
    worker = process_of(reward)

    async def disturb():
        call = asyncio.create_task(reward.function(IMAGES, ["sleep"] * 4, factor=[0.5] * 4))
        await asyncio.sleep(0.2)
        os.kill(worker.pid, number)
        return await call

    assert asyncio.run(disturb()).scores == expected[0]
    assert process_of(reward).pid != worker.pid and gone(worker.pid)
    reward.close()


def test_a_worker_killed_between_calls_is_noticed_and_revived(told, monkeypatch):
    expected = scores(told)
    assert told.function.problem() is None
    process_of(told).kill()
    process_of(told).wait()
    assert "killed by signal 9" in told.function.problem()
    monkeypatch.setattr("rewards.remote.isolated.BACKOFF_SECONDS", (0.01, 0.02))
    told.function._failures_in_a_row = 5000  # of a night of failures
    told.function.revive()
    assert told.function.problem() is None and scores(told) == expected


def test_a_reward_that_forks_gets_one_answer_for_each_call(told):
    (here,) = load_rewards([f"{ODD}:told"])
    worker = process_of(told).pid
    for k in range(3):
        factor = [float(k + n) for n in range(4)]
        assert scores(told, "fork" if not k else "p", factor=factor) == scores(here, factor=factor)
    assert process_of(told).pid == worker


def test_the_answer_to_another_request_is_not_taken(told):
    request = wire.encode_request(IMAGES, ["p"] * 4, {}, number=5)
    with pytest.raises(WorkerLost, match="the answer to another request"):
        told.function._worker.ask(request, 6, 20)


def test_a_dead_worker_is_noticed_while_a_child_of_it_holds_its_pipes(tmp_path):
    reward = isolated(timeout=60, retries=0)
    _, failures = scores(reward, f"leave a child {tmp_path / 'pid'}", factor=[9] * 4)
    assert "ended with code 9" in failures["told"]
    assert gone(int((tmp_path / "pid").read_text()))
    reward.close()


@pytest.mark.parametrize("how", ["close", "input"])
def test_what_a_reward_started_ends_with_its_worker(told, tmp_path, how):
    assert not scores(told, f"leave a child {tmp_path / 'pid'}")[1]
    child = int((tmp_path / "pid").read_text())
    assert alive(child)
    if how == "input":  # as where the run was killed
        process_of(told).stdin.close()
    else:
        told.close()
    assert gone(child) and gone(process_of(told).pid)


def test_a_worker_that_cannot_be_started_again_is_a_counted_failure_until_it_can(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    reward = isolated(environment={"python": str(python)}, retries=1)
    expected = scores(reward)
    process_of(reward).kill(), process_of(reward).wait()
    python.rename(tmp_path / "away")
    assert "given up after 2 tries: its worker could not be started: " in scores(reward)[1]["told"]
    with pytest.raises(RewardUnavailable, match="could not be started"):
        reward.function.revive()
    assert "could not be started" in reward.function.problem()
    (tmp_path / "away").rename(python)
    assert scores(reward) == expected
    reward.close()


def test_all_tries_together_have_an_end(monkeypatch):
    monkeypatch.setattr("rewards.remote.isolated.CALL_SECONDS", 0.5)
    reward = isolated(timeout=0.5, retries=50)
    given_up = re.match(r"given up after (\d+) tries", scores(reward, "hang")[1]["told"])
    assert int(given_up[1]) < 5
    reward.close()


# --- The end ---


@pytest.mark.parametrize("killed", [True, False])
def test_closing_while_the_worker_is_started_again_ends_the_call(killed):
    reward = isolated("Making", args={"scale": 2, "load_seconds": 1.0})
    process_of(reward).kill(), process_of(reward).wait()

    async def close_during_a_start():
        call = asyncio.create_task(reward.function(IMAGES, ["p"] * 4, target=[1] * 4))
        await asyncio.sleep(0.5)
        reward.close() if killed else reward.function._closed.set()  # `close` waits a moment before it kills
        return await call

    with pytest.raises(RewardUnavailable, match="'Making' was closed"):
        asyncio.run(close_during_a_start())
    assert gone(process_of(reward).pid)


def test_closing_ends_the_worker_also_in_the_middle_of_a_call(told):
    worker = process_of(told).pid

    async def close_during_a_call():
        call = asyncio.create_task(told.function(IMAGES, ["hang"] * 4))
        await asyncio.sleep(0.3)
        told.close()
        return await call

    with pytest.raises(RewardUnavailable, match="closed"):
        asyncio.run(close_during_a_call())
    assert gone(worker) and told.function.problem() == "closed"


@pytest.mark.parametrize("how", ["exit", "exception", "kill -9", "kill -9 in a call"])
def test_no_worker_outlives_its_run(how):
    code = (
        "import os, sys, threading, time, signal\nfrom PIL import Image\nfrom rewards import load_rewards, score\n"
        f"reward, = load_rewards([{{'use': {ODD + ':told'!r}, 'environment': {HERE!r}}}])\n"
        "print(reward.function._worker.process.pid, flush=True)\n"
        f"how = {how!r}\n"
        "if how == 'exception': raise SystemExit(3)\n"
        "if how == 'kill -9 in a call':\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "    score([reward], [Image.new('RGB', (5, 5))], ['hang'], {})\n"
        "if how == 'kill -9': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == {"exit": 0, "exception": 3}.get(how, -9)
    assert gone(int(ended.stdout))


# --- Starting ---


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"use": f"{ODD}:tolt"}, ValueError, "has no 'tolt'. Did you mean 'told'"),
        ({"use": "shapes_exat"}, ValueError, "Did you mean 'shapes_exact'"),
        ({"use": "nowhere.py:score"}, FileNotFoundError, "nowhere.py does not exist"),
        ({"use": "no_such_module:score"}, ImportError, "'no_such_module' was not found"),
        ({"use": f"{ODD}:Making", "args": {"skale": 1}}, ValueError, "do not fit"),
        ({"use": f"{ODD}:Making", "args": {"scale": 0}}, ValueError, "ZeroDivisionError: a scale of 0"),
    ],
)
def test_what_loading_raises_there_is_raised_here(entry, error, message):
    with pytest.raises(error, match=message) as caught:
        load_rewards([{**entry, "environment": HERE}])
    assert "in its environment" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "error", "message"),
    [
        ("/usr/bin/python3", ValueError, "must be {python: PATH} or"),
        ({}, ValueError, "needs `python` or `requirements`"),
        ({"pyton": "x"}, ValueError, "unknown key 'pyton'. Did you mean 'python'"),
        ({"python": "/no/such/python"}, FileNotFoundError, "there is no Python at /no/such/python"),
        ({"python": 3}, ValueError, "must be a path, found 3"),
        ({"python": ODD}, ValueError, "is not executable"),
        ({"requirements": "no_such_requirements.txt"}, FileNotFoundError, "no_such_requirements.txt"),
        ({"requirements": []}, ValueError, "must be a file or a list"),
        ({"python": sys.executable, "variables": ["A=1"]}, ValueError, "must map names to values"),
        (
            {"python": sys.executable, "variables": {"NOWHERE": None}},
            ValueError,
            "NOWHERE of reward 'told' has no value",
        ),
    ],
)
def test_a_wrong_environment_is_refused_before_anything_is_started(environment, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_rewards([{"use": f"{ODD}:told", "environment": environment}])


def test_an_interpreter_that_is_no_python_says_what_it_said():
    with pytest.raises(ValueError, match=r"'told' did not start in its environment: its worker ended with code 1"):
        load_rewards([{"use": f"{ODD}:told", "environment": {"python": "/bin/false"}}])


@pytest.mark.parametrize("more", [{}, {"requirements": ["tinyreward"]}])
@pytest.mark.parametrize("text", ["hello\n", "#!/bin/sh\nexit 3\n", "#!/bin/sh\n"])
def test_a_program_that_is_no_python_is_a_sentence(tmp_path, monkeypatch, text, more):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python = tmp_path / "python"
    python.write_text(text)
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"cannot be run|is not a Python|did not start"):
        load_rewards([{"use": f"{ODD}:told", "environment": {"python": str(python), **more}}])


def test_the_worker_has_its_own_variables_and_not_the_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("see.py").write_text(
        "import os, sys, json\nopen('seen.json', 'w').write(json.dumps([dict(os.environ), sys.path]))\n"
        "def score(images, prompts):\n    return [1.0 for _ in images]\n"
    )
    for key, value in {"FLOW_ALIGN_TOKEN": "secret", "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": "/x"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    load_rewards([{"use": "see.py:score", "environment": {**HERE, "variables": {"ADDED": 3}}}])[0].close()
    variables, path = json.loads(Path("seen.json").read_text())
    assert variables["ADDED"] == "3" and variables["CUDA_VISIBLE_DEVICES"] == "6"
    assert not {"FLOW_ALIGN_TOKEN", "RANK", "LOCAL_RANK", "PYTHONPATH"} & set(variables)
    assert str(ROOT) not in path  # this package alone, not what lies beside it


SECRETS = ("AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "DATABASE_URL")
KEPT = (
    "HTTPS_PROXY",
    "SSL_CERT_FILE",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "LC_ALL",
)


def test_a_worker_inherits_no_secret_and_what_programs_need(monkeypatch, tmp_path):
    """A reward's packages are code of strangers, which could send the keys of the cluster away."""
    monkeypatch.chdir(tmp_path)
    Path("see.py").write_text(
        "import os, sys, json\nopen('seen.json', 'w').write(json.dumps(dict(os.environ)))\n"
        "command = open('/proc/self/cmdline').read()\n"
        "def make(key):\n    assert key == 'hunter2' and 'hunter2' not in command\n    return score\n"
        "def score(images, prompts):\n    return [1.0 for _ in images]\n"
    )
    for key in (*SECRETS, *KEPT):
        monkeypatch.setenv(key, "C" if key == "LC_ALL" else "1")
    given = {"JUDGE_KEY": "hunter2", "HF_TOKEN": None}  # None: the run's own
    entry = {"use": "see.py:make", "args": {"key": "hunter2"}, "environment": {**HERE, "variables": given}}
    load_rewards([entry])[0].close()
    variables = json.loads(Path("seen.json").read_text())
    assert set(KEPT) <= set(variables) and {"PATH", "HOME"} & set(os.environ) <= set(variables)
    assert variables["JUDGE_KEY"] == "hunter2" and variables["HF_TOKEN"] == "1"
    assert not set(SECRETS) - {"HF_TOKEN"} & set(variables)


def test_control_characters_of_a_worker_do_not_reach_the_terminal(monkeypatch, tmp_path, caplog):
    """They would clear the screen, or hide the line before."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    Path("loud.py").write_text(
        "import os, sys\nprint('\\x1b[2Jprinted', file=sys.stderr)\n"
        "def score(images, prompts):\n"
        "    if prompts[0] == 'die':\n        os._exit(7)\n    raise ValueError('\\x1b[2Jraised')\n"
        "def make():\n    raise ValueError('\\x1b[2Jrefused')\n"
    )
    (loud,) = load_rewards([{"use": "loud.py:score", "environment": HERE, "retries": 0}])
    failures = [scores(loud)[1]["score"], scores(loud, "die")[1]["score"]]
    loud.close()
    with pytest.raises(ValueError, match="refused") as caught:
        load_rewards([{"use": "loud.py:make", "args": {}, "environment": HERE}])
    shown = [*failures, str(caught.value), caplog.text]
    assert all("\\x1b[2J" in text and "\x1b" not in text for text in shown), shown


# --- Requirements ---


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of its own, and a package index that is a folder with one tiny wheel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'back'\nbackend-path = ['.']\n"
        "[project]\nname = 'tinyreward'\nversion = '1.5'\n"
    )
    (source / "back.py").write_text(BACKEND)
    return source


#: A build backend of the standard library alone: what is tested is our environment, not a download.
BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "tinyreward-1.5-py3-none-any.whl"
    info = "tinyreward-1.5.dist-info/"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr("tinyreward.py", "def score(images, prompts):\\n    return [1.5 for _ in images]\\n")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: tinyreward\\nVersion: 1.5\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def test_pip_inherits_no_secret(offline, monkeypatch, tmp_path):
    """Building a package executes code of strangers."""
    for key in (*SECRETS, "PIP_TIMEOUT", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "1")
    look = f"import os, json\njson.dump(dict(os.environ), open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
    (offline / "back.py").write_text(look + BACKEND)
    environment = {"requirements": [str(offline)], "variables": {"OWN": "1"}}
    load_rewards([{"use": "tinyreward:score", "environment": environment}])[0].close()
    variables = json.loads((tmp_path / "seen.json").read_text())
    assert {"PIP_TIMEOUT", "HTTPS_PROXY", "OWN"} <= set(variables) and not set(SECRETS) & set(variables)


def test_environments_are_kept_where_nobody_else_can_write(offline, tmp_path):
    folder = tmp_path / "cache" / "flow-align" / "environments"
    environments.private_cache_folder()
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    for path, mode in ((folder, 0o777), (folder, 0o770), (folder.parent, 0o777)):
        path.chmod(mode)
        with pytest.raises(ValueError, match=f"the folder {path} belongs to another user or is writable by others"):
            load_rewards([{"use": "tinyreward:score", "environment": {"requirements": [str(offline)]}}])
        path.chmod(0o755)
    assert environments.private_cache_folder() == folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_an_environment_that_another_user_has_planted_is_not_executed(offline, tmp_path):
    folder = tmp_path / "cache" / "flow-align" / "environments"
    folder.mkdir(parents=True)
    os.chown(folder, 65534, 65534)
    with pytest.raises(ValueError, match="belongs to another user"):
        load_rewards([{"use": "tinyreward:score", "environment": {"requirements": [str(offline)]}}])
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
@pytest.mark.parametrize("name", ["flow-align", "flow-align/environments"])
def test_a_link_of_another_user_is_no_folder_of_environments(offline, tmp_path, name):
    """It led to a folder of the user's own while that was checked, and could lead to another one from then on."""
    (tmp_path / "own" / "environments").mkdir(parents=True, mode=0o700)
    link = tmp_path / "cache" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "own")
    assert environments.private_cache_folder()
    os.lchown(link, 65534, 65534)
    with pytest.raises(ValueError, match=f"the folder {link} belongs to another user"):
        environments.private_cache_folder()


def test_a_lock_that_is_a_link_empties_no_file(offline, tmp_path):
    """A planted link named one of the user's files, which was emptied."""
    (tmp_path / "thesis").write_text("three years")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(ValueError, match=r"the lock .*link cannot be opened"), environments.locked(tmp_path / "link"):
        raise AssertionError
    with environments.locked(tmp_path / "thesis"):
        assert (tmp_path / "thesis").read_text() == "three years"


def test_an_environment_is_made_from_requirements_once_and_anew_if_that_failed(offline, capfd):
    entry = {"use": "tinyreward:score", "environment": {"requirements": [str(offline)]}}
    (offline / "back.py").write_text("raise RuntimeError('no wheel today')\n")
    with pytest.raises(ValueError, match=r"environment of reward 'score' could not be made(.|\n)*no wheel today"):
        load_rewards([entry])
    (offline / "back.py").write_text(BACKEND)
    (reward,) = load_rewards([entry])
    assert scores(reward) == ([1.5] * 4, {})
    reward.close()
    assert "making its environment" in capfd.readouterr().err
    load_rewards([entry])[0].close()
    assert "making its environment" not in capfd.readouterr().err
    with pytest.raises(ImportError, match="'tinyreward' was not found"):
        load_rewards(["tinyreward:score"])
