"""Drawn faces with known attributes, in CelebA's format: npm's @dicebear/avataaars, run by Node.js."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from distill.data.sources.attributes import AttributesSource
from distill.data.sources.npm import fetch_package
from distill.data.sources.source import ImageSource, Item
from distill.runtime.errors import UserError

CORE = ("@dicebear/core", "9.4.3")
STYLE = ("@dicebear/avataaars", "9.4.3")
RENDERER = ("@resvg/resvg-wasm", "2.6.2")
SCRIPT = Path(__file__).with_suffix(".mjs")


@final
@dataclass(frozen=True)
class FacesSource(ImageSource):
    """Faces whose attributes are drawn at random, as PNGs and a table that `AttributesSource` reads.

    The only source whose packages are run (by `node`), not only read.
    """

    count: int = 6000
    side: int = 64  # pixels
    seed: int = 0
    prefix: str = "Photo of person"

    def __post_init__(self) -> None:
        if self.count < 1 or self.side < 16:
            raise UserError(f"count={self.count} and side={self.side}: expected at least 1 face of 16 pixels")

    @property
    def licence(self) -> str:
        """As of every source."""
        return (
            "faces: free for personal and commercial use (Pablo Stanley, avataaars.com); code: MIT, MPL-2.0"
        )

    def items(self, cache: Path) -> Sequence[Item]:
        """As of every source. Raises `UserError` where Node.js is not installed, or fails."""
        output = cache / f"faces-{self.count}-{self.side}-{self.seed}"
        if not (output / "table.csv").is_file():
            self._draw(cache, output)
        return AttributesSource(str(output / "table.csv"), str(output / "images"), prefix=self.prefix).items(
            cache
        )

    def _draw(self, cache: Path, output: Path) -> None:
        node = shutil.which("node")
        if node is None:
            raise UserError("faces are drawn by Node.js, which is not installed: install it (nodejs.org)")
        packages = [fetch_package(*package, cache).absolute() for package in (CORE, STYLE, RENDERER)]
        # where Node.js looks for what another package imports
        shutil.copytree(packages[0], cache / "node_modules" / CORE[0], dirs_exist_ok=True)
        print(f"drawing {self.count} faces into {output}, once")
        options = [str(output.absolute()), *map(str, (self.count, self.side, self.seed))]
        command = [node, str(SCRIPT), *map(str, packages), *options]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = next(
                (line for line in result.stderr.splitlines() if "Error" in line), result.stderr[:200]
            )
            raise UserError(
                f"Node.js cannot draw the faces ({reason.strip()}): version 18 or newer is needed"
            )
