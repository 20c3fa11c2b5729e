"""Write the world of known meshes as a captioned image folder.

python scripts/make_shapes.py output=outputs/shapes64
51,000 images take 4 to 8 minutes on two cores.

With several views of each object and unnamed assemblies, for a teacher that is conditioned on cameras:
python scripts/make_shapes.py output=outputs/world64 world.views=8 world.train=160000 world.validation=800 \
    world.test=1600 world.assemblies=0.35 world.pairs=0.2
"""

from dataclasses import dataclass, field

from entry import entry

from sds3d.world.world import WorldOptions, make_world


@dataclass(frozen=True, kw_only=True)
class Config:
    """Renders of known meshes with captions."""

    output: str = "outputs/shapes64"
    workers: int = 2  # processes
    world: WorldOptions = field(default_factory=WorldOptions)


def main(config: Config) -> None:
    make_world(config.output, config.world, config.workers)
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("make_shapes", Config, main)
