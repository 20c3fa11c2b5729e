"""Train an adapter (ControlNet) on the frozen teacher.

python scripts/train_controlnet.py condition=silhouette
On several processes: torchrun --nproc-per-node 2 scripts/train_controlnet.py condition=silhouette
"""

from dataclasses import dataclass, field
from pathlib import Path

from entry import entry

from distill.control.adapter import save_adapter
from distill.control.train import AdapterOptions, AdapterTrainer, HeldOut
from distill.data.folders import load_split
from distill.data.latents import load_latents
from distill.evaluation.control import finish
from distill.evaluation.probe import load_probe
from distill.planning.control import adapter_subject
from distill.planning.start import plan_start, record_work
from distill.runtime.config import as_mapping
from distill.runtime.experiment import ExperimentInfo
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import load_teacher, require_pipeline
from distill.teacher.pipeline import PipelineTeacher
from sds3d.world.conditions import split_condition_images


@dataclass(frozen=True, kw_only=True)
class Config:
    """A condition, the images that show it, and how the adapter is trained."""

    # silhouette; depth and normals need world.geometry=true; edges and scribble suit any images; folder reads
    # a conditioning_image column
    condition: str = "silhouette"
    teacher: str = "shapes64"
    data: str = (
        "outputs/shapes64"  # a captioned image folder; its validation split, where it has one, is held out
    )
    # predicts silhouette and depth from samples (train_probe.py); null: previews only, as photographs need,
    # and for edges and scribble the lines' own figure
    probe: str | None = "probe64"
    run: RunOptions
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    experiment: ExperimentInfo | None = None  # the description of the preset chosen by experiment=NAME


def main(config: Config) -> None:
    condition = config.condition
    plan = plan_start(adapter_subject(config.teacher, config.adapter, config.run), config)
    precision = pick_precision(config.run.device, config.run.precision)
    teacher = require_pipeline(load_teacher(config.teacher, precision.device, precision.dtype))
    train = load_split(config.data, "train", teacher.resolution)
    conditions = split_condition_images(config.data, "train", condition, train)
    held_out = load_held_out(config, teacher)
    run = Run(config.run, as_mapping(config), f"{condition} adapter")
    latents = load_latents(teacher, config.data)
    trainer = AdapterTrainer(run, teacher, latents, conditions, condition, config.adapter)
    adapter = trainer.train(held_out)
    metrics = finish(run)
    record_work(run.directory / "result.json", plan)
    if run.main:
        also = ("silhouette",) if config.adapter.silhouettes else ()
        save_adapter(run.directory / "adapter", adapter, condition, metrics, teacher.identity, also)
    files = ["adapter", *(["fidelity.png"] if metrics else [])]
    if metrics:
        print(*(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"written: {run.directory}/{', '.join(files)}")


def load_held_out(config: Config, teacher: PipelineTeacher) -> HeldOut | None:
    """The first images of the validation split; None where the data have none."""
    if not (Path(config.data) / "validation").is_dir():
        return None
    probe = None if config.probe is None else load_probe(config.probe, teacher.device, teacher)
    limit = config.adapter.validation.samples
    data = load_split(config.data, "validation", teacher.resolution, limit)
    conditions = split_condition_images(config.data, "validation", config.condition, data)
    prompts = [teacher.prompt_of(row) for row in data.rows]
    return HeldOut(prompts, conditions, data.composite(slice(None)), probe)


if __name__ == "__main__":
    entry("train_controlnet", Config, main, parallel=True)
