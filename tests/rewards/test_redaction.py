"""No secret of a config, and no control character of another program, is shown anywhere."""

from dataclasses import fields

import pytest
from PIL import Image

from align.dpo import DPOConfig
from align.dpo_online import OnlineDPOConfig
from align.grpo import GRPOConfig
from align.nft import NFTConfig
from align.sft import SFTConfig
from rewards import load_rewards, registry
from rewards.calling import score
from rewards.contract import RewardError
from rewards.redaction import foreign, is_secret, redacted, remember_secrets

SECRET = "hunter2-of-all-people"


@pytest.mark.parametrize(
    "value",
    [
        {"environment": {"python": "/venv", "variables": {"PLAIN": SECRET}}},
        {"variables": [f"PLAIN={SECRET}"]},
        {"args": {"api_key": SECRET}},
        {"args": {"apiKey": SECRET, "deeper": [{"HF_TOKEN": SECRET}, {"Authorization": SECRET}]}},
        {"password": {"of": SECRET}, "client-secret": SECRET, "AWS_ACCESS_KEY_ID": SECRET, "credentials": [SECRET]},
        f"sk-{SECRET}",
        [f"hf_{SECRET}", f"ghp_{SECRET}", f"github_pat_{SECRET}"],
        f"curl -H 'Authorization: Bearer {SECRET}'",
        f"http://user:{SECRET}@host/v1",
        f"http://{SECRET}@host/v1 and http://user:a@{SECRET}@host",
        f"http://host/v1?sig={SECRET}",
        f"--extra-index-url https://ci:{SECRET}@pypi.example/simple",
        f"JUDGE_API_KEY={SECRET}",
        (f"token='{SECRET}'",),
    ],
)
def test_a_secret_is_known_by_its_name_its_place_and_its_look(value):
    """Otherwise a run's model card, or the message about a mistyped key, publishes it."""
    assert SECRET not in str(redacted(value)) and "***" in str(redacted(value))
    assert redacted(redacted(value)) == redacted(value)


def test_what_is_no_secret_stays_readable():
    """Otherwise a model card does not tell how the run was made."""
    entry = {
        "use": "vlm_judge",
        "weight": 0.5,
        "args": {"model": "Qwen/Qwen2.5-VL", "base_url": "http://judge:8000/v1", "max_tokens": 512, "on": True},
        "endpoints": ["http://gpu-1:8000"],
        "environment": {"requirements": ["timm==1.0.9"], "variables": {"CUDA_VISIBLE_DEVICES": "1"}},
    }
    hidden = entry["environment"] | {"variables": {"CUDA_VISIBLE_DEVICES": "***"}}
    assert redacted(entry) == entry | {"environment": hidden}
    plain = {
        "tokenizer": "x",
        "author": "y",
        "api_key_env": "JUDGE_KEY",
        "token_file": "t",
        "monkeys": 3,
        "token": None,
    }
    assert redacted(plain) == plain | {"monkeys": redacted(plain)["monkeys"]}
    for text in ("send `Authorization: Bearer TOKEN`", "a basic training", "epsilon: 1e-4", "runs/my-run at 3 = 4"):
        assert redacted(text) == text
    assert is_secret("X-Api-Key") and not is_secret("keyboard")


ENTRY = {"use": "vlm_judge", "args": {"model": "m", "base_url": "http://judge/v1"}}


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY | {"enviroment": {"python": "x", "variables": {"JUDGE": SECRET}}},
        ENTRY | {"enviroment": {"JUDGE": SECRET}},
        ENTRY | {"environment": f"JUDGE={SECRET}", "args": {"backend": "package"}},
        ENTRY | {"environment": [{"variables": {"JUDGE": SECRET}}]},
        ENTRY | {"environment": {"python": "x", "variables": [f"JUDGE={SECRET}"]}},
        ENTRY | {"environment": {"varables": {"JUDGE": SECRET}}},
        {"args": {"api_key": SECRET}},
        [{"use": "vlm_judge", "args": {"api_key": SECRET}}],
        {"use": "vlm_judge", "args": [{"api_key": SECRET}]},
        {"use": "vlm_judge", "args": f"api_key={SECRET}"},
        {"use": "vlm_judge", "args": {"model": "m", "base_url": "http://judge/v1", "api_kye": SECRET}},
        {"use": "vlm_judge", "args": {"model": "m", "base_url": 3, "request": {"api_key": SECRET}}},
        {"use": "vlm_judge", "args": {"model": "m", "base_url": f"htp://u:{SECRET}@judge/v1"}},
        {"use": "hpsv2", "endpoints": f"htp://u:{SECRET}@host"},
        {"use": "hpsv2", "endpoints": f"http://host?token={SECRET}"},
        {"use": "hpsv2", "endpoints": {"token": SECRET, "url": 3}},
        {"use": "hpsv2", "endpoints": 3, "retries": 1, "password": SECRET},
        {"use": "hpsv2", "weight": {"token": SECRET}},
        {"use": f"hpsv3?token={SECRET}"},
    ],
    ids=range(19),
)
def test_a_mistake_in_an_entry_is_told_without_its_secrets(entry, capsys):
    """Otherwise a typing mistake puts a key into the log of a shared cluster."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_rewards([entry])
    assert SECRET not in redacted(str(caught.value))  # as a command prints it
    if entry != {"use": f"hpsv3?token={SECRET}"}:
        assert SECRET not in str(caught.value)


QUOTES_ITS_KEY = """
def settings(**given): raise ValueError(f"settings {given} do not work")
def refused(api_key): raise ValueError(f"the key {api_key} was refused")
def ended(api_key): raise SystemExit(api_key)
def raises(api_key):
    def score(images, prompts): raise RuntimeError(f"401 for {api_key}")
    return score
def returns(api_key): return lambda images, prompts: [f"401 for {api_key}"]
"""


@pytest.mark.parametrize("factory", ["settings", "refused", "ended", "raises", "returns"])
@pytest.mark.parametrize("way", ["args", "variables"])
def test_an_error_that_quotes_a_key_of_the_entry_is_shown_without_it(tmp_path, monkeypatch, factory, way):
    """As HTTP clients do: `Incorrect API key provided: ...` went to the log, to the table of failures, and to a service's
    clients."""
    file = tmp_path / "quotes.py"
    file.write_text(QUOTES_ITS_KEY)
    key = "not-known-by-its-look"
    entry = {"use": f"{file}:{factory}", "args": {"api_key": key}}
    if way == "variables":  # a key that the entry only names
        monkeypatch.setenv("JUDGE_API_KEY", key)
        remember_secrets({"environment": {"variables": {"JUDGE_API_KEY": None, "HF_HOME": "/somewhere"}}})
        monkeypatch.setattr(registry, "remember_secrets", lambda entry: None)
    shown = ""
    try:
        shown = str(score(load_rewards(entry), [Image.new("RGB", (8, 8))], ["p"], {})[1])
    except (ValueError, ImportError, RewardError) as error:
        shown = redacted(str(error))
    assert "***" in shown and key not in shown
    assert redacted("/somewhere a token") == "/somewhere a token"


def test_rewards_are_not_sent_to_a_tracker():
    """Trackers get what is in the trainer's arguments; an entry of a reward may hold a key."""
    for config in (SFTConfig, DPOConfig, OnlineDPOConfig, GRPOConfig, NFTConfig):
        assert "rewards" not in {field.name for field in fields(config)}


# --- Text of other programs ---


@pytest.mark.parametrize(
    "hostile", ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x00", "\u202e", "\x9b1m", "\ud800", "\u2028"]
)
def test_control_characters_of_others_do_not_reach_the_terminal(hostile):
    """Otherwise an answer clears the screen, renames the window, or hides what stood before it."""
    shown = foreign(f"a{hostile}b")
    assert shown.startswith("a\\") and shown.endswith("b") and all(c.isprintable() for c in shown)


def test_other_text_is_shown_as_it_is():
    assert foreign("生成 “ähnlich”\u3000ok\tyes") == "生成 “ähnlich”\u3000ok  yes"


def test_lines_of_others_do_not_look_like_lines_of_the_log():
    assert foreign("broken\nreward ok\n  File x") == "broken\n  reward ok\n  File x"


@pytest.mark.parametrize("unit", ["a-", "key", "_key", "key=", "sk-", "://", "http://x?", "http://", "Basic ", "a@"])
def test_hostile_text_does_not_hold_the_interpreter(unit):
    """With time that grows with the square this would take hours."""
    assert len(foreign(unit * 10**6)) < 2100 and redacted(unit * 10**5)


def test_long_text_of_others_is_cut_and_a_token_in_it_is_hidden_before():
    """A token that is cut in two is no longer found."""
    assert foreign("x" * 3000).startswith("x" * 2000 + " ... (1000 more") and len(foreign("x" * 10**7)) < 2100
    text = "x" * 195 + SECRET
    assert foreign(text, SECRET, longest=200) == "x" * 195 + "***"
    assert "sk-" not in foreign("y" * 190 + f" sk-{SECRET}", longest=200)
