"""Writing sampled images as files to look at, in a folder that ``read_captioned`` and `datasets` read."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from preference_data.writer import agree_on_settings

METADATA = "metadata.jsonl"
_FILE_NAME = re.compile(r"(\d{6,})-(\d+)\.png")
#: Columns of the prompts that would mean something else beside the images.
_RESERVED = {"index", "prompt", "file_name", "image", "images", "scores"}


class ImageWriter:
    """A writer of each row's images, ``INDEX-NUMBER.png``, with a ``metadata.jsonl`` of their prompts and further columns.

    An image gets its name only when it is complete, and carries its prompt, so that a run that was stopped can be continued
    with another number of processes. The first process writes the metadata, of all images that are there, in :meth:`close`.
    """

    def __init__(
        self,
        folder: str | Path,
        rows: Sequence[Mapping[str, Any]],
        images_per_row: int,
        *,
        settings: Mapping[str, Any],
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Open a folder for writing; it is made if it does not exist.

        Args:
            rows: the prompts, in the order of their indices, with further columns.
            settings, shard: as for :class:`~preference_data.writer.RankedWriter`.

        Raises:
            ValueError: a folder that was written with other settings, or from other prompts, naming the first that differ.
        """
        self.folder = Path(folder).expanduser()
        self._rows, self._images_per_row, self._shard = rows, images_per_row, shard
        self.folder.mkdir(parents=True, exist_ok=True)
        agree_on_settings(self.folder, {**settings, "(columns)": "image, prompt"}, shard[0])
        for index, prompt in self._prompts().items():
            if index < len(rows) and rows[index]["prompt"] != prompt:
                raise ValueError(
                    f"{self.folder} was written from other prompts: its row {index} has {prompt!r:.80}, and the data "
                    f"{rows[index]['prompt']!r:.80}: use the same data, or another folder"
                )

    @property
    def done(self) -> frozenset[int]:
        """The indices of all rows whose images are all there, whichever process or run wrote them."""
        numbers: dict[int, int] = {}
        for index, number in self._images():
            if number < self._images_per_row:
                numbers[index] = numbers.get(index, 0) + 1
        return frozenset(index for index, count in numbers.items() if count == self._images_per_row)

    def write(self, index: int, images: Sequence[Image.Image]) -> None:
        """Write a row's images."""
        about = PngInfo()
        about.add_itxt("prompt", self._rows[index]["prompt"])
        for number, image in enumerate(images):
            target = self.folder / _name(index, number)
            partial = target.with_name(f".{target.name}.partial")
            with partial.open("wb") as file:
                image.save(file, format="PNG", pnginfo=about)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)

    def close(self) -> None:
        """Write the metadata, if this is the first process."""
        if self._shard[0]:
            return
        prompts, lines = self._prompts(), []
        for index, number in self._images():
            row = self._rows[index] if index < len(self._rows) else {}
            further = {name: value for name, value in row.items() if name not in _RESERVED}
            line = {"file_name": _name(index, number), "prompt": prompts[index]} | further
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        partial = self.folder / f".{METADATA}.partial"
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self.folder / METADATA)

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()  # also after an error: the images before it are good

    def _images(self) -> list[tuple[int, int]]:
        """List (index, number) of the images that are there, in order."""
        names = (_FILE_NAME.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def _prompts(self) -> dict[int, str]:
        """Return the prompt of every row that has an image."""
        prompts: dict[int, str] = {}
        for index, number in self._images():
            if index not in prompts:
                with Image.open(self.folder / _name(index, number)) as image:
                    prompts[index] = image.info.get("prompt", "")
        return prompts


def _name(index: int, number: int) -> str:
    return f"{index:06d}-{number}.png"
