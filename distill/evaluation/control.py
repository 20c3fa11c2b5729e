"""Evaluation of adapters: samples against held-out conditions and captions, and fidelity over training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.control.adapter import controlled, controlled_student
from distill.control.conditions import adapter_input
from distill.control.network import AdapterNetwork, Control
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages
from distill.evaluation.fidelity import emergence_step, fidelity, means
from distill.evaluation.generate import Sampler, SamplingBatch, generate, student_sampler, teacher_sampler
from distill.evaluation.graders import Graders
from distill.evaluation.labels import LabelOptions
from distill.evaluation.probe import Probe
from distill.one_step.student import Student
from distill.runtime.curves import Curve, read_curves
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from distill.runtime.run import Run
from distill.teacher.pipeline import PipelineTeacher

FIGURES = ("silhouette_iou", "depth_correlation", "line_f1", "edge_correlation")


@dataclass(frozen=True)
class ControlEvaluationOptions:
    """`samples` of a test split by DDIM in `steps` steps with guidance; the adapter's weight."""

    samples: int = 300
    steps: int = 25
    guidance: float = 2.0
    weight: float = 1.0
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.steps, self.batch) < 1:
            raise UserError("samples, steps and batch must be at least 1")


def adapter_sampler(
    teacher: PipelineTeacher,
    adapter: AdapterNetwork,
    condition_images: Tensor,
    options: ControlEvaluationOptions,
) -> Sampler:
    """The teacher through an adapter, by guided DDIM; a condition image (1 or 3, H, W) uint8 per caption."""
    base = teacher_sampler(teacher, options.steps, options.guidance)
    uncond = teacher.encode_text([""])

    def sample(batch: SamplingBatch) -> Tensor:
        images = adapter_input(condition_images[batch.indices]).to(teacher.device)
        control = Control(adapter, images, options.weight)
        model = Guided(controlled(teacher, [control]), uncond, options.guidance)
        return sample_ode(model, teacher.scheduler, batch.conditioning, batch.noise, options.steps)

    return Sampler(f"{base.name}, adapter", sample, base.nfe, adapter)


def student_adapter_sampler(
    student: Student, adapter: AdapterNetwork, condition_images: Tensor, options: ControlEvaluationOptions
) -> Sampler:
    """A student through an adapter of its teacher; condition images as in `adapter_sampler`."""

    def sample(batch: SamplingBatch) -> Tensor:
        images = adapter_input(condition_images[batch.indices]).to(batch.noise.device)
        control = Control(adapter, images, options.weight)
        return controlled_student(student, [control])(batch.noise, batch.conditioning, batch.generator)

    return Sampler("student, adapter", sample, len(student.timesteps), adapter)


@dataclass(frozen=True)
class ControlTest:
    """Images of one condition, and a condition image (N, 1 or 3, H, W) uint8 for each of them."""

    condition: str
    data: CaptionedImages
    condition_images: Tensor

    def first(self, count: int) -> "ControlTest":
        """At most that many of them."""
        indices = range(min(count, len(self.data)))
        return ControlTest(self.condition, self.data.select(indices), self.condition_images[: len(indices)])


@dataclass(frozen=True)
class ControlledModels:
    """An adapter, the teacher it was trained on, and a student of that teacher where there is one."""

    teacher: PipelineTeacher
    adapter: AdapterNetwork
    student: Student | None = None

    def samplers(self, condition_images: Tensor, options: ControlEvaluationOptions) -> dict[str, Sampler]:
        """Teacher and student, each without and with the adapter."""
        samplers = {
            "teacher": teacher_sampler(self.teacher, options.steps, options.guidance),
            "teacher, adapter": adapter_sampler(self.teacher, self.adapter, condition_images, options),
        }
        if self.student is not None:
            sampler = student_adapter_sampler(self.student, self.adapter, condition_images, options)
            samplers |= {"student": student_sampler("student", self.student), "student, adapter": sampler}
        return samplers


@dataclass(frozen=True)
class ControlGraders:
    """What grades samples: a probe, where the condition's figure needs one, and graders of the captions."""

    probe: Probe | None
    graders: Graders
    labels: LabelOptions

    def figures(self, test: ControlTest, samples: Tensor) -> dict[str, float]:
        """Fidelity to the conditions and agreement with the captions of samples (N, 3, H, W).

        Fidelities named `*_labelled` and the judge's accuracy are of the rows that `labels.exclude_if`
        leaves.
        """
        indices = self.labels.labelled(test.data.rows)
        rows = [test.data.rows[i] for i in indices]
        figures = fidelity(test.condition, samples, test.condition_images, self.probe)
        labelled = {f"{key}_labelled": values[indices] for key, values in figures.items()}
        accuracy = self.graders.accuracy(samples[indices], rows, self.labels)
        return {**means(figures | labelled), **accuracy}


def evaluate_control(
    models: ControlledModels, test: ControlTest, graders: ControlGraders, options: ControlEvaluationOptions
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Rows of figures, and images, of the truth and of teacher and student without and with the adapter.

    All samplers start from the same noise.
    """
    test = test.first(options.samples)
    images = {"true images": test.data.composite(slice(None))}
    for name, sampler in models.samplers(test.condition_images, options).items():
        samples = generate(models.teacher, test.data.texts, sampler, options.batch, options.seed)
        images[name] = samples.images
    rows = [{"generator": name, **graders.figures(test, samples)} for name, samples in images.items()]
    return rows, list(images.values())


def fidelity_curves(metrics: Path) -> dict[str, Curve]:
    """Every fidelity in a run's metrics.jsonl."""
    curves = read_curves(metrics.parent)
    return {name: curves[name] for name in FIGURES if name in curves}


def finish(run: Run) -> dict[str, float]:
    """Write fidelity.png and result.json of an adapter's training; returns the last figures."""
    curves = fidelity_curves(run.directory / "metrics.jsonl")
    last = {name: values[-1] for name, (_, values) in curves.items()}
    emergence = {name: emergence_step(*curve) for name, curve in curves.items()}
    if curves:
        plot_fidelity(run.directory / "fidelity.png", curves, emergence)
    run.finish({"fidelity": last, "emergence_step": emergence})
    return last


def plot_fidelity(path: Path, curves: dict[str, Curve], emergence: dict[str, int | None]) -> None:
    """The curves, with a dotted line at the step where each one emerges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for index, (name, (steps, values)) in enumerate(curves.items()):
        colour, step = f"C{index}", emergence[name]
        axis.plot(steps, values, ".-", color=colour, label=name.replace("_", " "))
        if step is not None:
            axis.axvline(step, color=colour, linestyle=":", linewidth=1)
            axis.annotate(
                f"step {step}",
                (step, values[steps.index(step)]),
                xytext=(6, -4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axis.set_xlabel("steps")
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
