"""Time the parts of a text-to-3D step.

python scripts/bench.py scene_from=outputs/text_to_3d/a-red-teapot-seed0
"""

from dataclasses import dataclass

from entry import entry

from distill.runtime.machine import machine_info
from sds3d.evaluation.timing import time_step
from sds3d.export.export import scene_of_run
from sds3d.text_to_3d.recipe import TextTo3dRecipe, start_text_to_3d


@dataclass(frozen=True, kw_only=True)
class Config(TextTo3dRecipe):
    """A text-to-3D run of which single steps are timed."""

    runs: int = 20  # repetitions of each part; the median is printed
    scene_from: str | None = None  # the directory of a run, whose scene is timed; null: the initial scene


def main(config: Config) -> None:
    trainer = start_text_to_3d(config)
    if config.scene_from is not None:
        trainer.scene.load_state_dict(scene_of_run(config.scene_from).state_dict())
    for timing in time_step(trainer, config.runs):
        print(f"{timing.name:42} {timing.median:8.1f} ms  ({timing.low:.1f} to {timing.high:.1f})")
    print(machine_info())


if __name__ == "__main__":
    entry("bench", Config, main)
