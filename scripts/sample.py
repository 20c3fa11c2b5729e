"""Images from a teacher or a student, one row a prompt: python scripts/sample.py "a red teapot" "a blue torus" (student=shapes64)"""

from pathlib import Path
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    if config["student"] is not None:
        return from_student(config)
    from distill.config import build
    from distill.film import save_gif
    from distill.report import image_grid, pick_device, save_png
    from distill.teacher.frozen import Teacher
    from distill.text_to_image import TextToImageOptions, text_to_image

    keys = ("prompts", "negative_prompt", "count", "guidance", "steps", "sampler", "seed", "animation")
    options = build(TextToImageOptions, {key: config[key] for key in keys})
    images, frames = text_to_image(Teacher.load(config["teacher"], pick_device(config["device"])), options)
    folder = Path(config["output"])
    save_png(folder / "samples.png", image_grid(images, options.count))
    for number, image in enumerate(images):
        save_png(folder / f"{number // options.count:03d}_{number % options.count:02d}.png", image)
    if frames is not None:
        save_gif(frames, folder / "denoising.gif", 8)
    print(f"written: {folder}/samples.png")


def from_student(config: dict[str, Any]) -> None:
    from distill.config import build
    from distill.one_step.comparison import StudentSampleOptions, sample_student, sheet, table
    from distill.one_step.folder import load_student
    from distill.report import pick_device, save_png
    from distill.teacher.frozen import Teacher

    options = build(StudentSampleOptions, {key: config[key] for key in ("prompts", "count", "seed", "compare", "guidance")})
    device = pick_device(config["device"])
    student, parts = load_student(config["student"], device)
    rows = sample_student(student, parts, Teacher.load(config["teacher"], device) if options.compare else None, options)
    folder = Path(config["output"])
    save_png(folder / "samples.png", sheet(rows, options))
    for number, image in enumerate(rows[0].images):
        save_png(folder / f"{number // options.count:03d}_{number % options.count:02d}.png", image)
    if options.compare:
        print(table(rows))
    print(f"written: {folder}/samples.png")


if __name__ == "__main__":
    entry("sample", main, positional="prompts")
