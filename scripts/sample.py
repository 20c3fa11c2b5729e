"""Images from a teacher or a student, one row a prompt: python scripts/sample.py "a red teapot" "a blue torus" (student=shapes64)"""

from pathlib import Path
from typing import Any

from entry import entry

TEACHER_ONLY = (
    "negative_prompt",
    "sweep",
    "race",
    "image",
    "mask",
    "weights",
    "interpolate",
    "animation",
)  # off while empty
WAYS = (
    "teacher",
    "student",
    "compare",
    "controls",
    "race",
    "output",
    "device",
)  # not of an image: what draws it, and where it is left


def main(config: dict[str, Any]) -> None:
    if config["student"] is not None:
        return from_student(config)
    import torch

    from distill.apps.text_to_image import TextToImageOptions, compare_samplers, text_to_image
    from distill.control.adapter import controlled
    from distill.control.pictures import ControlPicture, make_control
    from distill.runtime.config import build
    from distill.runtime.images import image_grid
    from distill.runtime.machine import pick_device
    from distill.runtime.video import save_animation
    from distill.teacher.latent import Teacher

    options = build(TextToImageOptions, {key: value for key, value in config.items() if key not in WAYS})
    teacher, folder = Teacher.load(config["teacher"], pick_device(config["device"])), Path(config["output"])
    controls = [
        make_control(build(ControlPicture, given, "controls"), teacher) for given in config["controls"]
    ]
    seen = controlled(teacher, controls) if controls else teacher
    columns, frames = options.count * max(len(options.sweep), 1), None
    if config["race"]:
        rows, table = compare_samplers(seen, options, config["race"])
        images = torch.cat(rows)
        print(table)
    else:
        images, frames = text_to_image(seen, options)
    if frames is not None:
        save_animation(frames, folder / "denoising.gif", 8)
    save(folder, image_grid(images, columns), images, columns)


def from_student(config: dict[str, Any]) -> None:
    from distill.control.adapter import controlled_student
    from distill.control.pictures import ControlPicture, make_control
    from distill.one_step.comparison import StudentSampleOptions, sample_student, sheet, table
    from distill.one_step.folder import load_student
    from distill.runtime.config import build
    from distill.runtime.errors import UserError
    from distill.runtime.machine import pick_device
    from distill.teacher.latent import Teacher

    asked = [name for name in TEACHER_ONLY if config[name]] + ["candidates"] * (config["candidates"] != 1)
    if asked:
        raise UserError(
            f"{', '.join(asked)}: a student draws from noise and a prompt, at once; leave student= out for its teacher to do it"
        )
    options = build(
        StudentSampleOptions,
        {key: config[key] for key in ("prompts", "count", "seed", "compare", "guidance")},
    )
    device = pick_device(config["device"])
    student, parts = load_student(config["student"], device)
    controls = [make_control(build(ControlPicture, given, "controls"), parts) for given in config["controls"]]
    student = controlled_student(student, controls) if controls else student
    rows = sample_student(
        student, parts, Teacher.load(config["teacher"], device) if options.compare else None, options
    )
    if options.compare:
        print(table(rows))
    save(Path(config["output"]), sheet(rows, options), rows[0].images, options.count)


def save(folder: Path, sheet: Any, images: Any, columns: int) -> None:
    from distill.runtime.images import save_png

    save_png(folder / "samples.png", sheet)
    for number, image in enumerate(images):
        save_png(folder / f"{number // columns:03d}_{number % columns:02d}.png", image)
    print(f"written: {folder}/samples.png")


if __name__ == "__main__":
    entry("sample", main, positional="prompts")
