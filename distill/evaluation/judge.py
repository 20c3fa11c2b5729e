"""The judge: a small classifier of metadata columns that grades images and is independent of every teacher.

Its features also serve for Frechet distances (`distill.evaluation.metrics`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.augmentation import add_noise, blur_sharpen, color_jitter, random_affine, random_erasing
from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.runtime.shipped import resolve

FORMAT = "distill-judge-1"
FEATURES = 128
IGNORE = -100  # the label of a row that does not count, the default of `F.cross_entropy`


@dataclass(frozen=True)
class JudgeOptions:
    """The metadata columns that are classified, size and training.

    A row counts for an attribute where its value is neither null nor empty and, for each pair (attribute,
    condition) in `only_if`, its column `condition` is True.
    """

    attributes: tuple[str, ...]
    only_if: tuple[tuple[str, str], ...] = ()
    width: int = 48
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05

    def __post_init__(self) -> None:
        if not self.attributes:
            raise UserError("the judge has no attributes; expected the name of a metadata column")
        if self.width < 1 or self.batch < 2:
            raise UserError(f"judge width {self.width}, batch {self.batch}; expected at least 1 and 2")


class Block(nn.Sequential):
    """Convolution, batch norm, ReLU; residual where the shape does not change."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
        self.residual = inputs == outputs and stride == 1

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return images + super().forward(images) if self.residual else super().forward(images)


class Judge(nn.Module):
    """A convolutional net with one linear head an attribute; `labels` name the logits."""

    def __init__(
        self, labels: Mapping[str, Sequence[str]], options: JudgeOptions, resolution: int = 64
    ) -> None:
        """resolution: side in pixels of the images that it is trained on."""
        super().__init__()
        self.labels = {name: tuple(values) for name, values in labels.items()}
        self.options, self.resolution = options, resolution
        width = options.width
        self.trunk = nn.Sequential(
            Block(3, width // 2, kernel=5, stride=2),
            Block(width // 2, width, stride=2),
            Block(width, width),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 2 * width),
            Block(2 * width, FEATURES, stride=2),
            Block(FEATURES, FEATURES),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(values)) for name, values in self.labels.items()}
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 128) of images (N, 3, H, W) in [0, 1], of at least 16 x 16 pixels."""
        centred = (images * 4 - 2).contiguous(memory_format=torch.channels_last)
        return self.trunk(centred).mean((2, 3))

    def layers(self, images: Tensor) -> list[Tensor]:
        """The activations (N, C, h, w) of every block, differentiable, for perceptual distances."""
        values = [(images * 4 - 2).contiguous(memory_format=torch.channels_last)]
        for block in self.trunk:
            values.append(block(values[-1]))
        return values[1:]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (N, number of labels) of each attribute for images (N, 3, H, W) in [0, 1]."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def collect_labels(rows: Sequence[Mapping[str, Any]], options: JudgeOptions) -> dict[str, tuple[str, ...]]:
    """The values of each attribute in the rows that count, sorted. Raises `UserError` for fewer than two."""
    labels = {}
    for name in options.attributes:
        labels[name] = tuple(
            sorted({value for row in rows if (value := label_of(row, name, options.only_if)) is not None})
        )
        if len(labels[name]) < 2:
            raise UserError(f"the column '{name}' has the values {list(labels[name])}; expected at least two")
    return labels


def label_table(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, Sequence[str]], options: JudgeOptions
) -> Tensor:
    """Label indices (N, attributes), `IGNORE` where a row does not count.

    Raises `UserError` for a value not in `labels`.
    """
    table = torch.full((len(rows), len(labels)), IGNORE)
    for column, (name, values) in enumerate(labels.items()):
        indices = {value: index for index, value in enumerate(values)}
        for index, row in enumerate(rows):
            value = label_of(row, name, options.only_if)
            if value is not None and value not in indices:
                raise UserError(f"row {index} has the {name} '{value}'; expected one of {', '.join(values)}")
            table[index, column] = IGNORE if value is None else indices[value]
    return table


def label_of(row: Mapping[str, Any], name: str, only_if: Sequence[tuple[str, str]]) -> str | None:
    """The label of a row in the column `name`; None where the row does not count (`JudgeOptions`)."""
    counts = all(row.get(condition) is True for attribute, condition in only_if if attribute == name)
    return (row.get(name) or None) if counts else None


def judge_loss(logits: Mapping[str, Tensor], targets: Tensor, smoothing: float) -> Tensor:
    """The sum over attributes of the mean cross-entropy of rows that count; `targets` (B, attributes)."""
    losses = []
    for scores, target in zip(logits.values(), targets.T, strict=True):
        total = F.cross_entropy(
            scores, target, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
        )
        losses.append(total / (target != IGNORE).sum().clamp(min=1))
    return torch.stack(losses).sum()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] under random affine maps, blur, colour jitter, noise and erasing.

    They make the judge robust to reconstructions, samples and NeRF renders. No mirroring and no change of
    hue: both would change labels.
    """
    images = color_jitter(blur_sharpen(random_affine(images, generator), generator), generator)
    return random_erasing(add_noise(images, generator, 0.04), generator).clamp(0, 1)


def train_judge(run: Run, data: CaptionedImages, options: JudgeOptions) -> Judge:
    """Train on a split; returns the judge in evaluation mode, its weights as `save_judge` rounds them.

    Raises `UserError` for an attribute with fewer than two values.
    """
    judge = Judge(collect_labels(data.rows, options), options, data.images.shape[-1]).to(run.device)
    table = label_table(data.rows, judge.labels, options)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.2)
    run.track(model=judge, optimizer=optimizer, schedule=schedule)

    for step in run.steps():
        index = batch_indices(len(data), options.batch, step, run.options.seed)
        images = augment(data.composite(index, grey_levels(len(index), run.generator)), run.generator)
        with run.precision.autocast():
            logits = judge(images.to(run.device))
        logits = {name: scores.float() for name, scores in logits.items()}
        loss = judge_loss(logits, table[index].to(run.device), options.label_smoothing)
        optimizer_step(optimizer, loss, scaler=run.scaler)
        schedule.step()
        run.log(loss=loss.detach())
        if run.due(run.options.preview_every):
            run.preview("augmented", images[:16])
    return judge.half().float().eval()


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor, batch: int = 256) -> Tensor:
    """Features (N, 128) on the CPU of images (N, 3, H, W) in [0, 1], by the judge as it was trained."""
    device = next(judge.parameters()).device
    judge.eval()
    return torch.cat([judge.features(part.to(device)).cpu() for part in images.split(batch)])


@torch.no_grad()
def predict(judge: Judge, images: Tensor) -> dict[str, list[str]]:
    """The most probable value of each attribute for each of the images (N, 3, H, W) in [0, 1]."""
    features = judge_features(judge, images).to(next(judge.parameters()).device)
    argmax = {name: head(features).argmax(1).tolist() for name, head in judge.heads.items()}
    return {name: [judge.labels[name][index] for index in indices] for name, indices in argmax.items()}


def save_judge(judge: Judge, folder: Path | str, metrics: Mapping[str, object]) -> None:
    """Write model.safetensors, in half precision, and judge.json: labels, options and `metrics`."""
    state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    with atomic_path(Path(folder) / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    facts = {
        "format": FORMAT,
        "labels": judge.labels,
        "options": asdict(judge.options),
        "resolution": judge.resolution,
        "metrics": dict(metrics),
    }
    write_json(Path(folder) / "judge.json", facts)


def load_judge(folder: Path | str, device: torch.device | str = "cpu") -> Judge:
    """The judge in a folder, or a shipped one by name (`judge64`), float32, in evaluation mode, frozen.

    It is loaded to `device`. Raises `UserError` where the folder holds none.
    """
    folder = resolve("judge", folder)
    facts = read_json(folder / "judge.json")
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{folder} holds no judge: train one with scripts/train_judge.py (format {FORMAT})")
    try:
        saved = facts["options"]
        pairs = tuple((attribute, condition) for attribute, condition in saved["only_if"])
        options = JudgeOptions(**{**saved, "attributes": tuple(saved["attributes"]), "only_if": pairs})
        judge = Judge(facts["labels"], options, facts.get("resolution", 64))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the judge in {folder} is damaged ({error}): train it again") from None
    return judge.to(device).eval().requires_grad_(False)
