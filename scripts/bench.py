"""Time the parts of a text-to-3D step: python scripts/bench.py scene_from=outputs/text_to_3d/a-red-teapot-seed0"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.objectives.options import ObjectiveOptions
    from distill.runtime.config import build
    from distill.runtime.machine import machine_facts, pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.teacher.latent import Teacher
    from sds3d.evaluation.timing import time_step
    from sds3d.export.export import scene_of_run
    from sds3d.scene.nerf import SceneOptions
    from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

    run = Run(build(RunOptions, config["run"], "run"), config, "bench")
    teacher = Teacher.load(config["teacher"], pick_device(config["run"]["device"]))
    objective = build(ObjectiveOptions, config["objective"], "objective")
    options = build(TextTo3dOptions, config["text_to_3d"], "text_to_3d")
    task = TextTo3d(run, teacher, build(SceneOptions, config["scene"], "scene"), objective, options)
    if config["scene_from"] is not None:
        task.scene.load_state_dict(scene_of_run(config["scene_from"]).state_dict())
    for timing in time_step(task, config["runs"]):
        print(f"{timing.part:42} {timing.median:8.1f} ms  ({timing.low:.1f} to {timing.high:.1f})")
    print(machine_facts())


if __name__ == "__main__":
    entry("bench", main)
