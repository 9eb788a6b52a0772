"""``flow-align inspect``, which knows how a model reads prompts."""

import pytest
from preference_files import save

from align.cli.inspection import main
from align.models.families import outline


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "a.png", "b.png", "c.png")
    for name, words in (("a", 600), ("b", 3), ("c", 700)):
        (tmp_path / f"{name}.txt").write_text("red " * words)
    return tmp_path


def test_captions_that_a_model_would_cut_are_counted_before_it_is_trained(folder, capsys):
    """What comes behind the limit has no effect, and two long captions may be one to the model."""
    assert main([str(folder), "--model", "tiny"]) == 0
    longest, read = outline("tiny").prompt_tokens(("red " * 700).strip())
    said = capsys.readouterr().out
    assert f"2 texts are longer than the {read} tokens that are read, the longest {longest}: what comes after" in said
    assert main([str(folder)]) == 0
    assert "tokens" not in capsys.readouterr().out


def test_a_model_that_is_not_there_is_said_by_its_name(folder, capsys):
    assert main([str(folder), "--model", "tinny"]) == 1
    assert "cannot inspect" in (error := capsys.readouterr().err) and "tinny" in error
