"""A folder of images with a table of attributes that each has or has not, as CelebA's."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from distill.data.sources.source import ImageSource, Item
from distill.runtime.errors import UserError

PRESENT, ABSENT = ("1", "1.0"), ("-1", "-1.0", "0", "0.0")


@final
@dataclass(frozen=True)
class AttributesSource(ImageSource):
    """Images and a CSV: file names, then a column of 1 and -1 (or 0) an attribute.

    Rows: `text`, the attributes that are present after `prefix`, and `attributes`, each true or false.
    """

    table: str  # such as CelebA's list_attr_celeba.csv
    images: str  # the folder of the files that it names
    column: str | None = None  # of the file names; null: the first
    attributes: tuple[str, ...] = ()  # columns that are used; (): all others
    prefix: str = "Photo of person"

    @property
    def licence(self) -> str:
        """As of every source."""
        return "the user's own files"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source."""
        path = Path(self.table)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, skipinitialspace=True)
                columns, rows = list(reader.fieldnames or ()), list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read ({error}): give a CSV file") from None
        if not rows:
            raise UserError(f"{path} has no rows: expected a header, and a row an image")
        column = self.column or columns[0]
        names = self.attributes or tuple(name for name in columns if name != column)
        for name in (column, *names):
            if name not in columns:
                raise UserError(f"{path} has no column {name!r}: its columns are {', '.join(columns)}")
        folder = Path(self.images)
        return [
            self._item(folder, row, column, names, f"{path}:{number}") for number, row in enumerate(rows, 2)
        ]

    def _item(self, folder: Path, row: dict[str, str], column: str, names: Sequence[str], line: str) -> Item:
        present = {}
        for name in names:
            value = (row[name] or "").strip()
            if value not in (*PRESENT, *ABSENT):
                raise UserError(f"{line}: {name} is {value!r}: expected 1, or -1 or 0")
            present[name] = value in PRESENT
        words = [name.replace("_", " ").lower() for name, given in present.items() if given]
        text = f"{self.prefix} {', '.join(words)}".strip()
        return Item(folder / row[column], {"text": text, "attributes": present})
