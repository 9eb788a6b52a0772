"""Prompts from files, folders and hub names, and what is said of those that cannot be read."""

import datasets
import huggingface_hub
import pytest
from datasets import Dataset

from preference_data.prompts import BUILDERS, check_prompts, find_prompt_file, load_prompts

ROWS = {"prompt": ["a circle", "two squares", "日本 ñ"], "n": [1, 2, 3]}
JSON_LINES = '{"prompt": "a circle", "n": 1}\n{"prompt": "two squares", "n": 2}\n{"prompt": "日本 ñ", "n": 3}\n'


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No hub, and a cache of one's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder beside the cache."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def save_as(path) -> str:
    data = Dataset.from_dict(ROWS)
    if path.suffix == ".jsonl":
        path.write_text(JSON_LINES, encoding="utf-8")
    elif path.suffix == ".json":
        data.to_json(path, lines=False)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".csv":
        data.to_csv(path)
    else:
        path.write_text("\n".join(ROWS["prompt"]) + "\n", encoding="utf-8")
    return str(path)


# --- What can be read ---


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_file_gives_its_prompts_and_its_other_columns(folder, suffix):
    data = load_prompts(save_as(folder / f"prompts{suffix}"))
    assert data.column_names == ["prompt", "n"]
    assert (data["prompt"][:], data["n"][:]) == (ROWS["prompt"], ROWS["n"])


def test_a_text_file_gives_one_prompt_a_line(folder):
    data = load_prompts(save_as(folder / "prompts.txt"))
    assert data.column_names == ["prompt"] and data["prompt"][:] == ROWS["prompt"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT"])
def test_a_text_file_may_begin_with_a_byte_order_mark_and_have_blank_lines(folder, name):
    """As Windows writes it: U+FEFF stayed in the first prompt, and a blank line at the end was refused."""
    (folder / name).write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n two blue squares \r\n\r\n")
    assert load_prompts(str(folder / name))["prompt"][:] == ["a red circle", "two blue squares"]


def test_a_row_is_looked_at_without_opening_the_paths_and_urls_in_it(folder):
    """A data set's column of images names any file of the machine, or any server."""
    (folder / "secret.png").write_bytes(b"x")
    named = {"bytes": None, "path": str(folder / "secret.png")}
    features = datasets.Features({
        "prompt": datasets.Value("string"), "image": datasets.Image(), "several": datasets.List(datasets.Image()),
        "nested": {"image": datasets.Image()},
    })  # fmt: skip
    rows = [{"prompt": "a", "image": named, "several": [named], "nested": {"image": named}}]
    Dataset.from_list(rows, features=features).to_parquet(folder / "a.parquet")
    row = load_prompts(str(folder / "a.parquet"))[0]
    assert row["image"] == row["several"][0] == row["nested"]["image"] == named


def test_a_link_out_of_the_folder_is_no_file_of_it(folder, tmp_path):
    """`train.txt -> ~/.ssh/id_rsa` became prompts, and a data set that is given away."""
    (tmp_path / "secret.txt").write_text("key")
    (folder / "train.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(
        ValueError, match=r"train\.txt is a link to a file outside of the folder .*name that file itself"
    ):
        load_prompts(str(folder))
    (folder / "here.txt").write_text("a circle")
    (folder / "train.txt").unlink()
    (folder / "train.txt").symlink_to(folder / "here.txt")
    assert load_prompts(str(folder))["prompt"][:] == ["a circle"]


def test_every_ending_that_is_offered_is_covered_above():
    assert set(BUILDERS) == {".jsonl", ".json", ".parquet", ".csv", ".txt"}


def test_columns_of_any_shape_reach_the_rows(folder):
    row = '{"prompt": "a", "spec": {"n": null, "word": "CAT"}, "tags": ["x", "y"]}\n'
    (first,) = load_prompts(write(folder / "a.jsonl", row))
    assert first == {"prompt": "a", "spec": {"n": None, "word": "CAT"}, "tags": ["x", "y"]}


def test_a_file_is_every_split(folder):
    name = save_as(folder / "prompts.jsonl")
    assert load_prompts(name, "train")[:] == load_prompts(name, "test")[:] == load_prompts(name, "anything")[:]


@pytest.mark.parametrize("suffix", BUILDERS)
def test_a_folder_gives_the_file_of_the_split(folder, suffix):
    save_as(folder / f"train{suffix}")
    write(folder / "test.txt", "held out\n")
    assert load_prompts(str(folder), "train")["prompt"][:] == ROWS["prompt"]
    assert load_prompts(str(folder), "test")["prompt"][:] == ["held out"]


def test_a_file_that_changed_is_read_again(folder):
    name = write(folder / "a.txt", "before\n")
    assert load_prompts(name)["prompt"][:] == ["before"]
    write(folder / "a.txt", "afterwards\n")
    assert load_prompts(name)["prompt"][:] == ["afterwards"]


@pytest.mark.parametrize("name", ["run[1]/a.txt", "all*/a?.txt", "with space/a.txt"])
def test_a_path_is_no_pattern(folder, name):
    write(folder / "all of them" / "ab.txt", "another\n")
    assert load_prompts(write(folder / name, "mine\n"))["prompt"][:] == ["mine"]


def test_a_home_folder_is_expanded(folder, monkeypatch):
    write(folder / "a.txt", "mine\n")
    monkeypatch.setenv("HOME", str(folder))
    assert load_prompts("~/a.txt")["prompt"][:] == ["mine"]


# --- Paths that are not there ---


def test_a_missing_file_names_the_nearest(folder):
    write(folder / "prompts.jsonl", JSON_LINES)
    with pytest.raises(FileNotFoundError, match=r"promts\.jsonl does not exist\. Did you mean 'prompts\.jsonl'\?"):
        load_prompts(str(folder / "promts.jsonl"))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere/train.txt", "./nowhere", "../nowhere", "~/nowhere"])
def test_a_path_that_is_not_there_is_no_hub_name(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(FileNotFoundError, match=rf"data file {name} does not exist\.$"):
        find_prompt_file(name, "train")


def test_a_missing_split_lists_the_files_there_are(folder):
    write(folder / "train.jsonl", JSON_LINES)
    write(folder / "validation.csv", "prompt\na\n")
    write(folder / "notes.md", "")
    there = r"train\.jsonl, validation\.csv"
    with pytest.raises(FileNotFoundError, match=rf"no file for the split 'test'.*It has: {there}$"):
        load_prompts(str(folder), "test")


def test_a_folder_without_prompts_says_so(folder):
    with pytest.raises(FileNotFoundError, match=r"no file for the split 'train'.*It has: none"):
        load_prompts(str(folder))


def test_an_unknown_ending_lists_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"cannot read prompts from .*a\.xlsx: known endings are \.jsonl, .*\.txt"):
        load_prompts(write(folder / "a.xlsx", "x"))


@pytest.mark.parametrize("name", ["somebody/prompts", "prompts", "a/b/c"])
def test_a_hub_name_out_of_reach_says_what_to_do(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_prompt_file(name, "train") is None
    with pytest.raises(FileNotFoundError) as caught:
        load_prompts(name)
    assert f"'{name}' is no file or folder here" in str(caught.value)
    assert "Give a path, or download it on a machine with a network" in str(caught.value)


# --- Rows that are no prompts ---


@pytest.mark.parametrize(
    ("file", "text", "fragments"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', ["a.jsonl, row 1, column 'prompt'", "is empty"]),
        ("a.jsonl", '{"prompt": " \\n\\t"}\n', ["a.jsonl, row 0, column 'prompt'", "is empty"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', ["a.jsonl, row 1", "expected text, found NoneType"]),
        ("a.jsonl", '{"prompt": "a"}\n{"n": 3}\n', ["a.jsonl, row 1", "expected text, found NoneType"]),
        ("a.jsonl", '{"prompt": 1}\n{"prompt": 2}\n', ["a.jsonl, row 0", "expected text, found int"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', ["a.jsonl, row 1", "expected text, found int"]),
        ("a.jsonl", '{"prompt": ["a"]}\n', ["a.jsonl, row 0", "expected text, found list"]),
        ("a.csv", "prompt,n\na,1\n,2\n", ["a.csv, row 1", "expected text, found NoneType"]),
        ("a.csv", "prompt\n1\n2\n", ["a.csv, row 0", "expected text, found int"]),
        ("a.csv", "prompt;n\na;1\n", ["no column 'prompt'", "separated by ';': write commas"]),
        ("a.jsonl", '{"prompts": "a"}\n', ["a.jsonl has no column 'prompt'", "['prompts']", "rename 'prompts'?"]),
        ("a.csv", "caption,Prompt\na,b\n", ["no column 'prompt'", "['caption', 'Prompt']", "rename 'Prompt'?"]),
        ("a.json", '[{"zzz": "a"}]', ["a.json has no column 'prompt'; it has ['zzz']"]),
    ],
)
def test_a_bad_row_or_column_is_named_with_its_file(folder, file, text, fragments):
    with pytest.raises(ValueError) as caught:
        load_prompts(write(folder / file, text))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("suffix", BUILDERS)
def test_an_empty_file_holds_no_rows(folder, suffix):
    with pytest.raises(ValueError, match=rf"a\{suffix} holds no rows"):
        load_prompts(write(folder / f"a{suffix}", ""))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", "[]"),
        ("a.csv", "prompt\n"),
        ("a.json", "3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        ("a.jsonl", "no json\n"),
        ("a.parquet", "no parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder, file, text):
    with pytest.raises(ValueError, match=rf"cannot read prompts from .*{file}: \S+"):
        load_prompts(write(folder / file, text))


def test_text_in_another_encoding_is_named(folder):
    (folder / "a.txt").write_bytes("ein schönes Bild\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read prompts from .*a\.txt: .*decode"):
        load_prompts(str(folder / "a.txt"))


def test_a_data_set_in_memory_is_held_to_the_same(folder):
    good = Dataset.from_dict(ROWS)
    assert check_prompts(good) is good
    with pytest.raises(ValueError, match=r"mine, row 1, column 'prompt': the prompt is empty"):
        check_prompts(Dataset.from_dict({"prompt": ["a", " "]}), "mine")
    with pytest.raises(ValueError, match="the data set holds no rows"):
        check_prompts(Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        check_prompts(Dataset.from_dict({"text": ["a"]}))
