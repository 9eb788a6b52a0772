"""A digest tells a reward from another, wherever its file lies."""

import sys

import pytest

from rewards import load_rewards
from rewards.digests import digest_of, digest_of_callable


def test_a_digest_tells_rewards_apart_and_not_where_their_file_lies(tmp_path):
    for folder, text in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(text)
    files = [digest_of({"use": f"{tmp_path / folder}/r.py:x"}) for folder in "abc"]
    assert files[0] == files[1] != files[2] and files[0] != digest_of({"use": f"{tmp_path}/a/r.py:y"})
    ocr = digest_of({"use": "ocr"})
    assert ocr == digest_of({"use": "ocr", "name": "text", "timeout": 3}) == digest_of({"use": "ocr", "args": {}})
    with_args = digest_of({"use": "ocr", "args": {"a": 1, "b": [2]}})
    assert with_args == digest_of({"args": {"b": [2], "a": 1}, "use": "ocr"}) != ocr


@pytest.mark.parametrize("place", ["mine.py", "mine/__init__.py", "mine/deeper.py"])
def test_a_module_is_told_by_its_content(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    use = {"use": "mine.deeper:score" if "deeper" in place else "mine:score"}
    missing, found = digest_of(use), set()
    for text in ("x = 1", "x = 2"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
        found.add(digest_of(use))
    assert len(found) == 2 and missing not in found and "mine" not in sys.modules


def test_what_has_no_file_has_a_digest_too():
    digests = {
        digest_of({"use": use}) for use in ("nonsense", "json:dumps", "sys:exit", "no.such.module:x", "gone.py:x")
    }
    assert len(digests) == 5


def test_a_function_is_told_by_its_text():
    def bright(images, prompts):
        return [1.0 for _ in images]

    first = digest_of_callable(bright)

    def bright(images, prompts):
        return [2.0 for _ in images]

    assert first and first != digest_of_callable(bright) and digest_of_callable(len) == ""
    assert load_rewards(bright)[0].digest == digest_of_callable(bright)
    assert load_rewards("brightness")[0].digest == digest_of({"use": "brightness"})
