"""Export a run's scene again: python scripts/export.py run_directory=outputs/text_to_3d/a-red-teapot-seed0 export.mesh.resolution=192"""

import json
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.runtime.config import build
    from sds3d.export.export import ExportOptions, export_scene, scene_of_run

    options = build(ExportOptions, config["export"], "export")
    scene = scene_of_run(config["run_directory"], config["device"])
    folder = config["output"] or config["run_directory"]
    print(json.dumps(export_scene(scene, folder, options), indent=2))
    print(f"written: {folder}")


if __name__ == "__main__":
    entry("export", main)
