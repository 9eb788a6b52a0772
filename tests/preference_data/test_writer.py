"""Writing ranked preferences: what comes back, what a crash leaves, how a run goes on, and several processes at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_files import encoded, noise, picture

from preference_data.readers import read_preferences
from preference_data.writer import SETTINGS, RankedWriter

ROOT = Path(__file__).parents[2]


def fill(writer, *indices):
    for index in indices:
        writer.write(index, f"prompt {index}", [picture(index), picture(index + 1)], [index, None])


def parts(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != SETTINGS)


def indices(folder) -> list[int]:
    return sorted(i for f in folder.glob("part-*.parquet") for i in pq.ParquetFile(f).read()["index"].to_pylist())


# --- What comes back ---


def test_what_is_written_is_read_back(tmp_path):
    picture_of_many_bytes = noise()
    with RankedWriter(tmp_path / "r", rewards=("shape", "colour"), columns={"seed": pa.int64()}) as writer:
        images = [picture_of_many_bytes, encoded(2, "JPEG")]
        rewards = {"shape": [0.5, None]}
        writer.write(7, "a prompt", images, [1.5, None], rewards=rewards, extra={"seed": 3})
        writer.write(3, "日本", [picture(3)], [-0.0])
    records = read_preferences(tmp_path / "r")
    first, second = records
    assert records.format == "ranked"
    assert (first.prompt, first.scores, second.prompt, second.scores) == ("a prompt", [1.5, None], "日本", [0.0])
    assert first.images[0].open().tobytes() == picture_of_many_bytes.tobytes()  # without loss
    assert first.images[1].read() == encoded(2, "JPEG")  # as it was given
    (file,) = (tmp_path / "r").glob("*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert (rows[0]["scores_shape"], rows[0]["scores_colour"], rows[0]["seed"]) == ([0.5, None], [None, None], 3)
    assert rows[1]["seed"] is None and rows[1]["images"][0]["path"] == "000003-0.png"


def test_stock_datasets_decodes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"spec": {"n": datasets.Value("int64")}, "tags": datasets.List(datasets.Value("string"))}
    )
    for shard in range(2):
        with RankedWriter(tmp_path / "r", shard=(shard, 2), rewards=("x",), columns=features.arrow_schema) as writer:
            scores = [1.0, None] if shard else [None, None]  # nothing but nulls in a whole file
            extra = {"spec": {"n": 3}, "tags": ["a"]} if shard else None
            writer.write(shard, "p", [picture(shard), picture(5)], scores, rewards={"x": scores}, extra=extra)
    files = sorted(map(str, (tmp_path / "r").glob("*.parquet")))
    data = datasets.load_dataset("parquet", data_files=files, split="train")
    assert data.features["images"] == datasets.List(datasets.Image())
    assert data["index"][:] == [0, 1] and data["scores"][:] == [[None, None], [1.0, None]]
    assert data[1]["images"][0].convert("RGB").tobytes() == picture(1).tobytes()
    assert data[1]["spec"] == {"n": 3} and data[1]["tags"] == ["a"] and data[1]["scores_x"] == [1.0, None]
    assert len(list(read_preferences(data))) == 2


# --- Files, crashes, going on ---


def test_files_are_written_as_they_fill(tmp_path):
    writer = RankedWriter(tmp_path, rows_per_file=2)
    fill(writer, 0)
    assert parts(tmp_path) == [] and writer.done == frozenset()
    fill(writer, 1, 2)
    assert parts(tmp_path) == ["part-00000-of-00001-000000.parquet"] and writer.done == {0, 1}
    writer.close()
    writer.close()
    assert parts(tmp_path)[1:] == ["part-00000-of-00001-000001.parquet"] and writer.done == {0, 1, 2}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    with RankedWriter(tmp_path, rows_per_file=2) as writer:
        fill(writer, 0, 1, 4)
    writer = RankedWriter(tmp_path, rows_per_file=2)
    assert writer.done == {0, 1, 4}
    with writer:
        fill(writer, *sorted(set(range(6)) - writer.done))
    assert indices(tmp_path) == [0, 1, 2, 3, 4, 5] and len(parts(tmp_path)) == 4


def test_a_run_goes_on_with_other_processes(tmp_path):
    for shard in range(3):
        with RankedWriter(tmp_path, shard=(shard, 3)) as writer:
            fill(writer, shard)
    for shard in range(2):
        writer = RankedWriter(tmp_path, shard=(shard, 2))
        assert writer.done == {0, 1, 2} | ({10} if shard else set())
        with writer:
            fill(writer, 10 + shard)
    assert indices(tmp_path) == [0, 1, 2, 10, 11]


def test_rows_before_an_error_are_kept(tmp_path):
    def interrupted():
        with RankedWriter(tmp_path) as writer:
            fill(writer, 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert RankedWriter(tmp_path).done == {0}


KILLED = """
    import os, signal, sys
    from PIL import Image
    import pyarrow.parquet as pq
    from preference_data.writer import RankedWriter

    writer = RankedWriter(sys.argv[1], rows_per_file=1)
    plain = pq.write_table

    def dies_halfway(table, file, **options):
        plain(table, file, **options)
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    for index in range(5):
        if index == 3:
            pq.write_table = dies_halfway
        writer.write(index, "p", [Image.new("RGB", (8, 8))], [1.0])
"""


def test_a_process_killed_while_it_writes_leaves_whole_files_only(tmp_path):
    code = textwrap.dedent(KILLED)
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = ".part-00000-of-00001-000003.parquet.partial"
    assert half in parts(tmp_path)
    assert len(list(read_preferences(tmp_path))) == 3  # a reader does not stumble over it
    writer = RankedWriter(tmp_path, rows_per_file=1)
    assert writer.done == {0, 1, 2} and half not in parts(tmp_path)
    with writer:
        fill(writer, 3, 4)
    assert indices(tmp_path) == [0, 1, 2, 3, 4]


def test_a_file_cut_short_afterwards_is_put_aside_and_made_again(tmp_path):
    with RankedWriter(tmp_path, rows_per_file=1) as writer:
        fill(writer, 0, 1)
    file = tmp_path / "part-00000-of-00001-000001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"part-00000-of-00001-000001\.parquet is broken .* kept as .*\.broken"):
        writer = RankedWriter(tmp_path, rows_per_file=1)
    assert writer.done == {0} and file.with_name(f"{file.name}.broken").is_file()
    with writer:
        fill(writer, 1)
    assert len(list(read_preferences(tmp_path))) == 2


def test_what_belongs_to_another_process_is_left_alone(tmp_path):
    RankedWriter(tmp_path, shard=(0, 2))
    for count in (2, 3):
        (tmp_path / f".part-00001-of-0000{count}-000000.parquet.partial").write_text("half")
    RankedWriter(tmp_path, shard=(0, 2))
    assert parts(tmp_path) == [".part-00001-of-00002-000000.parquet.partial"]  # that process may be at work on it
    RankedWriter(tmp_path, shard=(1, 2))
    assert parts(tmp_path) == []


def test_processes_write_side_by_side(tmp_path):
    code = """
    import sys
    from PIL import Image
    from preference_data.writer import RankedWriter

    shard, count = int(sys.argv[2]), 3
    with RankedWriter(sys.argv[1], shard=(shard, count), rows_per_file=2, settings={"seed": 1}) as writer:
        for index in range(shard, 12, count):
            writer.write(index, "p", [Image.new("RGB", (8, 8), (index, 0, 0))], [index])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    running = [subprocess.Popen([*command, str(shard)], cwd=ROOT) for shard in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert indices(tmp_path) == list(range(12))
    assert parts(tmp_path) == [f"part-0000{s}-of-00003-00000{n}.parquet" for s in range(3) for n in range(2)]


# --- Settings ---


def test_other_settings_are_an_error_that_names_them(tmp_path):
    RankedWriter(tmp_path, settings={"model": "tiny", "guidance": 4.0, "args": {"a": [1]}})
    RankedWriter(tmp_path, settings={"args": {"a": [1]}, "model": "tiny", "guidance": 4})
    for settings, message in (
        ({"model": "tiny", "guidance": 1.0, "args": {"a": [1]}}, r"written with guidance = 4.0, and this run has 1.0"),
        ({"model": "tiny", "args": {"a": [1]}}, "written with guidance = 4.0, and this run has None"),
        ({"model": "tiny", "guidance": 4.0, "args": {"a": [1]}, "lora": "x"}, "with lora = None, and this run has 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            RankedWriter(tmp_path, settings=settings)
    with pytest.raises(ValueError, match=r"written with \(columns\) = .*scores_x"):
        RankedWriter(tmp_path, settings={"model": "tiny", "guidance": 4.0, "args": {"a": [1]}}, rewards=("x",))


def test_a_row_of_another_prompt_is_named(tmp_path):
    with RankedWriter(tmp_path, rows_per_file=1) as writer:
        for index in range(3):
            writer.write(index, f"prompt {index}", [noise()], [1.0])
    again = RankedWriter(tmp_path)
    again.check_prompts([f"prompt {n}" for n in range(5)])  # more may come
    again.check_prompts(["prompt 0"])  # and fewer are asked for
    with pytest.raises(
        ValueError, match="its row 1 has 'prompt 1', and the data 'edited': use the same data, or another"
    ):
        again.check_prompts(["prompt 0", "edited", "prompt 2"])


def test_a_broken_settings_file_is_named(tmp_path):
    RankedWriter(tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["(version)"] == 1
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match=r"writer\.json cannot be read"):
        RankedWriter(tmp_path)


# --- What is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 0}, "row 0 was written before"),
        ({"prompt": " "}, "row 9: the prompt is empty"),
        ({"scores": [1]}, "row 9: 2 images have 1 scores"),
        ({"images": [], "scores": []}, "row 9: 0 images have 0 scores"),
        ({"scores": [1, float("nan")]}, "row 9: the score nan is not finite; use None"),
        ({"rewards": {"x": [1]}}, "row 9, x: 2 images have 1 scores"),
        ({"rewards": {"y": [1, 2]}}, r"row 9: unknown reward 'y'\. There are: x\."),
        ({"extra": {"z": 1}}, r"row 9: unknown column 'z'\. There are: seed\."),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path, change, message):
    writer = RankedWriter(tmp_path, rewards=("x",), columns={"seed": pa.int64()})
    fill(writer, 0)
    row = {"index": 9, "prompt": "p", "images": [picture(1), picture(2)], "scores": [1, 2], **change}
    with pytest.raises(ValueError, match=message):
        writer.write(**row)
    writer.close()
    assert indices(tmp_path) == [0]


def test_a_value_of_another_type_is_refused(tmp_path):
    columns = pa.schema([("seed", pa.int64()), ("spec", pa.struct([("n", pa.int64())]))])
    with RankedWriter(tmp_path, columns=columns) as writer:
        for extra, message in (
            ({"seed": "three"}, "row 0, column 'seed': 'three' is not of type int64"),
            ({"seed": 2**70}, "row 0, column 'seed': .* is not of type int64"),
            ({"spec": {"n": [1]}}, r"row 0, column 'spec': .* is not of type struct<n: int64>"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.write(0, "p", [picture(1)], [1], extra=extra)
        writer.write(0, "p", [picture(1)], [1], extra={"seed": 3})
    assert indices(tmp_path) == [0]


def test_wrong_arguments_are_refused(tmp_path):
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"shard {shard[0]} of {shard[1]} is out of range"):
            RankedWriter(tmp_path, shard=shard)
    with pytest.raises(ValueError, match="rows_per_file must be at least 1"):
        RankedWriter(tmp_path, rows_per_file=0)
    with pytest.raises(ValueError, match="two columns are called 'prompt'"):
        RankedWriter(tmp_path, columns={"prompt": pa.string()})
    assert os.listdir(tmp_path) == []
