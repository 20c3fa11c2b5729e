"""A data set of Hugging Face's `datasets`, from a local folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from PIL import Image

from distill.data.images import as_rgb
from distill.data.sources.source import SPLITS, ImageSource, Item, LazyImage
from distill.runtime.errors import UserError

PLAIN = (str, int, float, list, type(None))  # columns that are written to metadata.jsonl


@final
@dataclass(frozen=True)
class DatasetImage(LazyImage):
    """The image of a row, decoded when it is read."""

    rows: Any = field(repr=False, compare=False)  # a `datasets.Dataset`
    index: int
    column: str
    name: str

    def __str__(self) -> str:
        return self.name

    def load(self) -> Image.Image:
        """As of every lazy image."""
        try:
            return as_rgb(self.rows[self.index][self.column])
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.name} cannot be read as an image ({error})") from None


@final
@dataclass(frozen=True)
class HuggingFaceSource(ImageSource):
    """What `Dataset.save_to_disk` wrote, or a folder that `load_dataset` reads (Parquet, imagefolder)."""

    path: str
    image: str = "image"  # the column of the images
    text: str = "text"  # of the captions; a class label gives its name

    @property
    def licence(self) -> str:
        """As of every source."""
        return "the user's own files"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source. Raises `UserError` where `datasets` is not installed."""
        items = []
        for name, rows in load_local(self.path).items():
            names = rows.column_names
            missing = [column for column in (self.image, self.text) if column not in names]
            if missing:
                raise UserError(
                    f"{self.path} has no column {missing[0]!r}: its columns are {', '.join(names)}"
                )
            label = getattr(rows.features[self.text], "int2str", None)
            columns = rows.remove_columns(self.image)
            for index, row in enumerate(columns):
                text = row[self.text] if label is None else label(row[self.text])
                image = DatasetImage(rows, index, self.image, f"{self.path}:{name}:{index}")
                values = {key: value for key, value in row.items() if isinstance(value, PLAIN)}
                items.append(Item(image, {**values, "text": str(text)}, name if name in SPLITS else ""))
        return items


def load_local(path: str) -> dict[str, Any]:
    """The splits of a local data set by name. Raises `UserError` where there is none."""
    try:
        import datasets
    except ImportError:
        raise UserError("source=huggingface needs the package datasets: pip install datasets") from None
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is no folder: give one that save_to_disk wrote, or one of Parquet files")
    try:
        saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read by datasets ({str(error).splitlines()[0][:200]})") from None
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"all": loaded}
