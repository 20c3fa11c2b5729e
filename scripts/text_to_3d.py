"""A sentence to a mesh and a turntable: python scripts/text_to_3d.py prompt="a red teapot" """

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.objectives.options import ObjectiveOptions
    from distill.runtime.config import build
    from distill.runtime.machine import pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.teacher.latent import Teacher
    from sds3d.export.export import ExportOptions, finish
    from sds3d.scene.nerf import SceneOptions
    from sds3d.text_to_3d.mesh_control import MeshControl, MeshControlOptions
    from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs

    options = build(TextTo3dOptions, config["text_to_3d"], "text_to_3d")
    shape = build(MeshControlOptions, config["control"], "control") if config.get("control") else None
    scene = build(SceneOptions, config["scene"], "scene")
    objective = build(ObjectiveOptions, config["objective"], "objective")
    export = build(ExportOptions, config["export"], "export")
    run_options = build(RunOptions, config["run"], "run")
    teacher = Teacher.load(config["teacher"], pick_device(run_options.device))
    check_inputs(teacher, options)  # before a directory is claimed, as the mesh
    control = None if shape is None else MeshControl(teacher, shape)
    run = Run(run_options, config, options.prompt)
    made = TextTo3d(run, teacher, scene, objective, options, control)
    made.train()
    result = finish(made, export)
    print(
        f"written: {result.parent}: mesh.glb, mesh.obj, mesh.ply, turntable.mp4, turntable.gif, renders.png, result.json"
    )


if __name__ == "__main__":
    entry("text_to_3d", main)
