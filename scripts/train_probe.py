"""Train and save the probe, which predicts silhouette and depth.

python scripts/train_probe.py data=outputs/shapes64
Its data needs geometry: python scripts/make_shapes.py world.geometry=true
"""

import json
from dataclasses import dataclass, field

from entry import entry

from distill.control.conditions import silhouettes
from distill.data.folders import load_split
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.probe import ProbeOptions, save_probe, train_probe
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher
from sds3d.world.conditions import geometry_images, nearness, world_geometry


@dataclass(frozen=True, kw_only=True)
class Config:
    """A network that predicts silhouette and depth from an image, to grade control fidelity."""

    run: RunOptions
    data: str = "outputs/shapes64"
    teacher: str | None = None  # whose samples it is to grade, recorded with it; null: any of such images
    probe: ProbeOptions = field(default_factory=ProbeOptions)


def main(config: Config) -> None:
    train, test = (load_split(config.data, split) for split in ("train", "test"))
    silhouettes(train)  # raises before a directory is claimed
    near = nearness(world_geometry(config.data, "train", "depth", len(train)))
    pictures = geometry_images(config.data, "test", "depth", test.rows)
    teacher = None if config.teacher is None else load_teacher(config.teacher)
    run = Run(config.run, as_mapping(config), "probe")
    probe = train_probe(run, train, near, config.probe)
    metrics = means(fidelity("depth", test.composite(slice(None)), pictures, probe))
    save_probe(probe, run.directory / "probe", metrics, None if teacher is None else teacher.identity)
    run.finish(metrics)
    print(json.dumps(metrics, indent=2))
    print(f"written: {run.directory}/probe")


if __name__ == "__main__":
    entry("train_probe", Config, main)
