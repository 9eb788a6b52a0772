"""A reward behind a service: the same scores, through lost connections, restarts and dead endpoints."""

import asyncio
import gzip
import http.server
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image
from raw_server import DESCRIBED, answer, hostile_service, raw_server
from services import ODD, ROOT, Service

from rewards import RewardError, RewardUnavailable, load_rewards, score
from rewards.calling import score_all
from rewards.remote import client
from rewards.remote.timed import Timed

IMAGES = [Image.effect_noise((30 + k, 20), 50).convert("RGB") for k in range(5)]
HERE = load_rewards([f"{ODD}:told"])[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of a test's length."""
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.1)
    monkeypatch.setattr(client, "LONGEST_SECONDS", 0.5)
    monkeypatch.setattr(client, "JITTER_SECONDS", 0.1)
    monkeypatch.setattr(client, "LEFT_OUT_SECONDS", 0.5)
    monkeypatch.delenv("FLOW_ALIGN_TOKEN", raising=False)


@pytest.fixture(scope="module")
def service():
    service = Service("--use", f"{ODD}:told", "--use", f"{ODD}:needing", "--use", f"{ODD}:process_id")
    yield service
    service.end()


def remote(url, use="told", **entry):
    (reward,) = load_rewards([{"use": use, "endpoints": url, **entry}])
    return reward


def scores(reward, prompts="p", images=IMAGES, **columns):
    (values,), failures = score([reward], images, [prompts] * len(images), columns)
    return values, failures


def during(call, act, delay=0.4):
    """The call's result; meanwhile, after a moment, something happens."""
    timer = threading.Timer(delay, act)
    timer.start()
    result = call()
    timer.join()
    return result


# --- The same scores ---


@pytest.mark.parametrize("images_per_request", [None, 1, 2, 5, 64])
def test_scores_are_those_of_this_process_to_the_bit(service, images_per_request):
    entry = {"images_per_request": images_per_request} if images_per_request else {}
    factor = [0.1, 1 / 3, 1e-300, -7.7, 2]
    there = remote(service.url, weight=0.5, name="mine", **entry)
    assert scores(there, factor=factor) == scores(HERE, factor=factor)
    assert (there.name, there.weight, there.columns, there.required) == ("mine", 0.5, HERE.columns, HERE.required)
    there.close()


@pytest.mark.parametrize("size", [(1, 1), (8000, 8000)])
def test_an_image_of_any_size_is_scored(service, size):
    image = Image.new("RGB", size, (3, 5, 7))
    assert scores(remote(service.url), images=[image]) == scores(HERE, images=[image])


@pytest.mark.parametrize("images_per_request", [None, 2])
def test_what_it_returns_beside_its_scores_comes_back_too(service, images_per_request):
    entry = {"images_per_request": images_per_request} if images_per_request else {}
    found = score_all([remote(service.url, **entry)], IMAGES, ["more"] * len(IMAGES), {})
    assert found.scores == [[0.5] * len(IMAGES)] and not found.failures
    requests = 3 if images_per_request else 1
    assert found.extras["told/width"] == [30.0, 31.0, 32.0, 33.0, 34.0]
    assert found.extras["told/calls"] == [7.0] * requests and len(found.extras["told/odd"]) == requests
    with pytest.raises(RewardError, match="'told' returned an extra 'kind' that is str"):
        scores(remote(service.url), "odd extra")


@pytest.mark.parametrize("extras", [{"width": 3}, {"width": ["x"]}, {"width": [True]}, [1.0], "x"])
def test_extras_that_are_no_numbers_are_refused(extras):
    body = {"scores": [1.0] * len(IMAGES), "extras": extras}
    served = hostile_service(answer(body, X_Reward_Digest="0" * 64))
    with served as (url, _), pytest.raises(RewardError, match="answered the extras"):
        scores(remote(url))


def test_no_images_are_no_scores(service):
    assert scores(remote(service.url), images=[]) == ([], {})


def test_columns_are_known_before_anything_is_scored(service):
    needing = remote(service.url, "needing")
    with pytest.raises(ValueError, match="'needing' needs the data column 'target'"):
        needing.check_columns(["prompt"])
    assert scores(needing, target=[1, 2, 3, 4, 5], other=["x"] * 5) == ([1.0, 2.0, 3.0, 4.0, 5.0], {})


def test_what_it_raises_and_a_broken_contract_are_told_as_in_this_process(service):
    there = remote(service.url)
    assert scores(there, "raise")[1] == scores(HERE, "raise")[1]
    assert [value != value for value in scores(there, "nothing")[0]] == [True, True, True, False, False]
    for prompt in ("short", "text", "no list"):
        messages = []
        for reward in (there, HERE):
            with pytest.raises(RewardError) as caught:
                scores(reward, prompt)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_reward_that_raises_is_not_asked_again(service):
    there = remote(service.url, retries=50)
    started = time.monotonic()
    assert scores(there, "raise")[1]
    assert time.monotonic() - started < 10  # 50 pauses take longer


# --- Faults ---


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_service_that_is_killed_in_a_call_and_comes_back_is_asked_again(number):
    first = Service("--use", f"{ODD}:told", "--grace", "0")
    there, later = remote(first.url, retries=40), []

    def restart():
        first.end(number)
        later.append(Service("--use", f"{ODD}:told", port=first.port, wait=False))

    factor = [1.0, 0.5, 2.0, 1 / 3, 4.0]
    assert during(lambda: scores(there, "sleep", factor=factor), restart) == scores(HERE, "sleep", factor=factor)
    assert scores(there, factor=factor) == scores(HERE, factor=factor)
    later[0].end()


def test_a_service_that_stops_answering_is_timed_out_and_asked_again():
    service = Service("--use", f"{ODD}:told")
    there = remote(service.url, timeout=1.5, retries=3)
    os.kill(service.process.pid, signal.SIGSTOP)
    resume = lambda: os.kill(service.process.pid, signal.SIGCONT)  # noqa: E731
    assert during(lambda: scores(there), resume, delay=2.0) == scores(HERE)
    service.end()


def test_a_service_that_never_comes_back_is_a_counted_failure():
    service = Service("--use", f"{ODD}:told")
    there = remote(service.url, retries=2)
    service.end(signal.SIGKILL)
    values, failures = scores(there)
    assert all(value != value for value in values)
    assert failures["told"].startswith(f"given up after 3 tries: {service.url}: ConnectError")
    assert "not reached" in there.function.problem()


def test_several_endpoints_share_the_work_and_one_may_die(service):
    other = Service("--use", f"{ODD}:told", "--use", f"{ODD}:process_id")
    urls = [service.url, other.url]
    ids = {scores(remote(urls, "process_id"))[0][0] for _ in range(1)}
    shared = remote(urls, "process_id", images_per_request=1)
    ids |= set(scores(shared)[0])
    assert ids == {service.process.pid, other.process.pid}
    other.end(signal.SIGKILL)
    assert set(scores(shared)[0]) == {service.process.pid}
    told = remote(urls, retries=0)  # one of them silent at the start: no failure and no retry
    for _ in range(4):
        assert scores(told) == scores(HERE)


def test_a_busy_service_is_asked_again():
    service = Service("--use", f"{ODD}:told", "--max_queue", "1")
    rewards = [remote(service.url, name=f"r{n}", retries=50) for n in range(5)]
    values, failures = score(rewards, IMAGES, ["sleep"] * 5, {"factor": [0.1] * 5})
    assert not failures and values == [scores(HERE, "sleep", factor=[0.1] * 5)[0]] * 5
    service.end()


def test_an_interrupted_wait_does_not_keep_the_program(service):
    there = remote(service.url)

    async def give_up():
        await asyncio.wait_for(there.function(IMAGES, ["sleep"] * 5, factor=[2.0] * 5), 0.3)

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert time.monotonic() - started < 1.8  # the call itself takes 2


# --- The start ---


@pytest.mark.parametrize("loading", [False, True])
def test_a_service_that_loads_is_waited_for(tmp_path, loading):
    config = tmp_path / "slow.yaml"
    seconds = 1.5 if loading else 0
    config.write_text(f"rewards: [{{use: '{ODD}:Making', args: {{scale: 2, load_seconds: {seconds}}}}}]\n")
    service = Service("--config", str(config), wait=not loading)
    there = remote(service.url, "Making", retries=100)  # a busy machine starts it slowly
    assert there.required == ("target",) and scores(there, target=[1, 2, 3, 4, 5])[0] == [2.0, 4.0, 6.0, 8.0, 10.0]
    service.end()


def test_a_wrong_name_a_silent_endpoint_and_another_server_are_told_at_the_start(service):
    with pytest.raises(ValueError, match=r"there is no reward 'tolt' at http://.* Did you mean 'told'\?"):
        remote(service.url, "tolt")
    with pytest.raises(ValueError, match=r"no endpoint of reward 'told' answers: http://127\.0\.0\.1:9: ConnectError"):
        remote("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="is not a reward service: 404 at /rewards"):
        remote(f"{service.url}/elsewhere")


def test_endpoints_that_take_other_columns_are_not_the_same_reward(service, tmp_path):
    (tmp_path / "other.py").write_text("def told(images, prompts, target):\n    return target\n")
    other = Service("--use", f"{tmp_path}/other.py:told")
    with pytest.raises(ValueError, match="reward 'told' is not the same at"):
        remote([service.url, other.url])
    other.end()


def test_another_reward_of_the_same_name_and_columns_is_not_mixed_in(tmp_path):
    for name, value in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.py").write_text(f"def told(images, prompts):\n    return [{value}.0] * len(images)\n")
    one, same, other = (Service("--use", f"{tmp_path / name}/r.py:told") for name in ("one", "same", "other"))
    assert scores(remote([one.url, same.url])) == ([1.0] * 5, {})
    with pytest.raises(ValueError, match=f"'told' is not the same at {one.url} .* and {other.url}"):
        remote([one.url, other.url])
    other.end()
    there = remote([one.url, other.url])  # one of them silent at the start
    late = Service("--use", f"{tmp_path}/other/r.py:told", port=other.port)
    one.end()
    with pytest.raises(RewardError, match=f"'told' is not the same at {late.url} as it was at {one.url} at the start"):
        scores(there)  # the first has ended, and so the other is asked
    same.end(), late.end()


def test_an_endpoint_behind_a_proxy_that_finds_nothing_is_left_out(service):
    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(502)
            self.end_headers()
            self.wfile.write(b"<html>Bad Gateway</html>")

        def log_message(self, *words):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.server_port}"
    assert scores(remote([url, service.url])) == scores(HERE)
    with pytest.raises(ValueError, match=r"no endpoint of reward 'told' answers: .*: 502 at /rewards: <html>"):
        remote(url)
    proxy.shutdown()


def test_all_tries_together_have_an_end(monkeypatch):
    monkeypatch.setattr(client, "CALL_SECONDS", 0.5)
    service = Service("--use", f"{ODD}:told")
    there = remote(service.url, retries=50, timeout=0.5)
    service.end(signal.SIGKILL)
    given_up = re.match(r"given up after (\d+) tries: ", scores(there)[1]["told"])
    assert int(given_up[1]) < 20


def test_a_hanging_service_does_not_keep_the_program(service):
    code = (
        "import asyncio, sys\nfrom PIL import Image\nfrom rewards import load_rewards\n"
        f"there, = load_rewards([{{'use': 'told', 'endpoints': {service.url!r}, 'images_per_request': 1}}])\n"
        "call = there.function([Image.new('RGB', (5, 5))] * 2, ['sleep'] * 2, factor=[20.0] * 2)\n"
        "try: asyncio.run(asyncio.wait_for(call, 0.5))\n"
        "except TimeoutError: print('left')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=15)
    assert ended.stdout == "left\n"


@pytest.mark.parametrize("token", ["geheïm-1234", "kept\nsecret-1234"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(service, monkeypatch, token):
    monkeypatch.setenv("FLOW_ALIGN_TOKEN", token)
    with pytest.raises(ValueError, match="FLOW_ALIGN_TOKEN contains characters other than printable ASCII") as caught:
        remote(service.url)
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_token_is_refused_and_not_taken_for_none(service, monkeypatch, blank):
    monkeypatch.setenv("FLOW_ALIGN_TOKEN", blank)
    with pytest.raises(ValueError, match="the token in FLOW_ALIGN_TOKEN is blank, which is no token"):
        remote(service.url)


def test_a_request_that_http_cannot_carry_is_not_tried_again_and_not_shown(service):
    there = remote(service.url, retries=50)
    there.function._http.headers["Authorization"] = "Bearer kept-secret\n"
    assert scores(there)[1] == {"told": f"{service.url}: HTTP cannot carry this request"}


def test_the_token_comes_from_the_environment_and_is_not_shown(monkeypatch, caplog):
    service = Service("--use", f"{ODD}:told", token="kept-secret")
    for token in (None, "wrong"):
        if token:
            monkeypatch.setenv("FLOW_ALIGN_TOKEN", token)
        with pytest.raises(ValueError, match="requires a token: set the environment variable FLOW_ALIGN_TOKEN"):
            remote(service.url)
    monkeypatch.setenv("FLOW_ALIGN_TOKEN", " kept-secret\n")  # as `$(cat file)` does not give it, and `export` may
    caplog.set_level("DEBUG")
    assert scores(remote(service.url)) == scores(HERE)
    assert "kept-secret" not in caplog.text + service.end()


def test_a_request_larger_than_the_service_takes_says_what_to_do():
    service = Service("--use", f"{ODD}:told", "--max_body_mb", "0.006")
    assert "set `images_per_request`" in scores(remote(service.url))[1]["told"]
    assert scores(remote(service.url, images_per_request=2)) == scores(HERE)
    service.end()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"endpoints": []}, "must be a URL or a list of URLs"),
        ({"endpoints": 8000}, "must be a URL or a list of URLs"),
        ({"endpoints": "localhost:8000"}, "is not a URL such as"),
        ({"endpoints": "ftp://host"}, "is not a URL such as"),
        ({"endpoints": ["http://a", "http://a"]}, "twice"),
        ({"endpoints": "http://me:secret@host"}, r"\(host\) contains a user or password"),
        ({"endpoints": "http://a", "args": {"a": 1}}, "`endpoints` and `args`"),
        ({"endpoints": "http://a", "environment": {"python": "x"}}, "`endpoints` and `environment`"),
        ({"images_per_request": 2}, "`images_per_request` without `endpoints`"),
        ({"retries": 2}, "`retries` but runs in this process"),
        ({"timeout": 0}, "positive number of seconds, found 0"),
        ({"timeout": True}, "positive number of seconds, found True"),
        ({"endpoints": "http://a", "retries": -1}, "an integer, at least 0, found -1"),
        ({"endpoints": "http://a", "images_per_request": 0}, "an integer, at least 1, found 0"),
    ],
)
def test_keys_that_make_no_sense_are_refused_before_anything_is_asked(entry, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_rewards([{"use": "told" if "endpoints" in entry else f"{ODD}:told", **entry}])
    assert "secret" not in str(caught.value)


# --- A server that is not what it should be ---

SCORES = {"scores": [1.0] * 5}


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "deflate", "br", "x-unknown"])
def test_an_answer_is_not_unpacked(encoding):
    """1.8 kB of zeros, packed twice, became 7.3 GiB in the trainer."""
    bomb = gzip.compress(gzip.compress(bytes(2**26)))
    with hostile_service(answer(bomb, Content_Encoding=encoding, Content_Type="application/json")) as (url, heads):
        failure = scores(remote(url, retries=0))[1]["told"]
    assert f"packed with {encoding}, which was not asked for" in failure and len(failure) < 500
    assert all(b"accept-encoding: identity\r\n" in head.lower() for head in heads)


def test_an_answer_that_says_it_is_not_packed_is_read():
    with hostile_service(answer(SCORES, Content_Encoding="identity", **{"X_Reward_Digest": "0" * 64})) as (url, _):
        assert scores(remote(url)) == ([1.0] * 5, {})


def test_an_answer_without_an_end_is_cut_off():
    """It would fill the trainer's memory."""

    def endless(head):
        return [answer(DESCRIBED)] if b"/rewards" in head else itertools.chain([start], itertools.repeat(bytes(2**16)))

    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    with raw_server(endless) as (url, _):
        assert "the answer has more than 4194304 bytes" in scores(remote(url, retries=0))[1]["told"]


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 9, b"HTTP/1.1 200 OK\r\n\r\n"])
def test_an_answer_that_drips_is_given_up_after_the_time_out(head):
    """Every byte began the time anew, so that a rollout waited for hours."""
    with hostile_service(head + b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000, slowly=True) as (url, _):
        failure = scores(remote(url, retries=0, timeout=1.0))[1]["told"]
    assert "did not answer within 1 s" in failure


@pytest.mark.parametrize(
    "repeated",
    [
        lambda token: answer({"error": f"bad token {token}", "kind": "raised"}, "500 No"),
        lambda token: answer({"error": [token], "kind": "contract"}, "422 No"),
        lambda token: answer(f"Authorization: Bearer {token}", "502 Bad Gateway"),
        lambda token: answer("x" * 190 + token, "403 No"),
        lambda token: answer({"scores": [token] * 5}),
        lambda token: answer({"scores": token}),
        lambda token: answer(f"you sent {token}"),
        lambda token: answer("", f"200 {token}\x01"),
        lambda token: f"HTTP/1.1 200 OK\r\n{token}\r\n\r\n".encode(),
        lambda token: f"{token}\r\n\r\n".encode(),
        lambda token: answer("", "200 OK", Content_Encoding=token),
    ],
)
def test_a_token_that_a_server_repeats_is_not_logged(repeated, monkeypatch, caplog):
    """A proxy's error page quotes the request, and the log of a run is read by many."""
    token = "a-token-to-be-kept"
    monkeypatch.setenv("FLOW_ALIGN_TOKEN", token)
    caplog.set_level("INFO")
    with hostile_service(repeated(token)) as (url, heads):
        _, failures = asyncio.run(failing(remote(url, retries=1)))
    assert token.encode() in heads[-1]
    assert failures and "a-token" not in failures + caplog.text


async def failing(reward):
    try:
        return await reward.function(IMAGES, ["p"] * len(IMAGES)), ""
    except Exception as error:
        return None, str(error)


def test_control_characters_of_a_server_do_not_reach_the_log(caplog):
    """They would clear the screen, or write a line that looks like the run's own."""
    text = "\x1b[2J\x9b1m\r\nWARNING all is well\u202e"
    with hostile_service(answer({"error": text, "kind": "raised"}, "500 No")) as (url, _):
        failure = scores(remote(url))[1]["told"]
    assert failure == "\\x1b[2J\\x9b1m\\r\n  WARNING all is well\\u202e"


@pytest.mark.parametrize(
    "page",
    [
        {"rewards": {"told": 3}, "limits": {"bytes": 9}},
        {"rewards": {"told": {"columns": 3, "required": []}}, "limits": {"bytes": 9}},
        {"rewards": {"told": {"columns": None, "required": [3]}}, "limits": {"bytes": 9}},
        {"rewards": {"told": {"columns": None, "required": [], "digest": 3}}, "limits": {"bytes": 9}},
        {"rewards": {"told": {"columns": None, "required": []}}, "limits": {"bytes": "much"}},
        {"rewards": {"told": {"columns": None, "required": []}}},
        "[" * 100_000,
    ],
)
def test_a_page_that_no_service_gives_is_a_sentence(page):
    with (
        raw_server(lambda head: [answer(page)]) as (url, _),
        pytest.raises(ValueError, match="is not a reward service"),
    ):
        remote(url)


# --- A time-out in this process ---


def test_a_reward_in_this_process_that_takes_too_long_is_given_up_and_counted():
    (timed,) = load_rewards([{"use": f"{ODD}:told", "timeout": 0.3}])
    assert scores(timed) == scores(HERE) and timed.columns == HERE.columns
    assert scores(timed, "raise") == ([pytest.approx(float("nan"), nan_ok=True)] * 5, scores(HERE, "raise")[1])
    assert scores(timed, "sleep", factor=[1.5] * 5)[1] == {"told": "took longer than 0.3 s"}
    assert "still busy" in scores(timed)[1]["told"]
    time.sleep(1.6)
    assert scores(timed) == scores(HERE)


def test_an_async_reward_has_a_time_out_too():
    (timed,) = load_rewards([{"use": f"{ODD}:patient", "timeout": 5}])
    assert scores(timed, "four") == ([4.0] * 5, {})


def test_an_async_reward_that_blocks_or_never_comes_back_is_given_up():
    (timed, plain) = load_rewards([{"use": f"{ODD}:blocking", "timeout": 0.3}, f"{ODD}:told"])
    values, failures = score([timed, plain], IMAGES, ["1.5"] * 5, {})
    assert failures == {"blocking": "took longer than 0.3 s"} and values[1] == scores(HERE)[0]

    async def waits_for_ever(images, prompts):
        await asyncio.get_running_loop().create_future()

    async def finds_something_slow(images, prompts):
        raise TimeoutError("no answer from the database")

    waiting = Timed("waiting", waits_for_ever, 0.2)
    for _ in range(2):  # it was cancelled: its thread is free again
        with pytest.raises(RewardUnavailable, match="took longer"):
            asyncio.run(waiting(IMAGES, ["p"] * 5))
        time.sleep(0.2)
    with pytest.raises(TimeoutError, match="no answer from the database"):
        asyncio.run(Timed("slow", finds_something_slow, 5)(IMAGES, ["p"] * 5))
