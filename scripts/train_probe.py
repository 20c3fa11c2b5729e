"""Train and save the probe: python scripts/train_probe.py data=outputs/shapes64"""

import json
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.control.conditions import silhouettes
    from distill.data.folders import load_split
    from distill.evaluation.fidelity import fidelity, means
    from distill.evaluation.probe import ProbeOptions, save_probe, train_probe
    from distill.runtime.config import build
    from distill.runtime.run import Run, RunOptions
    from sds3d.world.conditions import closeness, world_geometry, world_pictures

    options = build(ProbeOptions, config["probe"], "probe")
    train, test = (load_split(config["data"], split) for split in ("train", "test"))
    silhouettes(train)  # before a directory is claimed
    near = closeness(world_geometry(config["data"], "train", "depth", len(train)))
    pictures = world_pictures(config["data"], "test", "depth", test.rows)
    run = Run(build(RunOptions, config["run"], "run"), config, "probe")
    probe = train_probe(run, train, near, options)
    figures = means(fidelity("depth", test.composite(slice(None)), pictures, probe))
    save_probe(probe, run.directory / "probe", figures)
    run.finish(figures)
    print(json.dumps(figures, indent=2))
    print(f"written: {run.directory}/probe")


if __name__ == "__main__":
    entry("train_probe", main)
