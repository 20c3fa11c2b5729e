"""Train an adapter on the frozen teacher: python scripts/train_controlnet.py condition=silhouette"""

from typing import Any

from entry import entry

SPLITS = ("train", "validation")  # an adapter learns from one, and is watched on the other


def main(config: dict[str, Any]) -> None:
    from distill.control.adapter import save_adapter
    from distill.control.train import AdapterOptions, AdapterTraining, HeldOut
    from distill.data.folders import load_split
    from distill.data.latents import load_latents
    from distill.evaluation.control_report import finish
    from distill.evaluation.probe import load_probe
    from distill.runtime.config import build
    from distill.runtime.machine import pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.teacher.latent import Teacher
    from sds3d.world.conditions import split_pictures

    condition, folder = config["condition"], config["data"]
    options = build(AdapterOptions, config["adapter"], "adapter")
    run_options = build(RunOptions, config["run"], "run")
    teacher = Teacher.load(config["teacher"], pick_device(run_options.device))
    probe = load_probe(config["probe"])
    splits = [load_split(folder, name, teacher.resolution) for name in SPLITS]
    pictures, held_pictures = (
        split_pictures(folder, *given) for given in zip(SPLITS, (condition,) * 2, splits, strict=True)
    )
    run = Run(run_options, config, f"{condition} adapter")
    training = AdapterTraining(run, teacher, load_latents(teacher, folder), pictures, condition, options)
    adapter = training.train(HeldOut(splits[1].texts, held_pictures, splits[1].composite(slice(None))), probe)
    figures = finish(run)
    save_adapter(run.directory / "adapter", adapter, condition, figures)
    print(
        f"written: {run.directory}/adapter, fidelity.png; "
        + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    )


if __name__ == "__main__":
    entry("train_controlnet", main)
