"""The account of a data set: nobody should have to guess what was trained on."""

import pytest
from PIL import Image
from preference_files import json_lines, save

from preference_data.account import Account
from preference_data.buckets import make_buckets, nearest_bucket
from preference_data.images import ImageSource
from preference_data.pairs import build_pairs
from preference_data.readers import read_captioned, read_preferences

BUCKETS = make_buckets(64, 16, 2.0)


def account_of(data, resolution=64) -> Account:
    account, files = Account("data"), []
    for record in data:
        images = record.sources()
        files += [image.path for image in images]
        account.add(getattr(record, "origin", ""), images, nearest_bucket(*images[0].size(), BUCKETS))
    account.leave_out_of(data, files)
    return account


def test_what_becomes_of_the_images_is_said_in_numbers():
    account = Account("data")
    for size, colour in (
        ((64, 64), "red"),
        ((128, 64), "red"),
        ((256, 64), "blue"),
        ((32, 32), "red"),
        ((64, 64), "red"),
    ):
        image = ImageSource("here", picture=Image.new("RGB", size, colour))
        account.add("", [image], nearest_bucket(*size, BUCKETS))
    # 128 x 64 goes to 96 x 48, the whole of it; 256 x 64 to the same: half of its 16384 of 4096 + 8192 + 16384 + 1024 +
    # 4096 pixels is cropped away. 32 x 32 is enlarged to twice its side.
    assert account.lines() == [
        "data: 5",
        "captions from a column: 5",
        "trained at (width x height) 96x48: 2, 64x64: 3",
        "24.2% of the pixels are cropped away; 1 images lose more than 20%",
        "1 images are enlarged, the smallest 2.0 times",
        "1 images are the same as an earlier one",
    ]


def test_every_image_of_a_pair_is_counted():
    """Only the chosen ones were: three quarters of each rejected one went unnoticed."""
    account = Account("data")
    pair = [ImageSource("here", picture=Image.new("RGB", size)) for size in ((64, 64), (256, 64))]
    account.add("", pair, nearest_bucket(64, 64, BUCKETS))
    assert account.lines()[0] == "data: 1 (2 images, 2 different ones)" and account.much_cropped == 1
    assert account.cropped == pytest.approx(0.75 * 256 * 64)


def test_texts_that_are_cut_are_counted():
    account = Account("data")
    for length in (5, 512, 513, 1418):
        account.count_tokens(length, 512)
    assert (
        "2 texts are longer than the 512 tokens that are read, the longest 1418: what comes after has no effect"
        in account.lines()
    )


def test_captions_are_told_by_where_they_stand(tmp_path):
    save(tmp_path, "a.png", "b.png", "c.png", "d.png")
    json_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "prompt": "a"}])
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text(" ")
    account = account_of(read_captioned(tmp_path, trigger="sks"))
    assert account.captions == {"metadata.jsonl": 1, ".txt": 1, "the trigger alone": 2}


def test_files_that_are_left_out_are_named_with_the_reason(tmp_path):
    save(tmp_path, "a.png", "sub/b.png")
    for name in ("a.txt", "sub/b.txt", "settings.json", "c.heic", "sub/d.HEIC", ".hidden.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    account = account_of(read_captioned(tmp_path))
    assert account.examples == 2 and account.left_out == {
        ".heic is not read": 2, "its rows are no images with captions": 1, "a link to a folder": 1,
    }  # fmt: skip
    assert f"left out, .heic is not read: 2 ({tmp_path / 'c.heic'}, {tmp_path / 'sub/d.HEIC'})" in account.lines()


def test_images_that_no_row_names_are_left_out(tmp_path):
    save(tmp_path, "images/a.png", "images/b.png", "other/c.png")
    file = json_lines(tmp_path / "rows.jsonl", [{"image": "images/a.png", "prompt": "a"}])
    assert account_of(read_captioned(file)).left_out == {"no row names it": 1}


def test_pairs_that_are_not_trained_on_are_counted_by_the_reason(tmp_path):
    save(tmp_path, "0.png", "1.png")
    row = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    rows = [row | {"margin": margin} for margin in (0.0, 0.1, 2.0)] + [row | {"prompt": ""}]
    data = build_pairs(read_preferences(json_lines(tmp_path / "r.jsonl", rows), on_bad_row="skip"), min_margin=1.0)
    account = account_of(data)
    assert account.left_out == {"pairs: ties": 1, "pairs: below margin": 1, "bad rows": 1}
    assert any(line.startswith("left out, bad rows: 1 (") and "the prompt is empty" in line for line in account.lines())
