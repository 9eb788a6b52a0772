"""Small real files in the formats that preference data come in."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int = 0, size: tuple[int, int] = (8, 6)) -> Image.Image:
    """An image that differs from that of every other number below 4096."""
    return Image.new("RGB", size, (number * 37 % 256, number // 256 * 16, 255 - number * 11 % 256))


def encoded(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    picture(number, size).save(buffer, format=kind)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """An image whose bytes are many, so that cutting some off hurts."""
    return Image.effect_noise(size, 100).convert("RGB")


def save(folder: Path, *names: str) -> None:
    """An image of its own for each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number + 1).save(folder / name)


def json_lines(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def json_list(file: Path, rows: list) -> Path:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def parquet(file: Path, rows: list[dict], row_group_size: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file


def tar(file: Path, members: list[tuple[str, bytes | str | dict]], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            if isinstance(content, dict):
                content = json.dumps(content)
            if isinstance(content, str):
                content = content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file
