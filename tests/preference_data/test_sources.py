"""Finding the rows that a name stands for: files, folders in the usual shapes, data sets in memory and on the hub."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from preference_files import encoded, json_lines, json_list, parquet, picture, save, tar

from preference_data import rows as rows_module
from preference_data.image_folders import ImageFolder, rename_file_name_columns
from preference_data.images import BadRow, ImageSource
from preference_data.places import lies_in
from preference_data.readers import read_captioned, read_preferences
from preference_data.sources import Files, expand_pattern, open_source


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No hub, and a cache of one's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data_set").mkdir()
    return tmp_path / "data_set"


def numbers(name, split="train") -> list:
    return [row.values["n"] for row in open_source(name, split)]


def n(*values) -> list[dict]:
    return [{"n": value} for value in values]


# --- Files and folders ---


def test_a_file_is_every_split(folder):
    file = json_lines(folder / "a.jsonl", n(1, 2))
    assert numbers(file) == numbers(str(file), "test") == [1, 2]


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("metadata-train.parquet", "metadata-test.parquet"),
        ("train-0.parquet", "test_unique-0.parquet"),
        ("train_000.parquet", "validation.parquet"),
        ("train/part-0.parquet", "test/part-0.parquet"),
        ("mine.parquet", "train/a.parquet", "train.parquet"),
    ],
)
def test_a_local_copy_of_a_hub_data_set_gives_its_split(folder, names):
    for name in names[:-1]:
        parquet(folder / name, n(0))
    parquet(folder / names[-1], n(9))
    split = {"train.parquet": "train"}.get(names[-1], names[-1].removeprefix("data/").removeprefix("metadata-"))
    split = split.split("-")[0].split(".")[0].split("/")[0]
    assert numbers(folder, split) == [9]


def test_shards_are_read_in_the_order_of_their_names(folder):
    for shard in (2, 0, 1):
        parquet(folder / f"data/train-0000{shard}-of-00003.parquet", n(shard))
    assert numbers(folder) == [0, 1, 2]
    for shard in (2, 0, 1):
        tar(folder / f"tars/name-00{shard}.tar", [("a.json", {"n": shard}), ("b.json", {"n": -shard})])
    assert numbers(folder / "tars") == [0, 0, 1, -1, 2, -2]


def test_a_split_of_any_name_is_found_by_it(folder):
    parquet(folder / "favourites.parquet", n(1))
    parquet(folder / "others.parquet", n(2))
    assert numbers(folder, "favourites") == [1]
    assert numbers(folder, "all") == [1, 2]  # no name of a split at all


def test_a_folder_with_splits_but_not_this_one_says_which(folder):
    json_lines(folder / "train.jsonl", n(1))
    json_lines(folder / "validation_unique.jsonl", n(1))
    with pytest.raises(FileNotFoundError, match=r"no data for the split 'test'. It has: train, validation_unique"):
        open_source(folder, "test")
    save(folder / "more", "train/a.png")
    with pytest.raises(FileNotFoundError, match=r"no data for the split 'test'. It has: train$"):
        open_source(folder / "more", "test")


def test_rows_are_not_read_twice_where_they_lie_in_two_kinds_of_files(folder):
    parquet(folder / "a.parquet", n(1))
    json_list(folder / "a.json", n(1))
    json_list(folder / "writer.json", n(7))
    assert numbers(folder) == [1]
    assert open_source(folder, "train").left_out(set()) == [("another kind of file is read", str(folder / "a.json"))]
    (folder / "a.parquet").unlink()
    assert numbers(folder) == [1]


def test_data_files_that_are_not_read_are_told(folder):
    """Shards packed in two ways, and a file beside that of the split, were left out without a word."""
    tar(folder / "s/0.tar.gz", [("a.json", {"n": 1})], "w:gz")
    tar(folder / "s/1.tgz", [("b.json", {"n": 2})], "w:gz")
    assert open_source(folder / "s", "train").left_out(set()) == [
        ("another kind of file is read", str(folder / "s/1.tgz"))
    ]
    for name in ("train", "test", "more"):
        json_lines(folder / f"{name}.jsonl", n(1))
    assert open_source(folder, "train").left_out(set()) == [("its name is of no split", str(folder / "more.jsonl"))]


def test_no_file_is_opened_before_its_rows_are_due(folder, monkeypatch):
    for shard in range(4):
        parquet(folder / f"part-{shard}.parquet", n(*range(40 * shard, 40 * shard + 40)))
    opened = []
    plain = rows_module.pq.ParquetFile
    monkeypatch.setattr(rows_module.pq, "ParquetFile", lambda file, **o: opened.append(file.name) or plain(file, **o))
    source = open_source(folder, "train")
    assert opened == []
    rows = iter(source)
    assert [next(rows).values["n"] for _ in range(40)] == list(range(40))
    assert opened == ["part-0.parquet"]
    assert next(rows).values["n"] == 40 and opened == ["part-0.parquet", "part-1.parquet"]


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "~/gone", "gone.tar", "gone.tar.gz"])
def test_a_path_that_is_not_there_is_no_hub_name(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(FileNotFoundError, match=r"gone\S* does not exist\.$"):
        open_source(name, "train")


def test_a_missing_file_names_the_nearest(folder):
    json_lines(folder / "pairs.jsonl", n(1))
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Did you mean 'pairs\.jsonl'\?"):
        open_source(folder / "pair.jsonl", "train")


def test_an_unknown_ending_and_an_empty_folder_say_what_would_do(folder):
    (folder / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"cannot read rows from .*a\.xlsx: known endings are \.parquet, \.tar"):
        open_source(folder / "a.xlsx", "train")
    with pytest.raises(FileNotFoundError, match="has no data: no file ending in"):
        open_source(folder, "train")


# --- Image folders ---


def images_of(source) -> list[tuple]:
    found = []
    for row in source:
        image = ImageSource.of(row.values["image"], row.where, row.folder)
        found.append((image.path.relative_to(source.folder).as_posix(), row.values.get("prompt")))
    return found


def test_images_come_with_the_text_beside_them_and_from_subfolders(folder):
    save(folder, "b.png", "a.jpg", "sub/c.webp", ".hidden.png", ".git/d.png")
    (folder / "a.txt").write_text(" a caption\n", encoding="utf-8")
    (folder / "sub" / "c.txt").write_text("\ufeffanother", encoding="utf-8")
    source = open_source(folder, "train")
    assert images_of(source) == [("a.jpg", "a caption"), ("b.png", None), ("sub/c.webp", "another")]
    assert source.first_without_caption() == folder / "b.png"


def test_metadata_gives_the_captions_and_what_it_leaves_out_has_those_beside_it(folder):
    save(folder, "a.png", "sub/b.png", "c.png")
    (folder / "c.txt").write_text("beside")
    rows = [{"file_name": "sub/b.png", "prompt": "bee"}, {"file_name": "./a.png", "prompt": "ay"}]
    json_lines(folder / "metadata.jsonl", rows)
    assert images_of(open_source(folder, "train")) == [("sub/b.png", "bee"), ("a.png", "ay"), ("c.png", "beside")]


def test_metadata_may_lie_in_the_folder_of_the_split(folder):
    save(folder, "train/a.png", "test/b.png")
    for split, name in (("train", "a.png"), ("test", "b.png")):
        json_lines(folder / split / "metadata.jsonl", [{"file_name": name, "prompt": split}])
    assert images_of(open_source(folder, "test")) == [("b.png", "test")]


def test_json_beside_an_image_is_told_as_left_out(folder):
    """Downloaders write one for each image; what they say of it was not read, without a word."""
    save(folder, "a.png", "sub/b.png")
    for name in ("a.json", "sub/b.png.json"):
        (folder / name).write_text('{"caption": "unread"}')
    source = open_source(folder, "train")
    assert images_of(source) == [("a.png", None), ("sub/b.png", None)]
    reason = "a .json beside an image is not read"
    assert source.left_out({folder / "a.png", folder / "sub/b.png"}) == [
        (reason, str(folder / "a.json")),
        (reason, str(folder / "sub/b.png.json")),
    ]


def test_metadata_above_the_splits_gives_each_of_them_its_captions(folder, tmp_path):
    save(folder, "train/a.png", "train/sub/b.png", "train/c.png", "test/a.png")
    json_lines(folder / "train/sub/metadata.jsonl", [{"file_name": "b.png", "prompt": "its own"}])
    rows = [("train/a.png", "ay"), ("train/sub/b.png", "bee"), ("test/a.png", "held out"), ("../out.png", "x")]
    json_lines(folder / "metadata.jsonl", [{"file_name": name, "prompt": prompt} for name, prompt in rows])
    found = [(Path(i).name, c) for i, c in images_of(open_source(folder, "train"))]
    assert found == [("b.png", "its own"), ("a.png", "ay"), ("c.png", None)]
    assert [record.prompt for record in read_captioned(str(folder), split="test")] == ["held out"]
    pair = {"prompt": "p", "chosen_file_name": "train/a.png", "rejected_file_name": "train/c.png"}
    json_lines(folder / "metadata.jsonl", [pair])
    (folder / "train/sub/metadata.jsonl").unlink()
    (read,) = read_preferences(str(folder), split="train")
    assert [image.path.name for image in read.sources()] == ["a.png", "c.png"]


@pytest.mark.parametrize("data", ["", "data/"])
@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_a_split_that_is_not_there_is_not_all_the_others(folder, data, splits):
    """With metadata above the splits the held-out images were those that are trained on; so were those of data/SPLIT."""
    for split in splits:
        save(folder, f"{data}{split}/a.png")
    json_lines(folder / "metadata.jsonl", [{"file_name": f"{data}{s}/a.png", "prompt": s} for s in splits])
    for split in splits:
        assert [record.prompt for record in read_captioned(str(folder), split=split)] == [split]
    with pytest.raises(FileNotFoundError, match=f"no data for the split 'val'. It has: {', '.join(sorted(splits))}$"):
        read_captioned(str(folder), split="val")
    (folder / "metadata.jsonl").unlink()
    source = read_captioned(str(folder), split="train", trigger="T").source
    assert images_of(source) == [("a.png", None)] and source.left_out({folder / data / "train/a.png"}) == []
    with pytest.raises(FileNotFoundError, match="no data for the split 'val'"):
        read_captioned(str(folder), split="val", trigger="T")


def test_metadata_of_several_images_a_row_is_all_there_is(folder):
    save(folder, "a.png", "b.png")
    row = {"prompt": "p", "chosen_file_name": "a.png", "rejected_file_name": "b.png", "file_names": ["a.png"]}
    json_lines(folder / "metadata.jsonl", [row])
    (found,) = open_source(folder, "train")
    assert found.values["chosen"] == "a.png" and found.values["rejected"] == "b.png"
    assert found.values["images"] == ["a.png"] and found.folder == folder


def test_columns_are_renamed_only_where_it_is_meant():
    assert rename_file_name_columns({"file_name": 1, "other_file_names": 2, "profile_name": 3}) == {
        "image": 1,
        "other": 2,
        "file_name": 1,
        "other_file_names": 2,
        "profile_name": 3,
    }
    assert rename_file_name_columns({"file_name": 1, "image": 2})["image"] == 2


def test_a_caption_that_is_no_text_is_named(folder):
    save(folder, "a.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    (bad,) = ImageFolder(folder)
    assert str(bad).startswith(f"{folder / 'a.txt'}: the caption cannot be read")


# --- Data sets in memory, saved, and on the hub ---


def test_a_data_set_in_memory_gives_images_as_they_are_stored():
    features = Features({"n": Value("int64"), "image": datasets.Image()})
    data = Dataset.from_dict({"n": [1, 2], "image": [picture(1), {"bytes": encoded(2), "path": None}]}, features)
    for dataset in (data, data.to_iterable_dataset()):
        rows = list(open_source(dataset, "train"))
        assert [row.where for row in rows] == ["the data set, row 0", "the data set, row 1"]
        assert [row.values["n"] for row in rows] == [1, 2] and rows[1].values["image"]["bytes"] == encoded(2)
        pixels = [ImageSource.of(row.values["image"], "x").open().tobytes() for row in rows]
        assert pixels == [picture(1).tobytes(), picture(2).tobytes()]


def test_a_generator_of_pictures_gives_them():
    data = datasets.IterableDataset.from_generator(lambda: iter([{"image": picture(1), "prompt": "p"}]))
    (row,) = open_source(data, "train")
    assert ImageSource.of(row.values["image"], "x").open().tobytes() == picture(1).tobytes()


def test_samples_of_the_webdataset_builder_become_rows(folder):
    file = tar(folder / "a.tar", [("s.0.png", encoded(1)), ("s.1.png", encoded(2)), ("s.json", {"scores": [1, 2]})])
    data = datasets.load_dataset("webdataset", data_files=[str(file)], split="train", streaming=True)
    (row,) = open_source(data, "train")
    assert row.values["scores"] == [1, 2] and row.where == "the data set, row 0, sample 's'"
    assert [image["bytes"] for image in row.values["images"]] == [encoded(1), encoded(2)]


def test_what_was_saved_to_disk_is_read(folder):
    Dataset.from_list(n(1, 2)).save_to_disk(folder / "one")
    DatasetDict({"test": Dataset.from_list(n(3))}).save_to_disk(folder / "several")
    assert numbers(folder / "one") == [1, 2] and numbers(folder / "several", "test") == [3]


def test_several_splits_in_memory_are_refused():
    with pytest.raises(ValueError, match="the data set has several splits, a, b: pass one of them"):
        open_source(DatasetDict({"a": Dataset.from_list(n(1)), "b": Dataset.from_list(n(2))}), "a")


def test_a_hub_name_out_of_reach_says_what_to_do(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for streaming in (False, True):
        with pytest.raises(FileNotFoundError, match=r"'somebody/pairs' is no file or folder here, .* Give a path"):
            open_source("somebody/pairs", "train", streaming=streaming)


def test_a_source_can_be_read_again(folder):
    source = Files("x", [json_lines(folder / "a.jsonl", n(1))], folder)
    assert list(source) == list(source)


# --- An image folder stays one ---


def captions_of(name, **settings) -> list[str]:
    return [record.prompt for record in read_captioned(str(name), **settings)]


@pytest.mark.parametrize(
    "stray",
    [
        {"a.json": {"id": 0, "tags": ["x"]}, "b.json": {"id": 1}},
        {"a.json": {"image": "a.png", "caption": "an old caption"}},
        {"a.png.json": {"image": "a.png", "caption": "an old caption"}},
        {"settings.json": {"resolution": 1024, "repeats": 10}},
        {"notes.jsonl": {"prompt": "no image here"}, "rows.csv": {"x": 1}},
        {"train.json": {"lr": 1}, "val.csv": {"x": 1}, "training.json": {}},
        {"train_config.json": {"lr": 1}, "test_prompts.json": {"p": 1}, "eval_results.json": {}},
        {"state.json": {"step": 3}},
    ],
    ids=[
        "beside each image",
        "beside one image",
        "of gallery-dl",
        "settings",
        "notes",
        "like a split",
        "like a split's part",
        "a trainer's state",
    ],
)
def test_a_stray_file_does_not_turn_an_image_folder_into_something_else(folder, stray):
    save(folder, "a.png", "b.png", "c.png")
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"caption {name}")
    for name, content in stray.items():
        json_lines(folder / name, [content])
    assert captions_of(folder) == ["caption a", "caption b", "caption c"]


def test_a_table_of_images_and_captions_beside_the_images_is_still_one(folder):
    save(folder, "a.png", "b.png")
    json_lines(folder / "captions.jsonl", [{"image": "b.png", "caption": "bee"}])
    assert captions_of(folder) == ["bee"]


def test_every_subfolder_may_have_its_metadata(folder):
    save(folder, "a/0.png", "a/1.png", "b/0.png", "b/deeper/0.png", "c/0.png")
    for name in ("a", "b", "b/deeper"):
        json_lines(folder / name / "metadata.jsonl", [{"file_name": "0.png", "prompt": f"{name} 0"}])
    (folder / "a/1.txt").write_text("beside")
    (folder / "c/0.txt").write_text("alone")
    assert captions_of(folder) == ["a 0", "b 0", "b/deeper 0", "beside", "alone"]


def test_a_subfolder_called_train_among_others_is_one_of_them(folder):
    """Of the folders bus, car and train the train alone was trained on."""
    for name in ("bus", "car", "train"):
        save(folder, f"{name}/0.png")
        (folder / name / "0.txt").write_text(f"a {name}")
    assert captions_of(folder) == ["a bus", "a car", "a train"]
    save(folder, "test/0.png")
    (folder / "test/0.txt").write_text("held out")
    assert captions_of(folder) == ["a train"] and captions_of(folder, split="test") == ["held out"]


# --- Patterns ---


@pytest.mark.parametrize(
    "pattern",
    ["shard-{000000..000002}.tar", "shard-*.tar", "shard-00000?.tar", "{shard-000000,shard-000001,shard-000002}.tar"],
)  # fmt: skip
def test_shards_may_be_named_by_a_pattern(folder, pattern):
    for number in range(3):
        tar(folder / f"shard-00000{number}.tar", [("s.json", {"n": number})])
    assert numbers(folder / pattern) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("shard-{0..3}.tar", r"shard-1\.tar does not exist"),
        ("other-*.tar", "no file matches"),
        ("*.bin", r"cannot read rows from .*a\.bin: known endings are"),
        ("{0..99999999}.tar", "names more than 100000 files"),
        ("{0..999}{0..999}{0..999}.tar", "names more than 100000 files"),
    ],
)
def test_a_pattern_that_is_wrong_says_what_is_missing(folder, pattern, message):
    tar(folder / "shard-0.tar", [("s.json", {"n": 0})])
    (folder / "a.bin").write_bytes(b"x")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        expand_pattern(str(folder / pattern))


# --- Columns by other names ---


def test_columns_may_be_mapped(folder):
    save(folder, "0.png", "1.png")
    rows = [{"text": "p", "image_x": "0.png", "image_y": "1.png", "chosen": "unused"}]
    file = json_lines(folder / "a.jsonl", rows)
    (pair,) = read_preferences(file, columns={"chosen": "image_x", "rejected": "image_y"})
    assert (pair.prompt, pair.chosen.path.name, pair.rejected.path.name) == ("p", "0.png", "1.png")
    (record,) = read_captioned(file, columns={"image": "image_y"})
    assert (record.prompt, record.image.path.name) == ("p", "1.png")
    with pytest.raises(ValueError, match=r"no column 'image_z', which --columns names\. Did you mean 'image_"):
        read_preferences(file, columns={"chosen": "image_z"})


# --- Where images may lie ---


def outside(folder, tmp_path) -> str:
    save(tmp_path / "elsewhere", "secret.png")
    return str(tmp_path / "elsewhere" / "secret.png")


@pytest.mark.parametrize("way", ["absolute", "dots", "link"])
def test_a_row_reads_no_image_outside_of_its_folder(folder, tmp_path, way):
    """A data set from elsewhere named any image of the machine, and the trained model would show it."""
    save(folder, "mine.png")
    secret = outside(folder, tmp_path)
    if way == "link":
        (folder / "link.png").symlink_to(secret)
    path = {"absolute": secret, "dots": "../elsewhere/secret.png", "link": "link.png"}[way]
    file = json_lines(folder / "a.jsonl", [{"image": "mine.png", "prompt": "a"}, {"image": path, "prompt": "b"}])
    with pytest.raises(BadRow, match=r"a\.jsonl, row 1.* lies outside of the data's folder .*set --image_folder"):
        list(read_captioned(file))
    assert len(list(read_captioned(file, on_bad_row="skip"))) == 1
    if way == "absolute":
        rows = [{"image": secret, "prompt": "b"}]
        assert len(list(read_captioned(json_lines(folder / "b.jsonl", rows), image_folder=tmp_path))) == 1


def test_an_image_folder_follows_no_link_out_of_it(folder, tmp_path):
    save(folder, "mine.png")
    (folder / "mine.txt").write_text("mine")
    (folder / "link.png").symlink_to(outside(folder, tmp_path))
    (folder / "link.txt").write_text("linked")
    with pytest.raises(BadRow, match=r"link\.png lies outside of the data's folder"):
        list(read_captioned(folder))
    (folder / "link.png").unlink()
    (tmp_path / "key").write_text("secret")
    (folder / "mine.txt").unlink()
    (folder / "mine.txt").symlink_to(tmp_path / "key")
    with pytest.raises(BadRow, match=r"mine\.txt: the caption is a link to a file outside of the folder"):
        list(read_captioned(folder))


def test_a_data_file_that_is_a_link_out_of_its_folder_is_refused(folder, tmp_path):
    json_lines(tmp_path / "elsewhere.jsonl", n(1))
    (folder / "train.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(
        ValueError, match=r"train\.jsonl is a link to a file outside of the folder .*name that file itself"
    ):
        open_source(folder, "train")
    assert numbers(folder / "train.jsonl") == [1]


def test_links_to_the_blobs_of_a_hub_snapshot_are_its_files(tmp_path):
    """The hub's cache keeps contents in blobs/, and links to them in snapshots/."""
    repository = tmp_path / "datasets--me--mine"
    snapshot = repository / "snapshots" / "abc"
    save(repository / "blobs", "1.png")
    (repository / "blobs" / "1.png").rename(repository / "blobs" / "1f3a")
    snapshot.mkdir(parents=True)
    (snapshot / "0.png").symlink_to("../../blobs/1f3a")
    (snapshot / "0.txt").write_text("a caption")
    (record,) = read_captioned(snapshot)
    assert record.image.size() == (8, 6)
    (snapshot / "1.png").symlink_to(outside(snapshot, tmp_path))
    (snapshot / "1.txt").write_text("another")
    with pytest.raises(BadRow, match="outside of the data's folder"):
        list(read_captioned(snapshot))


def test_images_beside_a_split_are_told_as_left_out(folder):
    save(folder, "train/a.png", "val/b.png", "extra/c.png", "d.png")
    for name in ("train/a", "val/b", "extra/c", "d"):
        (folder / f"{name}.txt").write_text(name)
    data = read_captioned(folder)
    assert [record.prompt for record in data] == ["train/a"]
    left_out = data.source.left_out({folder / "train/a.png"})
    assert left_out == [("it is not in the folder train", str(folder / name)) for name in ("d.png", "extra/c.png")]


def test_a_lone_train_beside_images_is_one_of_the_folders(folder):
    save(folder, "train/a.png", "b.png")
    for name in ("train/a", "b"):
        (folder / f"{name}.txt").write_text(name)
    assert captions_of(folder) == ["b", "train/a"]


@pytest.mark.parametrize("way", ["relative", "link", "plain"])
def test_an_image_that_metadata_names_in_full_comes_once(folder, monkeypatch, way, tmp_path):
    save(folder, "a.png", "b.png")
    rows = [{"file_name": str(folder / f"{name}.png"), "prompt": name} for name in "ab"]
    json_lines(folder / "metadata.jsonl", rows)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    name = {"relative": folder.name, "link": tmp_path / "link", "plain": folder}[way]
    assert captions_of(name, trigger="T") == ["T, a", "T, b"]


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption", ".CAPTION"])
def test_captions_may_stand_in_any_usual_file_beside_the_image(folder, ending):
    save(folder, "a.png", "b.png")
    (folder / f"a{ending}").write_text("beside a")
    (folder / f"b{ending}").write_text("beside b")
    assert captions_of(folder, trigger="T") == ["T, beside a", "T, beside b"]
    json_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "quality": 3}])
    assert captions_of(folder) == ["beside a", "beside b"]


def test_metadata_that_is_a_link_out_of_the_folder_is_not_read(folder, tmp_path):
    save(folder, "a.png")
    json_lines(tmp_path / "secret.jsonl", [{"file_name": "a.png", "prompt": "SECRET"}])
    (folder / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(BadRow, match="is a link to a file outside of the folder"):
        captions_of(folder)


def test_a_saved_data_set_names_no_image_outside_of_its_folder(folder, tmp_path):
    rows = [{"image": outside(folder, tmp_path), "prompt": "x"}]
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    with pytest.raises(BadRow, match="outside of the data's folder"):
        captions_of(folder / "saved")


@pytest.mark.parametrize("name", ["~nobody9/a.png", "a\0.png", "\ud800.png", "~a.png"])
def test_a_name_that_no_file_can_have_is_a_bad_row(folder, name):
    """It was a traceback, and `skip` did not skip it."""
    save(folder, "b.png")
    file = json_lines(folder / "a.jsonl", [{"image": "b.png", "prompt": "b"}, {"image": name, "prompt": "a"}])
    assert captions_of(file, on_bad_row="skip") == ["b"]


def test_a_column_that_some_rows_lack_is_missing_there_alone(folder):
    save(folder, "a.png", "b.png")
    file = json_lines(
        folder / "a.jsonl", [{"im": "a.png", "prompt": "a"}, {"prompt": "no image"}, {"im": "b.png", "prompt": "b"}]
    )
    assert captions_of(file, columns={"image": "im"}, on_bad_row="skip") == ["a", "b"]


def test_a_relative_folder_is_that_of_the_working_folder_of_now(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        monkeypatch.chdir(tmp_path / name)
        assert lies_in("file", ".")
