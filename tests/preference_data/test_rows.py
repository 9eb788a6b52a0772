"""Rows out of every kind of file, one at a time, and what is said of files that are broken somewhere."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_files import encoded, json_lines, json_list, noise, parquet, tar

from preference_data.digests import files_digest
from preference_data.images import BadRow
from preference_data.rows import READERS, Row, ending_of, read_rows, sample_row

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "日本 [ñ], {}", "n": 2}, {"prompt": "c", "n": None}]


def write(file, text) -> object:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def read(file) -> list:
    """Values of the rows and messages of the bad ones."""
    return [row.values if isinstance(row, Row) else str(row) for row in read_rows(file)]


def make(folder, ending):
    file = folder / f"a{ending}"
    if ending == ".parquet":
        return parquet(file, ROWS)
    if ending == ".jsonl":
        return json_lines(file, ROWS)
    if ending == ".json":
        return json_list(file, ROWS)
    if ending == ".csv":
        return write(file, 'prompt,n\na,1\n"日本 [ñ], {}",2\nc,\n')
    return tar(file, [(f"s{i}.json", row) for i, row in enumerate(ROWS)], "w" if ending == ".tar" else "w:gz")


@pytest.mark.parametrize("ending", READERS)
def test_every_kind_of_file_gives_its_rows(tmp_path, ending):
    file = make(tmp_path, ending)
    rows = list(read_rows(file))
    expected = [{**row, "n": row["n"] and str(row["n"])} for row in ROWS] if ending == ".csv" else ROWS
    assert [row.values for row in rows] == expected
    assert all(row.folder == tmp_path for row in rows)
    place = "sample 's2'" if ending in (".tar", ".tar.gz", ".tgz") else "row 2"
    assert rows[2].where == f"{file}, {place}"


def test_endings_are_known_by_their_longest_part(tmp_path):
    assert [ending_of(tmp_path / n) for n in ("a.TAR.GZ", "a.Parquet", "a.txt", "jsonl")] == [
        ".tar.gz",
        ".parquet",
        None,
        None,
    ]


# --- JSON ---


def test_a_broken_line_costs_only_itself(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"n": 1}\n{"n": \n\n[3]\n\xff\n{"n": 6}\n')
    first, cut, no_object, no_text, last = read(file)
    assert (first, last) == ({"n": 1}, {"n": 6})
    assert cut.startswith(f"{file}, row 1: not JSON: ")
    assert no_object == f"{file}, row 3: expected an object with columns, found list"
    assert no_text.startswith(f"{file}, row 4: not JSON: ") and "decode" in no_text


@pytest.mark.parametrize("text", ['[{"n": 1}, {"n": 2}]', '{"n": 1}\n{"n": 2}\n', '\ufeff [\n{"n": 1}\n,{"n": 2} ] \n'])
def test_a_json_file_is_a_list_or_lines(tmp_path, text):
    assert read(write(tmp_path / "a.json", text)) == [{"n": 1}, {"n": 2}]


def test_a_json_list_is_read_without_holding_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.rows._CHUNK", 7)  # every object, number and letter is cut somewhere
    rows = [{"prompt": "é" * n, "n": n * 1000, "deep": [{"x": [n, None, True]}]} for n in range(40)]
    assert read(json_list(tmp_path / "a.json", rows)) == rows


def test_a_json_list_cut_short_names_the_row(tmp_path):
    whole = json.dumps([{"n": n} for n in range(5)])
    for end in (len(whole) - 1, len(whole) - 2, len(whole) - 4, len(whole) - 9):
        file = write(tmp_path / "a.json", whole[:end])
        *good, bad = read(file)
        assert good == [{"n": n} for n in range(len(good))] and len(good) in (4, 5)
        assert bad.startswith(f"{file}, row {len(good)}: cut short or broken here")


def test_a_json_file_that_is_no_list_of_rows_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.rows._LONGEST_OBJECT", 50)
    monkeypatch.setattr("preference_data.rows._CHUNK", 20)
    assert "expected an object with columns, found str" in read(write(tmp_path / "a.json", '["a", "b"]'))[0]
    assert "cut short or broken" in read(write(tmp_path / "b.json", '{"n": "' + "a" * 500 + '"}'))[0]
    assert "not UTF-8" in read(write(tmp_path / "c.json", b'[{"n": 1}, \xff]'))[-1]


# --- CSV ---


def test_a_csv_whose_columns_cannot_be_told_apart_is_said_so(tmp_path):
    """Of two columns of one name the last was taken, without a word."""
    (said,) = read(write(tmp_path / "a.csv", "image,prompt,prompt\na.png,a cat,a dog\n"))
    assert said.endswith("a.csv, the first line: two columns are called 'prompt': only the last of them would be read")
    (said,) = read(write(tmp_path / "b.csv", "image;prompt\na.png;a cat\nb.png;a dog\n"))
    assert said.endswith("b.csv, the first line: its columns are separated by ';': write commas")
    assert len(read(write(tmp_path / "c.csv", "image,prompt,,\na.png,a cat,,\n"))) == 1  # as spreadsheets write it


def test_a_csv_that_breaks_names_the_row(tmp_path):
    assert "a.csv, row 1: more cells than columns" in read(write(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n4,5\n"))[1]
    assert "a.csv, row 1: not valid CSV from here on" in read(write(tmp_path / "a.csv", 'a,b\n1,2\n"3,4\n'))[1]
    assert "not valid CSV from here on" in read(write(tmp_path / "a.csv", b"a,b\n1,\xff\n"))[-1]


# --- Parquet ---


def test_a_parquet_file_cut_short_is_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", ROWS)
    content = file.read_bytes()
    for length in (len(content) - 4, len(content) // 2, 2):
        (message,) = read(write(file, content[:length]))
        assert message.startswith(f"{file}: no row can be read, the file is cut short or not parquet")


def test_a_damaged_row_group_costs_only_its_rows(tmp_path):
    rows = [{"prompt": f"{n} " + "x" * 2000 + str(n * 7919), "n": n} for n in range(6)]
    file = parquet(tmp_path / "a.parquet", rows)
    content = bytearray(file.read_bytes())
    middle = content.index(b"2 xxx")
    content[middle - 40 : middle + 10] = b"\xff" * 50
    found = read(write(file, bytes(content)))
    assert found[:2] == rows[:2] and found[-2:] == rows[4:]
    (message,) = found[2:-2]
    assert message.startswith(f"{file}, row 2: the rest of row group 1 cannot be read")


# --- Tars ---


def test_a_sample_is_what_has_one_key(tmp_path):
    members = [
        ("README", "not a sample"),
        ("x/a.jpg", encoded(1)),
        ("x/a.json", {"n": 1}),
        ("x/a.txt", " a caption\n"),
        ("y/a.jpg", encoded(2)),
        ("y/.hidden.jpg", encoded(3)),
        ("y/a.txt", "another"),
    ]
    rows = list(read_rows(tar(tmp_path / "a.tar", members)))
    assert [row.where for row in rows] == [f"{tmp_path / 'a.tar'}, sample {key!r}" for key in ("x/a", "y/a")]
    assert rows[0].values == {"image": encoded(1), "n": 1, "prompt": "a caption"}
    assert rows[1].values == {"image": encoded(2), "prompt": "another"}


def test_images_of_a_sample_are_named_or_numbered():
    numbered = {"10.png": b"k", "1.jpg": b"b", "0.jpg": b"a", "json": b'{"scores": [1, 2, 3]}', "cls": b"7"}
    row = sample_row("here", numbered, None)
    images = {"jpg_0": b"a", "jpg_1": b"b", "jpg_10": b"k"}
    assert row.values == {"images": [b"a", b"b", b"k"], **images, "scores": [1, 2, 3]}
    row = sample_row("here", {"chosen.png": b"a", "rejected.WEBP": b"b", "txt": b"a prompt"}, None)
    assert row.values == {"chosen": b"a", "rejected": b"b", "prompt": "a prompt"}


def test_a_prompt_in_the_json_comes_before_the_text():
    assert sample_row("here", {"txt": b"a", "json": b'{"prompt": "b"}'}, None).values == {"prompt": "b"}


@pytest.mark.parametrize("parts", [{"json": b"[1]"}, {"json": b"{"}, {"json": b"\xff"}, {"txt": b"\xff"}])
def test_a_sample_that_cannot_be_read_is_bad(parts):
    row = sample_row("a.tar, sample 'x'", parts, None)
    assert isinstance(row, BadRow) and str(row).startswith("a.tar, sample 'x': its ")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_link_in_a_tar_costs_only_itself(tmp_path, kind, mode):
    """All samples after it were lost, and a link that leads nowhere ended the digest of the data in a traceback."""
    file = tmp_path / ("a.tar" if mode == "w" else "a.tgz")
    with tarfile.open(file, mode) as archive:
        for name in ("a", "link", "b"):
            member = tarfile.TarInfo(f"{name}.png")
            if name == "link":
                member.type, member.linkname = kind, "elsewhere.png"
            member.size = 0 if name == "link" else len(encoded(1))
            archive.addfile(member, io.BytesIO(encoded(1)))
            text = tarfile.TarInfo(f"{name}.txt")
            text.size = 3
            archive.addfile(text, io.BytesIO(b"one"))
    found = read(file)
    assert [row for row in found if isinstance(row, dict) and "image" in row] == [
        {"image": encoded(1), "prompt": "one"}
    ] * 2
    assert f"{file}, member 'link.png': it is a link: pack the file itself (tar -h --hard-dereference)" in found
    assert files_digest([file]).startswith("1 files, ")


def test_texts_of_a_sample_may_have_endings_in_capitals():
    """As images may: the caption was left out, and an image with a trigger word was trained on without it."""
    row = sample_row("here", {"PNG": b"a", "TXT": b"a cat", "Json": b'{"n": 1}'}, None)
    assert row.values == {"image": b"a", "prompt": "a cat", "n": 1} and row.caption_from == ".txt"


def shards(tmp_path, ending, mode):
    members = []
    for number in range(4):
        noise().save(tmp_path / "n.png")
        members += [(f"s{number}.png", (tmp_path / "n.png").read_bytes()), (f"s{number}.json", {"n": number})]
    return tar(tmp_path / f"a{ending}", members, mode)


@pytest.mark.parametrize(("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_a_tar_cut_short_names_the_last_good_sample(tmp_path, ending, mode):
    file = shards(tmp_path, ending, mode)
    content = file.read_bytes()
    assert [row["n"] for row in read(file)] == [0, 1, 2, 3]
    if mode == "w":
        with tarfile.open(file) as archive:
            last = archive.getmembers()[-1]
        lengths = range(600, last.offset_data + last.size, 64)  # behind it stands nothing but the end's zeros
    else:
        lengths = range(600, int(len(content) * 0.9), 7)
    seen = set()
    for length in lengths:
        *good, message = read(write(file, content[:length]))
        seen.add(len(good))
        assert [row["n"] for row in good] == list(range(len(good))) and len(good) < 4, length
        if not good:
            assert "before the first sample" in message
            continue
        assert message.startswith(f"{file}: cut short or damaged after sample 's{len(good) - 1}', number {len(good)}:")
    assert seen >= {1, 2, 3}


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    """There `tarfile` itself sees the end of the archive."""
    file = shards(tmp_path, ".tar", "w")
    content = file.read_bytes()
    at = content.index(b"s2.json")
    for end in (at, at + 100):  # right before a header, and within one
        *good, message = read(write(file, content[:end]))
        assert [row["n"] for row in good] == [0, 1] and "after sample 's1', number 2:" in message


def test_a_damaged_header_is_no_end_of_the_archive(tmp_path):
    file = shards(tmp_path, ".tar", "w")
    content = bytearray(file.read_bytes())
    at = content.index(b"s2.json")
    content[at : at + 300] = b"\x07" * 300
    assert "after sample 's1'" in read(write(file, bytes(content)))[-1]


def test_what_is_no_tar_at_all_is_named(tmp_path):
    (message,) = read(write(tmp_path / "a.tar", "text" * 400))
    assert message.startswith(f"{tmp_path / 'a.tar'}: cut short or damaged before the first sample")


@pytest.mark.parametrize("ending", READERS)
def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path, ending):
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / f"gone{ending}"))


# --- What a few bytes unpack to ---


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_row_nested_too_deep_is_bad_and_no_traceback(tmp_path, ending):
    deep = "[" * 200_000 + "]" * 200_000
    file = write(tmp_path / f"a{ending}", f'{{"n": 1}}\n{{"n": {deep}}}\n{{"n": 2}}\n')
    found = read(file)
    assert found[0] == {"n": 1} and "row 1: not JSON" in found[1]


def test_a_sample_nested_too_deep_is_bad(tmp_path):
    (message,) = read(tar(tmp_path / "a.tar", [("s.json", "[" * 200_000 + "]" * 200_000)]))
    assert "its text or json cannot be read" in message


def test_a_tar_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.rows._LARGEST_SAMPLE", 1 << 20)
    good = ("a.json", {"n": 1})
    (first, message) = read(tar(tmp_path / "a.tar.gz", [good, ("b.png", b"\0" * (1 << 21)), ("c.json", {})], "w:gz"))
    assert first == {"n": 1} and "b.png has 2097152 bytes: a sample has at most 1048576" in message


def test_a_parquet_file_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.rows._LARGE_GROUP", 1 << 20)
    table = pa.table({"image": [b"\0" * (1 << 22)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    (message,) = read(tmp_path / "a.parquet")
    assert "row 0: row group 0 unpacks " in message


def test_a_line_without_end_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr("preference_data.rows._LONGEST_OBJECT", 1 << 12)
    found = read(write(tmp_path / "a.jsonl", '{"n": 1}\n' + "x" * 10_000))
    assert found[0] == {"n": 1} and "is no row" in found[1] and len(found) == 2


def test_every_format_of_image_is_a_member_of_a_sample(tmp_path):
    members = [(f"{n}.{ending}", b"x") for n, ending in enumerate(("avif", "jfif", "JP2", "ppm", "tga"))]
    assert all(row == {"image": b"x"} for row in read(tar(tmp_path / "a.tar", members)))
