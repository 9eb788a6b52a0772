"""Reading preferences and captioned images: what is told beforehand, what is skipped and counted, what is lazy."""

from pathlib import Path

import pytest
from preference_files import encoded, json_lines, noise, parquet, picture, save, tar

from preference_data import rows as rows_module
from preference_data.images import BadRow
from preference_data.pairs import build_pairs, merge_votes
from preference_data.readers import read_captioned, read_preferences
from preference_data.records import Report
from preference_data.schemas import CaptionedImage


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "1.png", "2.png", "3.png")
    content = noise()
    content.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    return tmp_path


def pair(chosen="1.png", rejected="2.png", **others) -> dict:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, **others}


BAD = {
    "missing file": (pair(chosen="gone.png"), r"column 'chosen': the image .*gone\.png does not exist"),
    "broken image": (pair(chosen="cut.png"), r"column 'chosen': the image .*cut\.png is broken: "),
    "equal images": (pair(rejected="copy.png"), "column 'chosen': chosen and rejected are the same image"),
    "empty prompt": ({**pair(), "prompt": " "}, "column 'prompt': the prompt is empty"),
    "no prompt": ({"chosen": "1.png", "rejected": "2.png"}, "column 'prompt': expected text, found nothing"),
    "no image": (pair(chosen=None), "column 'chosen': there is no image"),
    "confidence": (pair(confidence=1.5), r"column 'confidence': 1\.5 is out of range: 0 to 1"),
    "margin": (pair(margin="x"), "column 'margin': expected a number, found 'x'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_an_error_or_is_skipped_and_counted(folder, kind):
    row, problem = BAD[kind]
    file = json_lines(folder / "a.jsonl", [pair(), row, pair("3.png")])
    with pytest.raises(BadRow, match=rf"a\.jsonl, row 1, {problem}"):
        list(read_preferences(file, verify_images=True))
    records = read_preferences(file, verify_images=True, on_bad_row="skip")
    for _ in range(2):  # every pass counts from the start
        assert [record.where.rpartition(" ")[2] for record in records] == ["0", "2"]
        assert (records.report.rows, records.report.records, records.report.bad) == (3, 2, 1)
        assert len(records.report.skipped) == 1 and "row 1, column" in records.report.skipped[0]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_first_row_is_told_at_the_call(folder, kind):
    row, problem = BAD[kind]
    file = json_lines(folder / "a.jsonl", [{"prompt": None, "chosen": None, "rejected": None, **row}, pair()])
    if kind == "broken image":  # which takes decoding
        read_preferences(file)
        return
    with pytest.raises(BadRow, match=rf"a\.jsonl, row 0, {problem}"):
        read_preferences(file)
    assert len(list(read_preferences(file, on_bad_row="skip"))) == 1


def test_a_broken_line_and_a_tar_cut_short_are_bad_rows(folder):
    file = json_lines(folder / "a.jsonl", [pair()])
    file.write_text(file.read_text() + "{broken\n" + file.read_text())
    with pytest.raises(BadRow, match=r"a\.jsonl, row 1: not JSON"):
        list(read_preferences(file))
    records = read_preferences(file, on_bad_row="skip")
    assert len(list(records)) == 2 and records.report.bad == 1

    members = []
    for name in "abc":
        members += [(f"{name}.chosen.png", encoded(1)), (f"{name}.rejected.png", encoded(2)), (f"{name}.txt", "p")]
    for shard in range(2):
        tar(folder / f"shards/s-{shard}.tar", members)
    first = folder / "shards/s-0.tar"
    first.write_bytes(first.read_bytes()[:-3500])
    with pytest.raises(BadRow, match=r"s-0\.tar: cut short or damaged after sample '[ab]', number [12]"):
        list(read_preferences(folder / "shards"))
    records = read_preferences(folder / "shards", on_bad_row="skip")
    assert 3 < len(list(records)) < 6 and records.report.bad == 1


def test_the_first_file_may_be_broken_where_bad_rows_are_skipped(folder):
    for shard in range(2):
        parquet(folder / f"p/part-{shard}.parquet", [pair(str(folder / "1.png"), str(folder / "2.png"))])
    (folder / "p/part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadRow, match=r"part-0\.parquet: no row can be read"):
        read_preferences(folder / "p")
    records = read_preferences(folder / "p", on_bad_row="skip")
    assert len(list(records)) == 1 and "part-0.parquet" in str(records.report)


def test_nothing_but_bad_rows_is_an_error(folder):
    (folder / "a.jsonl").write_text("{\n{\n")
    for on_bad_row in ("error", "skip"):
        with pytest.raises(BadRow, match=r"a\.jsonl, row 0: not JSON"):
            read_preferences(folder / "a.jsonl", on_bad_row=on_bad_row)


@pytest.mark.parametrize("read", [read_preferences, read_captioned])
def test_what_can_be_told_beforehand_is_told_at_the_call(folder, read):
    (folder / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        read(folder / "empty.jsonl")
    with pytest.raises(ValueError, match=r"unknown on_bad_row 'skipp'\. Did you mean 'skip'\?"):
        read(folder / "empty.jsonl", on_bad_row="skipp")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(folder / "gone.jsonl")
    file = json_lines(folder / "a.jsonl", [{"prompts": "p", "chosen": "1.png", "picture": "2.png"}])
    with pytest.raises(ValueError, match=r"a\.jsonl .*column"):
        read(file)
    with pytest.raises(FileNotFoundError, match="image_folder nowhere is not a folder"):
        read(json_lines(folder / "b.jsonl", [{**pair(), "image": "1.png"}]), image_folder="nowhere")


def test_images_may_lie_in_another_folder(folder, tmp_path):
    save(tmp_path / "elsewhere", "x.png", "y.png")
    file = json_lines(folder / "a.jsonl", [pair("x.png", "y.png")])
    (found,) = read_preferences(file, image_folder=tmp_path / "elsewhere")
    assert found.rejected.open().tobytes() == picture(2).tobytes()
    with pytest.raises(BadRow, match=rf"column 'chosen': the image {folder}/x\.png does not exist"):
        read_preferences(file)  # the first place it was looked for in


def test_the_folder_of_images_is_found_behind_a_bad_first_row(folder):
    save(folder, "images/x.png", "images/y.png")
    file = json_lines(folder / "a.jsonl", [pair("gone.png"), pair("x.png", "y.png")])
    assert len(list(read_preferences(file, on_bad_row="skip"))) == 1


def test_reading_is_lazy_and_can_be_repeated(folder, monkeypatch):
    rows = [pair(str(folder / "1.png"), str(folder / "2.png"), n=n) for n in range(50)]
    for shard in range(3):
        parquet(folder / f"p/part-{shard}.parquet", rows)
    opened = []
    plain = rows_module.pq.ParquetFile
    monkeypatch.setattr(rows_module.pq, "ParquetFile", lambda file, **o: opened.append(file.name) or plain(file, **o))
    records = read_preferences(folder / "p")
    assert set(opened) == {"part-0.parquet"}
    stream = iter(records)
    assert [next(stream).where.rpartition(" ")[2] for _ in range(50)][-1] == "49"
    assert set(opened) == {"part-0.parquet"} and records.report.rows == 50
    assert len(list(records)) == len(list(records)) == 150


def test_a_report_is_a_summary():
    report = Report("x", "pairs", rows=40, records=10, ties=2)
    for number in range(1005):
        report.skip(BadRow(f"x, row {number}", "broken"))
    lines = str(report).split("\n")
    assert lines[0] == "x (pairs): 40 rows, 10 records, 2 ties, 1005 bad rows skipped"
    assert lines[1] == "  x, row 0: broken" and lines[-1] == "  and 985 more"
    assert len(report.skipped) == 1000


# --- Captioned images ---


def captions(*arguments, **options) -> list[str]:
    records = read_captioned(*arguments, **options)
    found = list(records)
    assert all(isinstance(record, CaptionedImage) and record.image.open().mode == "RGB" for record in found)
    return [record.prompt for record in found]


@pytest.fixture
def style(tmp_path):
    save(tmp_path / "style", "a.png", "b.png", "sub/c.png")
    return tmp_path / "style"


def test_captions_beside_the_images(style):
    for name in ("a", "b", "sub/c"):
        (style / f"{name}.txt").write_text(f"the {name}\n")
    assert captions(style) == ["the a", "the b", "the sub/c"]
    assert captions(style, trigger="sks style")[0] == "sks style, the a"
    (style / "b.txt").unlink()
    with pytest.raises(BadRow, match=r"style/b\.png: the image has no caption: write b\.txt beside it, or set a trig"):
        read_captioned(style)
    assert captions(style, trigger="sks") == ["sks, the a", "sks", "sks, the sub/c"]
    records = read_captioned(style, on_bad_row="skip")
    assert [record.prompt for record in records] == ["the a", "the sub/c"]
    assert records.report.skipped[0].startswith(f"{style / 'b.png'}: the image has no caption")


def test_a_trigger_word_for_all(style):
    assert captions(style, trigger="sks") == ["sks"] * 3
    with pytest.raises(ValueError, match="the trigger word is empty"):
        read_captioned(style, trigger=" ")


def test_links_of_an_image_folder_may_lead_where_image_folder_says(style, tmp_path):
    save(tmp_path / "elsewhere", "d.png")
    (style / "d.png").symlink_to(tmp_path / "elsewhere" / "d.png")
    with pytest.raises(BadRow, match="outside of the data's folder"):
        captions(style, trigger="x")
    assert captions(style, trigger="x", image_folder=tmp_path) == ["x"] * 4


def test_an_empty_caption_is_named(style):
    for name in ("a", "b", "sub/c"):
        (style / f"{name}.txt").write_text("x" if name != "b" else " \n")
    with pytest.raises(BadRow, match=r"b\.png, column 'prompt': the prompt is empty"):
        captions(style)
    assert captions(style, trigger="sks") == ["sks, x", "sks", "sks, x"]


def test_captions_from_metadata(style):
    rows = [{"file_name": "a.png", "text": "ay"}, {"file_name": "sub/c.png", "text": "sea"}]
    json_lines(style / "metadata.jsonl", rows)
    records = read_captioned(style)
    with pytest.raises(BadRow, match=r"style/b\.png: the image has no caption"):
        list(records)
    assert captions(style, trigger="sks") == ["sks, ay", "sks, sea", "sks"]
    json_lines(style / "metadata.jsonl", [*rows, {"file_name": "b.png", "text": "bee"}])
    assert captions(style) == ["ay", "sea", "bee"]
    json_lines(style / "metadata.jsonl", [{"file_name": "a.png", "label": "x"}])
    with pytest.raises(ValueError, match=r"style has no column 'prompt'; it has \['image', 'file_name', 'label'\]"):
        read_captioned(style)


def test_metadata_that_names_a_missing_image(style):
    json_lines(style / "metadata.jsonl", [{"file_name": "gone.png", "text": "ay"}])
    with pytest.raises(BadRow, match=r"metadata\.jsonl, row 0, column 'image': the image .*gone\.png does not exist"):
        read_captioned(style)


def test_captions_from_tars_and_parquet(tmp_path):
    tar(tmp_path / "a.tar", [("x.jpg", encoded(1, "JPEG")), ("x.txt", "ex"), ("y.png", encoded(2)), ("y.txt", "why")])
    assert captions(tmp_path / "a.tar") == ["ex", "why"]
    parquet(tmp_path / "a.parquet", [{"image": {"bytes": encoded(1), "path": None}, "caption": "c"}])
    assert captions(tmp_path / "a.parquet") == ["c"]
    with pytest.raises(ValueError, match=r"a\.jsonl has no column 'image'; .* Did you mean to rename 'images'\?"):
        read_captioned(json_lines(tmp_path / "a.jsonl", [{"images": 1, "text": "x"}]))


def test_a_broken_captioned_image_is_found_on_the_way(style):
    (style / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    records = read_captioned(style, trigger="x", verify_images=True, on_bad_row="skip")
    assert len(list(records)) == 2 and "b.png is broken" in records.report.skipped[0]


# --- All rows, before anything else is loaded ---


@pytest.mark.parametrize("kind", ["missing file", "broken image", "empty prompt"])
def test_all_rows_are_checked_where_they_only_name_files(folder, kind):
    row, problem = BAD[kind]
    (folder / "cut.png").write_text("<html>404</html>")
    file = json_lines(folder / "a.jsonl", [pair(), pair(), row])
    with pytest.raises(BadRow, match=rf"a\.jsonl, row 2, {problem}"):
        read_preferences(file).check_files()
    skipping = read_preferences(file, on_bad_row="skip")
    skipping.check_files()
    assert skipping.report.rows == 0  # not read: there is nothing that it could raise
    json_lines(file, [pair(), pair()])
    read_preferences(file).check_files()


def test_checking_reads_no_more_than_headers(style, monkeypatch):
    for name in ("a", "b", "sub/c"):
        (style / f"{name}.txt").write_text("x")
    noise().save(style / "b.png")
    (style / "b.png").write_bytes((style / "b.png").read_bytes()[:2000])
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda file: pytest.fail(f"{file} was read as a whole"))
    read_captioned(style).check_files()  # cut short behind its header: known when it is decoded
    (style / "sub/c.png").write_text("no image")
    with pytest.raises(BadRow, match=r"c\.png, column 'image': the image .*c\.png is broken: cannot identify"):
        read_captioned(style).check_files()


@pytest.mark.parametrize("merge", [False, True])
def test_rows_that_only_name_files_are_parsed_once_between_the_command_line_and_the_encoding(
    folder, merge, monkeypatch
):
    """As align/cli/data.py and align/offline/latents.py call it: reading, checking, and iterating the pairs."""
    save(folder, "images/x.png", "images/y.png")
    file = json_lines(folder / "a.jsonl", [{**pair("x.png", "y.png"), "n": n} for n in range(50)])
    parsed, plain = [], rows_module.json.loads
    monkeypatch.setattr(rows_module.json, "loads", lambda text: parsed.append(text) or plain(text))
    records = read_preferences(file)  # finds format and image folder
    assert len(parsed) == 1
    records.check_files()
    assert len(parsed) == 1 + 50 and records.report.rows == records.report.records == 50
    pairs = build_pairs(merge_votes(build_pairs(records))) if merge else build_pairs(records)
    assert len(list(pairs)) == len(list(pairs)) == (1 if merge else 50)
    records.check_files()
    assert len(parsed) == 1 + 50 and records.report.rows == 50


def test_the_captions_of_an_image_folder_are_read_once(style, monkeypatch):
    for name in ("a", "b", "sub/c"):
        (style / f"{name}.txt").write_text(name)
    opened, plain = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **more: opened.append(path.name) or plain(path, **more))
    records = read_captioned(style)
    assert opened == ["a.txt"]
    records.check_files()
    assert [record.prompt for record in records] == [record.prompt for record in records] == ["a", "b", "sub/c"]
    assert opened == ["a.txt", "a.txt", "b.txt", "c.txt"]


def test_images_within_the_rows_are_not_read_twice(tmp_path):
    rows = [{"image": {"bytes": content, "path": None}, "caption": "c"} for content in (encoded(1), b"no image")]
    records = read_captioned(parquet(tmp_path / "a.parquet", rows))
    records.check_files()
    assert records.report.rows == 0
