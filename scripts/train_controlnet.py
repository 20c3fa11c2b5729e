"""Train an adapter (ControlNet) on the frozen teacher.

python scripts/train_controlnet.py condition=silhouette
"""

from dataclasses import dataclass, field

from entry import entry

from distill.control.adapter import save_adapter
from distill.control.train import AdapterOptions, AdapterTrainer, HeldOut
from distill.data.folders import load_split
from distill.data.latents import load_latents
from distill.evaluation.control import finish
from distill.evaluation.probe import load_probe
from distill.runtime.config import as_mapping
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.machine import pick_device
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher, require_latent
from sds3d.world.conditions import split_condition_images


@dataclass(frozen=True, kw_only=True)
class Config:
    """A condition, the images that show it, and how the adapter is trained."""

    # silhouette; depth and normals need world.geometry=true; edges and scribble suit any images; folder reads
    # a conditioning_image column
    condition: str = "silhouette"
    teacher: str = "shapes64"
    data: str = "outputs/shapes64"
    probe: str = "probe64"  # predicts silhouette and depth from samples (train_probe.py)
    run: RunOptions
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME


def main(config: Config) -> None:
    condition = config.condition
    teacher = require_latent(load_teacher(config.teacher, pick_device(config.run.device)))
    probe = load_probe(config.probe)
    train, validation = (
        load_split(config.data, split, teacher.resolution) for split in ("train", "validation")
    )
    conditions = split_condition_images(config.data, "train", condition, train)
    held_out = HeldOut(
        validation.texts,
        split_condition_images(config.data, "validation", condition, validation),
        validation.composite(slice(None)),
    )
    run = Run(config.run, as_mapping(config), f"{condition} adapter")
    latents = load_latents(teacher, config.data)
    trainer = AdapterTrainer(run, teacher, latents, conditions, condition, config.adapter)
    adapter = trainer.train(held_out, probe)
    metrics = finish(run)
    save_adapter(run.directory / "adapter", adapter, condition, metrics)
    print(f"written: {run.directory}/adapter, fidelity.png", *(f"{k} {v:.3f}" for k, v in metrics.items()))


if __name__ == "__main__":
    entry("train_controlnet", Config, main)
