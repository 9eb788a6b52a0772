"""A digest tells a data set from another by its content, not by its place."""

import dataclasses
import shutil
import warnings

import pytest
from datasets import Dataset
from PIL import Image
from preference_files import json_lines, noise, parquet, tar

from preference_data.digests import data_digest
from preference_data.images import ImageSource
from preference_data.pairs import build_pairs, merge_votes
from preference_data.readers import read_captioned, read_preferences
from preference_data.schemas import CaptionedImage


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(made / f"{number}.bmp")
        (made / f"{number}.txt").write_text(f"caption {number}")
    return made


def test_a_folder_elsewhere_is_the_same_and_an_edited_one_is_not(folder, tmp_path):
    before = data_digest(read_captioned(str(folder)))
    assert before.startswith("3 records, ")
    assert before == data_digest(read_captioned(str(shutil.copytree(folder, tmp_path / "elsewhere"))))
    assert before != data_digest(read_captioned(str(folder), trigger="mystyle"))
    Image.new("RGB", (8, 8), (9, 0, 0)).save(folder / "1.bmp")  # of the same length
    repainted = data_digest(read_captioned(str(folder)))
    (folder / "1.txt").write_text("caption X")
    assert len({before, repainted, data_digest(read_captioned(str(folder)))}) == 3


def test_a_pass_that_was_made_already_and_bad_rows_that_are_skipped_change_nothing(folder):
    checked, skipping = read_captioned(str(folder)), read_captioned(str(folder), on_bad_row="skip")
    checked.check_files()
    assert data_digest(checked) == data_digest(skipping) == data_digest(list(read_captioned(str(folder))))


def test_an_image_that_a_parquet_file_names_by_its_path_is_looked_at(folder):
    file = parquet(folder / "t.parquet", [{"image": f"{n}.bmp", "prompt": f"caption {n}"} for n in range(3)])
    records = read_captioned(str(file))
    list(records)
    counted, before = str(records.report), data_digest(records)
    assert str(records.report) == counted and before == data_digest(read_captioned(str(file)))
    Image.new("RGB", (8, 8), (9, 0, 0)).save(folder / "1.bmp")  # of the same length
    assert before != data_digest(read_captioned(str(file)))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_files_that_hold_their_images_are_looked_at(tmp_path, kind):
    def write(name, captions):
        content = noise()
        content.save(tmp_path / "n.png")
        encoded = (tmp_path / "n.png").read_bytes()
        if kind == "parquet":
            return parquet(tmp_path / name, [{"image": encoded, "prompt": caption} for caption in captions])
        members = [
            (f"{n}.{end}", value)
            for n, c in enumerate(captions)
            for end, value in (("png", encoded), ("txt", c.encode()))
        ]
        return tar(tmp_path / name, members, "w")

    first = write(f"a.{kind}", ["one", "two"])
    same = shutil.copy(first, tmp_path / f"b.{kind}")
    # Its images differ too; another caption alone is told below.
    other = write(f"c.{kind}", ["one", "six"])
    digests = [data_digest(read_captioned(str(file))) for file in (first, same, other)]
    assert digests[0] == digests[1] != digests[2] and digests[0].startswith("1 files, ")


def test_of_a_long_file_the_length_and_some_places_are_looked_at(tmp_path):
    content = bytearray(range(256)) * 4000
    looks = set()
    for at in (None, 0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        if at is not None:
            changed[max(0, at - 80_000) : at + 80_000] = bytes(len(changed[max(0, at - 80_000) : at + 80_000]))
        (tmp_path / "f").write_bytes(changed)
        looks.add(ImageSource("x", path=tmp_path / "f").looked_at())
        assert ImageSource("x", data=bytes(changed)).looked_at() in looks
    assert len(looks) == 4


def test_preferences_are_told_by_their_verdict(tmp_path):
    for name in "ab":
        noise().save(tmp_path / f"{name}.png")
    rows = [{"prompt": "p", "chosen": "a.png", "rejected": "b.png", "margin": 1.0}]
    first = read_preferences(str(json_lines(tmp_path / "1.jsonl", rows)))
    swapped = read_preferences(
        str(json_lines(tmp_path / "2.jsonl", [rows[0] | {"chosen": "b.png", "rejected": "a.png"}]))
    )
    margin = read_preferences(str(json_lines(tmp_path / "3.jsonl", [rows[0] | {"margin": 2.0}])))
    assert len({data_digest(data) for data in (first, swapped, margin)}) == 3
    assert data_digest(first) == data_digest(build_pairs(first)) == data_digest(merge_votes(build_pairs(first)))


def test_prompts_are_told_by_every_column(monkeypatch):
    rows = {"prompt": [f"p{n}" for n in range(600)], "n": list(range(600))}
    first = data_digest(Dataset.from_dict(rows))
    assert first.startswith("600 rows, ") and first == data_digest(Dataset.from_dict(rows))
    assert first != data_digest(Dataset.from_dict(rows | {"n": [*range(599), 0]}))
    assert first != data_digest(Dataset.from_dict(rows).rename_column("n", "m"))
    monkeypatch.setattr("preference_data.digests._LARGE_TABLE", 10)
    sampled = data_digest(Dataset.from_dict(rows))
    assert sampled != first and sampled == data_digest(Dataset.from_dict(rows))


def test_what_cannot_be_known_is_not_guessed():
    image = Image.new("RGB", (4, 4))
    item = CaptionedImage("a", ImageSource.of(image, "here"))
    assert data_digest(item for _ in range(2)) is None and data_digest([1, 2]) is None
    assert data_digest([item]) == data_digest([dataclasses.replace(item, where="elsewhere")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert data_digest(Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()) is None


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_an_edited_caption_in_a_file_full_of_images_is_noticed(tmp_path, kind):
    """A tar is filled up to whole blocks: its length says nothing."""
    pictures = [noise((96, 96)) for _ in range(12)]
    for picture in pictures:
        picture.save(tmp_path / f"{pictures.index(picture)}.png")
    contents = [(tmp_path / f"{n}.png").read_bytes() for n in range(12)]

    def write(name, word):
        captions = [f"{n} {word if n == 7 else 'cat'}" for n in range(12)]
        if kind == "parquet":
            return parquet(
                tmp_path / name, [{"image": i, "prompt": c} for i, c in zip(contents, captions, strict=True)]
            )
        pairs = enumerate(zip(contents, captions, strict=True))
        members = [member for n, (i, c) in pairs for member in ((f"{n}.png", i), (f"{n}.txt", c))]
        return tar(tmp_path / name, members, "w:gz" if kind == "tar.gz" else "w")

    digests = [data_digest(read_captioned(str(write(f"{n}.{kind}", word)))) for n, word in enumerate(("cat", "dog"))]
    assert digests[0] != digests[1]


def test_every_text_of_a_large_table_counts(monkeypatch):
    monkeypatch.setattr("preference_data.digests._LARGE_TABLE", 10)
    rows = {"prompt": [f"p{n}" for n in range(600)]}
    assert data_digest(Dataset.from_dict(rows)) != data_digest(
        Dataset.from_dict({"prompt": ["p0", "p1", "p2", "x", *rows["prompt"][4:]]})
    )
