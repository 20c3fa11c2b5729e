"""Images driven by any loss, with a film of the way: python scripts/optimise_image.py objective=csd prompt="a red teapot" """

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    import torch

    from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions, diversity, saturation
    from distill.objectives.options import ObjectiveOptions
    from distill.runtime.config import build
    from distill.runtime.images import image_grid, save_png
    from distill.runtime.machine import pick_device
    from distill.runtime.run import Run, RunOptions
    from distill.runtime.video import save_video
    from distill.teacher.latent import Teacher

    options = build(OptimiseImageOptions, config["optimise_image"], "optimise_image")
    objective = build(ObjectiveOptions, config["objective"], "objective")
    run_options = build(RunOptions, config["run"], "run")
    teacher = Teacher.load(config["teacher"], pick_device(run_options.device))
    run = Run(run_options, config, options.prompt)
    task = OptimiseImage(run, teacher, objective, options)
    images = task.train()
    save_png(run.directory / "images.png", image_grid(images, min(len(images), 8)))
    if task.frames:  # none where a finished run is asked for again
        save_video(torch.stack(task.frames), run.directory / "way.mp4", 12)
    figures = {
        "saturation": float(saturation(images).mean()),
        "diversity": diversity(images),
        "forwards_a_step": objective.cost(),
    }
    print(f"written: {run.finish(figures).parent}: images.png, way.mp4, result.json")


if __name__ == "__main__":
    entry("optimise_image", main)
