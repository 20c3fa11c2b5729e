"""Emoji by artists, with names, groups and keywords: npm's fluent-emoji-3d, unicode-emoji-json, emojilib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from distill.data.sources.npm import fetch_package
from distill.data.sources.source import ImageSource, Item
from distill.runtime.errors import UserError
from distill.runtime.files import read_json

IMAGES = ("@lobehub/fluent-emoji-3d", "1.1.0")  # 256x256 WebP with transparency
NAMES = ("unicode-emoji-json", "0.9.0")
KEYWORDS = ("emojilib", "4.0.3")
VARIATION = "fe0f"  # a code point that only asks for the picture in place of the letter


@final
@dataclass(frozen=True)
class EmojiSource(ImageSource):
    """Rows: `text` (the name), `keywords`, `group`, and `context`, 1 for the group's among `groups`."""

    groups: tuple[str, ...] = ()  # of Unicode, such as Food & Drink; (): all

    @property
    def licence(self) -> str:
        """As of every source."""
        return "MIT (images: Microsoft's Fluent Emoji, npm @lobehub/fluent-emoji-3d; names: MIT)"

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source: those that have a picture, without skin tones."""
        folder = fetch_package(*IMAGES, cache) / "assets"
        named = read_json(fetch_package(*NAMES, cache) / "data-by-emoji.json")
        keywords = read_json(fetch_package(*KEYWORDS, cache) / "dist" / "emoji-en-US.json")
        categories = tuple(dict.fromkeys(facts["group"] for facts in named.values()))
        unknown = [group for group in self.groups if group not in categories]
        if unknown:
            raise UserError(f"groups has {unknown[0]!r}: expected some of {', '.join(categories)}")
        chosen = self.groups or categories
        items = []
        for emoji, facts in named.items():
            path = picture_path(folder, emoji)
            if path is None or facts["group"] not in chosen:
                continue
            row = {
                "text": facts["name"],
                "keywords": [word.replace("_", " ") for word in keywords.get(emoji, [])],
                "group": facts["group"],
                "context": {group: float(facts["group"] == group) for group in chosen},
            }
            items.append(Item(path, row))
        return items


def picture_path(folder: Path, emoji: str) -> Path | None:
    """The file named by an emoji's code points, with or without the variation; None where there is none."""
    codes = [f"{ord(letter):04x}" for letter in emoji]
    plain = [code for code in codes if code != VARIATION]
    for name in (codes, plain, [*plain, VARIATION]):
        path = folder / f"{'-'.join(name)}.webp"
        if path.is_file():
            return path
    return None
