"""Shards of WebDataset: tar files whose members with one name belong together, image, text and metadata."""

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from PIL import Image

from distill.data.images import SUFFIXES, decode_image
from distill.data.sources.source import DamagedImage, ImageSource, Item, LazyImage
from distill.runtime.errors import UserError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@final
@dataclass(frozen=True)
class TarImage(LazyImage):
    """A member of a shard, which is read where it lies in the file."""

    shard: Path
    name: str
    offset: int  # of its bytes
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def load(self) -> Image.Image:
        """As of every lazy image."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return decode_image(io.BytesIO(file.read(self.size)), str(self))


@final
@dataclass(frozen=True)
class ShardsSource(ImageSource):
    """Uncompressed tar files in WebDataset's convention: `0001.jpg`, `0001.txt` and `0001.json` are one
    sample.

    The caption is the .txt, else an entry of the .json, whose entries are the row's columns. A shard that
    cannot be read to its end counts as one damaged image.
    """

    shards: str  # a path with *, ? or a range: shards/{000..127}.tar
    text: str = "caption"  # the entry of the .json that is the caption, where there is no .txt

    @property
    def licence(self) -> str:
        """As of every source."""
        return "the user's own files"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source."""
        paths = shard_paths(self.shards)
        if not paths:
            raise UserError(
                f"{self.shards} names no file: expected tar files, such as shards/{{000..127}}.tar"
            )
        return [item for path in paths for item in self._read(path)]

    def _read(self, path: Path) -> Iterator[Item]:
        sample: dict[str, Any] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    stem, _, suffix = member.name.partition(".")
                    if stem != sample.get("key"):
                        yield from self._item(path, sample)
                        sample = {"key": stem}
                    suffix = f".{suffix.lower()}"
                    if suffix in SUFFIXES:
                        sample["image"] = TarImage(path, member.name, member.offset_data, member.size)
                    elif suffix in (".txt", ".json"):
                        content = archive.extractfile(member)
                        sample[suffix] = b"" if content is None else content.read()
        except (OSError, tarfile.TarError) as error:
            yield Item(DamagedImage(str(path), str(error)), {"text": ""})
            return
        yield from self._item(path, sample)

    def _item(self, path: Path, sample: dict[str, Any]) -> Iterator[Item]:
        """The item of a sample, if it has an image."""
        if "image" not in sample:
            return
        name = f"{path}:{sample['key']}"
        try:
            columns = json.loads(sample.get(".json", b"{}"))
            text = sample[".txt"].decode() if ".txt" in sample else columns[self.text]
            yield Item(sample["image"], {**columns, "text": str(text).strip()})
        except (ValueError, TypeError, KeyError) as error:
            reason = (
                f"no .txt, and no {self.text} in its .json" if isinstance(error, KeyError) else str(error)
            )
            yield Item(DamagedImage(name, reason), {"text": ""})


def shard_paths(pattern: str) -> list[Path]:
    """The files of a pattern with *, ? or one range {000..127}, in order."""
    match = RANGE.search(pattern)
    if match is None:
        return [Path(name) for name in sorted(glob.glob(pattern))]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [Path(pattern[: match.start()] + number + pattern[match.end() :]) for number in numbers]
