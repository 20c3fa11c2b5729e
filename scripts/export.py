"""Export a run's scene again.

python scripts/export.py run_directory=outputs/text_to_3d/a-red-teapot-seed0 export.fps=12
"""

import json
from dataclasses import dataclass, field

from entry import entry

from sds3d.export.export import ExportOptions, export_scene, scene_of_run


@dataclass(frozen=True, kw_only=True)
class Config:
    """A scene and what is written of it."""

    run_directory: str  # of a text_to_3d run, finished or not
    output: str | None = None  # null: the run's directory
    device: str = "auto"  # auto: cuda when there is one
    export: ExportOptions = field(default_factory=ExportOptions)


def main(config: Config) -> None:
    scene = scene_of_run(config.run_directory, config.device)
    folder = config.output or config.run_directory
    print(json.dumps(export_scene(scene, folder, config.export), indent=2))
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("export", Config, main)
