"""Images driven by any loss, with a video of it.

python scripts/optimise_image.py objective=csd prompt="a red teapot"
An edit: python scripts/optimise_image.py objective=dds prompt="a blue cube"
optimise_image.source=cube.png optimise_image.source_prompt="a red cube"
optimise_image.start=source
"""

from dataclasses import dataclass

from entry import entry

from distill.apps.optimise_image import OptimiseImageOptions, run_optimise_image
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import as_mapping
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """A prompt, a loss, and what it drives."""

    prompt: str  # repeated as optimise_image.prompt
    teacher: str = "shapes64"  # a shipped name, a diffusers folder, a hub id, or a YAML file
    autoencoder: str | None = None  # a tiny one in place of the VAE: a folder, madebyollin/taesd
    run: RunOptions
    objective: ObjectiveOptions
    optimise_image: OptimiseImageOptions
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME


def main(config: Config) -> None:
    precision = pick_precision(config.run.device, config.run.precision)
    teacher = load_teacher(config.teacher, precision.device, precision.dtype, config.autoencoder)
    run = Run(config.run, as_mapping(config), config.optimise_image.prompt)
    result = run_optimise_image(run, teacher, config.objective, config.optimise_image)
    print(f"written: {result.parent}: images.png, optimisation.mp4, result.json")


if __name__ == "__main__":
    entry("optimise_image", Config, main)
