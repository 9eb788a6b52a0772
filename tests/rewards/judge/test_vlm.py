"""The judge behind an endpoint: a real server answers well, badly, late and not at all."""

import asyncio
import gzip
import logging
import socket
from email.utils import formatdate
from time import time

import numpy as np
import pytest
from judge_server import judge_that_answers
from PIL import Image
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from rewards import load_rewards, score
from rewards.judge.templates import TEMPLATES, load_template
from rewards.judge.vlm import VlmJudge
from rewards.remote.headers import retry_after

KEY = "sk-a-secret-that-no-log-may-show"
PLAIN_KEY = "one-of-no-known-look"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def picture(seed=0, size=(40, 24), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def judged(judge, images=None, prompts=None, **args):
    """(scores, failures) by way of a config, as a run calls it."""
    images = [picture()] if images is None else images
    rewards = load_rewards([{"use": "vlm_judge", "args": {"model": "m", "base_url": judge.url} | args}])
    scores, failures = score(rewards, images, prompts or ["p"] * len(images), {})
    return [None if np.isnan(value) else value for value in scores[0]], failures


def failing(status, **headers):
    return JSONResponse({"error": "out of order"}, status_code=status, headers=headers)


# --- What is sent ---


def test_the_judge_is_sent_the_very_pixels_the_prompt_and_temperature_zero():
    images = [picture(0), picture(1, (7, 31)), picture(2, mode="L"), picture(3, mode="P")]
    prompts = ["a cat", '{braces} and "quotes"', "你好", "{prompt}"]
    with judge_that_answers("Score: 10") as judge:
        assert judged(judge, images, prompts, concurrency=1) == ([1.0] * 4, {})
        for image, sent in zip(images, judge.images(), strict=True):
            assert sent.format == "PNG" and sent.mode == "RGB"
            assert np.array_equal(np.asarray(sent), np.asarray(image.convert("RGB")))
        for prompt, text in zip(prompts, judge.texts(), strict=True):
            assert f"Text: {prompt}\n" in text
        assert all((b["temperature"], b["model"], b["max_tokens"]) == (0, "m", 512) for b in judge.bodies)
        assert not any("authorization" in headers for headers in judge.headers)


def test_large_images_are_made_smaller_and_a_dot_and_transparency_pass():
    clear = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    with judge_that_answers("Score: 5") as judge:
        images = [Image.new("RGB", (8000, 8000)), Image.new("RGB", (1, 1)), clear, picture(size=(300, 100))]
        assert judged(judge, images, concurrency=1, max_side=200) == ([0.5] * 4, {})
        assert [sent.size for sent in judge.images()] == [(200, 200), (1, 1), (5, 5), (200, 67)]
        assert judge.images()[2].getpixel((0, 0)) == (255, 255, 255)
        assert judged(judge, []) == ([], {}) and len(judge.bodies) == 4


def test_the_key_comes_from_the_environment_and_further_fields_from_the_config(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("MY_KEY", "another")
    request = {"seed": 3, "chat_template_kwargs": {"enable_thinking": False}}
    with judge_that_answers("Score: 5") as judge, caplog.at_level(logging.DEBUG):
        judged(judge, request=request)
        judged(judge, api_key_env="MY_KEY")
        assert [headers["authorization"] for headers in judge.headers] == [f"Bearer {KEY}", "Bearer another"]
        assert judge.bodies[0]["seed"] == 3 and judge.bodies[0]["temperature"] == 0
        assert judge.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
        judge.answers = [failing(401)]
        assert "answered 401" in judged(judge, api_key_env="OPENAI_API_KEY")[1]["vlm_judge"]
        assert KEY not in repr(VlmJudge("m", judge.url))
    assert KEY not in caplog.text


def test_no_more_questions_than_allowed_are_under_way():
    with judge_that_answers("Score: 5") as judge:
        judge.delay = 0.2
        scores, _ = judged(judge, [picture(i) for i in range(12)], concurrency=3)
        assert scores == [0.5] * 12 and 1 < judge.most_under_way <= 3


def test_scores_come_in_the_order_of_the_images():
    with judge_that_answers(*(f"Score: {n}" for n in range(10)), "Score: 10") as judge:
        scores, _ = judged(judge, [picture(i) for i in range(11)], concurrency=4)
        sent = [np.asarray(image) for image in judge.images()]
    for number, value in enumerate(scores):
        place = next(i for i, pixels in enumerate(sent) if np.array_equal(pixels, np.asarray(picture(number))))
        assert value == pytest.approx(place / 10)


# --- What is answered ---


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        ("alignment", "All there.\nScore: 7", {"Score": 0.7}),
        ("alignment", "**Score:** 7/10.", {"Score": 0.7}),
        ("alignment", "- score： 7.5", {"Score": 0.75}),
        ("alignment", "Score (0-10): **0**", {"Score": 0.0}),
        ("aesthetics", "It has 3 flaws.\n\nScore: 10\n", {"Score": 1.0}),
        ("unifiedreward", "Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.0", None),
        ("unifiedreward", "**Alignment**: 5\nstyle: 2/5\n* Coherence score: 3", None),
    ],
)
def test_marks_are_read_and_scaled(template, answer, expected):
    expected = expected or {"Alignment": 1.0, "Coherence": 0.5, "Style": 0.25}
    assert TEMPLATES[template].parse(answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "7",
        "I would give it a 7.",
        "The Score: 7",
        "Score:",
        "Score: high",
        "Score: 11",
        "Score: -1",
        "Score: 7 or 8",
        "Score: 7/5",
        "Score: 7\nScore: 8",
        "Score: nan",
        "Score 7",
        "Scores: 7",
        "Score: 7 out of 10 stars",
        "Score: 1e1",
    ],
)
def test_an_answer_without_just_one_mark_in_range_has_none(answer):
    assert TEMPLATES["alignment"].parse(answer) is None
    assert TEMPLATES["unifiedreward"].parse("Alignment: 5\nCoherence: 3\n" + answer) is None


@pytest.mark.parametrize("answer", ["Score" + " " * 10**6, "Score(" + "*" * 10**6, "*" * 10**6, "Score: " + "9" * 4000])
def test_a_hostile_answer_does_not_hold_the_interpreter(answer):
    """40 KB of spaces once took 8 s, which grows with the square."""
    assert TEMPLATES["alignment"].parse(answer) is None


def test_an_answer_that_cannot_be_read_is_not_scored_and_logged(caplog):
    with judge_that_answers("Score: 4", "what a lovely picture", None, "Score: 99") as judge:
        assert judged(judge, [picture(i) for i in range(4)], concurrency=1) == ([0.4, None, None, None], {})
    assert caplog.text.count("no marks can be read") == 3
    assert "what a lovely picture" in caplog.text and "Score: 99" in caplog.text
    with judge_that_answers("blah " * 10_000) as judge:
        assert judged(judge) == ([None], {})
    assert max(len(record.getMessage()) for record in caplog.records) < 2200


def test_unifiedreward_is_the_mean_of_three_or_of_those_wanted():
    answer = "Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1"
    with judge_that_answers(answer) as judge:
        assert judged(judge, template="unifiedreward")[0] == [0.5]
        assert judged(judge, template="unifiedreward", parts=["Alignment"])[0] == [1.0]
        assert judged(judge, template="unifiedreward", parts=["Coherence", "Style"])[0] == [0.25]
        assert "Text Caption: [p]" in judge.texts()[0]


# --- Failures ---


def test_errors_that_pass_are_tried_again():
    with judge_that_answers(failing(500), failing(503), "Score: 8") as judge:
        assert judged(judge) == ([0.8], {}) and len(judge.bodies) == 3
        assert judge.bodies[0] == judge.bodies[1] == judge.bodies[2]


def test_a_server_that_is_busy_is_given_the_time_it_asks_for():
    busy = failing(429, **{"Retry-After": "2"})
    with judge_that_answers(busy, failing(429, **{"Retry-After": "0"}), "Score: 8") as judge:
        assert judged(judge) == ([0.8], {})
        assert judge.times[1] - judge.times[0] > 1.8  # unasked it waits for 1.5 s at most


def test_retry_after_is_seconds_or_a_date_and_bounded():
    assert [retry_after(value, 60.0) for value in ("2.5", "-3", "9999")] == [2.5, 0.0, 60.0]
    assert 5 < retry_after(formatdate(time() + 10, usegmt=True), 60.0) <= 10
    assert [retry_after(value, 60.0) for value in (None, "soon", "nan")] == [None, None, None]


@pytest.mark.parametrize("how", ["hang", "trickle"])
def test_a_server_that_hangs_is_given_up_and_asked_again(how):
    with judge_that_answers(how, "Score: 6") as judge:
        assert judged(judge, timeout=2.0) == ([0.6], {}) and len(judge.bodies) == 2
        judge.answers = [how]
        scores, failures = judged(judge, timeout=0.3, retries=1)
        assert scores == [None] and "did not answer within 0.3 s" in failures["vlm_judge"] and len(judge.bodies) == 4


async def endless():
    while True:
        yield b" " * 2**16


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (
            Response(gzip.compress(gzip.compress(bytes(2**26))), headers={"Content-Encoding": "gzip, gzip"}),
            "gzip, gzip",
        ),
        (StreamingResponse(endless()), "more than 4194304 bytes"),
    ],
)
def test_an_answer_that_would_fill_the_memory_is_refused(answer, found):
    """1.8 kB, packed twice, became 7.3 GiB."""
    with judge_that_answers(answer) as judge:
        assert found in judged(judge, retries=0)[1]["vlm_judge"]
        assert judge.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "answer",
    [
        PlainTextResponse(f"invalid key {PLAIN_KEY}", status_code=401),
        PlainTextResponse("x" * 190 + KEY, status_code=400),
        PlainTextResponse(f"you sent Bearer {PLAIN_KEY}"),
        Response("", headers={"Content-Encoding": PLAIN_KEY}),
        f"No score for {PLAIN_KEY}",
    ],
)
def test_a_key_that_a_judge_repeats_is_not_logged(answer, monkeypatch, caplog):
    """Hosted endpoints quote the key that they refuse."""
    monkeypatch.setenv("OPENAI_API_KEY", PLAIN_KEY)
    caplog.set_level("INFO")
    with judge_that_answers(answer) as judge:
        failures = judged(judge, retries=0)[1]
    assert (failures or "no marks can be read" in caplog.text) and PLAIN_KEY[:6] not in f"{failures}{caplog.text}"


@pytest.mark.parametrize(
    "answer", ["\x1b[2J", PlainTextResponse("\x1b[2J"), PlainTextResponse("\x1b[2J", status_code=400)]
)
def test_control_characters_of_a_judge_do_not_reach_the_log(answer, caplog):
    with judge_that_answers(answer) as judge:
        failures = judged(judge, retries=0)[1]
    shown = f"{failures}{caplog.text}"
    assert "x1b[2J" in shown and "\x1b" not in shown


def test_one_image_that_fails_for_good_leaves_the_others_scored(caplog):
    with judge_that_answers("Score: 1", failing(400), "Score: 3") as judge:
        args = {"concurrency": 1, "max_unanswered": 0.5}
        assert judged(judge, [picture(i) for i in range(3)], **args) == ([0.1, None, 0.3], {})
        assert len(judge.bodies) == 3  # what is refused is not asked again
    assert "1 of 3 images not scored" in caplog.text and "answered 400" in caplog.text


def test_more_unanswered_images_than_may_be_fail_the_call_so_that_the_run_counts_them():
    with judge_that_answers("Score: 1", failing(400), "Score: 3") as judge:
        scores, failures = judged(judge, [picture(i) for i in range(3)], concurrency=1)
    assert scores == [None] * 3 and "answered 400" in failures["vlm_judge"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (failing(401), "answered 401"),
        (failing(404), "answered 404"),
        (failing(500), "500 Internal Server Error"),
        (PlainTextResponse("<html>a gateway</html>"), "not answer with a chat completion: '<html>"),
        (JSONResponse({"choices": []}), "not answer with a chat completion"),
        (JSONResponse([1]), "not answer with a chat completion"),
        (PlainTextResponse("", status_code=307, headers={"Location": "http://127.0.0.1:9/v1"}), "answered 307"),
    ],
)
def test_when_all_fail_the_call_fails_and_says_how(answer, found):
    with judge_that_answers(answer) as judge:
        scores, failures = judged(judge, [picture(), picture()], retries=0)
        assert scores == [None, None] and found in failures["vlm_judge"] and len(judge.bodies) == 2


def test_a_server_that_is_not_there_fails_the_call():
    with socket.socket() as taken:  # bound and not listening: nothing else can take the port meanwhile
        taken.bind(("127.0.0.1", 0))
        reward = VlmJudge("m", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1)
        scores, failures = score(load_rewards([reward]), [picture()], ["p"], {})
    assert np.isnan(scores[0][0]) and "ConnectError" in failures["VlmJudge"]


def test_one_judge_serves_several_event_loops():
    with judge_that_answers("Score: 5") as judge:
        reward = VlmJudge("m", judge.url)
        assert [asyncio.run(reward([picture()], ["p"])) for _ in range(3)] == [[0.5]] * 3


# --- Templates and arguments ---


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "cats.yaml"
    path.write_text("text: 'How much of a cat is this? {prompt}'\nscores: [Cat]\nlowest: 1\nhighest: 3\n")
    with judge_that_answers("Cat: 2") as judge:
        assert judged(judge, prompts=["a dog"], template=str(path)) == ([0.5], {})
        assert judge.texts() == ["How much of a cat is this? a dog"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            "text: a\nscores: [A]\nlowest: 1\n",
            "needs the keys text, scores, lowest, highest, found text, scores, lowest",
        ),
        ("[1]", "needs the keys .*, found list"),
        ("text: ''\nscores: [A]\nlowest: 0\nhighest: 1", "`text` of the template .* must be text"),
        ("text: a\nscores: A\nlowest: 0\nhighest: 1", "must be a list of names, found 'A'"),
        ("text: a\nscores: []\nlowest: 0\nhighest: 1", "must be a list of names"),
        ("text: a\nscores: [A]\nlowest: 5\nhighest: 1", "0 <= lowest < highest, found 5, 1"),
        ("text: a\nscores: [A]\nlowest: low\nhighest: 1", "0 <= lowest < highest, found 'low'"),
    ],
)
def test_a_template_file_that_will_not_do_is_refused(tmp_path, content, found):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=found):
        load_template(str(path))


@pytest.mark.parametrize(
    ("args", "error", "found"),
    [
        ({"template": "alignmnt"}, ValueError, "unknown template 'alignmnt'. Did you mean 'alignment'"),
        ({"template": "nowhere.yaml"}, FileNotFoundError, "nowhere.yaml does not exist"),
        ({"parts": ["Beauty"]}, ValueError, "parts must be some of Score, found"),
        ({"parts": []}, ValueError, "parts must be some of Score"),
        ({"base_url": "localhost:8000"}, ValueError, "base_url must be http"),
        ({"base_url": "http://me:secret@host/v1"}, ValueError, "base_url contains a user name or password"),
        ({"timeout": 0}, ValueError, "timeout must be above 0"),
        ({"retries": -1}, ValueError, "retries 0 or more"),
        ({"concurrency": 0}, ValueError, "concurrency, max_side and max_tokens 1 or more"),
        ({"api_key_env": "NO_SUCH_KEY"}, ValueError, "environment variable NO_SUCH_KEY"),
        ({"api_key": "x"}, ValueError, "do not fit.*'api_key'"),
    ],
)
def test_wrong_arguments_are_refused(args, error, found):
    with pytest.raises(error, match=found):
        load_rewards([{"use": "vlm_judge", "args": {"model": "m", "base_url": "http://localhost/v1"} | args}])


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "MY_KEY"])
def test_a_blank_key_is_refused_and_not_left_out(monkeypatch, name):
    monkeypatch.setenv(name, " ")
    with pytest.raises(ValueError, match=f"the key in {name} is blank"):
        VlmJudge("m", "http://localhost/v1", api_key_env=name)


def test_a_broken_key_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nsecond line")
    with pytest.raises(ValueError, match="OPENAI_API_KEY contains characters other than printable ASCII") as caught:
        VlmJudge("m", "http://localhost/v1")
    assert KEY not in str(caught.value)
