"""Write the world of known meshes as a captioned image folder: python scripts/make_shapes.py output=outputs/shapes64"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.runtime.config import build
    from sds3d.world.world import WorldOptions, make_world

    make_world(config["output"], build(WorldOptions, config["world"], "world"), config["workers"])
    print(f"written: {config['output']}")


if __name__ == "__main__":
    entry("make_shapes", main)
