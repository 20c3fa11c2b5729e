"""The judge: a small network that reads metadata columns off images and is independent of every teacher.

Its features also serve for Frechet distances (`distill.evaluation.metrics`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.augmentation import add_noise, blur_sharpen, color_jitter, random_affine, random_erasing
from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.evaluation.judge_columns import (
    IGNORE,
    JudgeOptions,
    collect_labels,
    direction_table,
    label_table,
)
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.runtime.shipped import resolve
from distill.runtime.transfer import upload
from distill.teacher.folder import load_initial

FORMAT = "distill-judge-1"
FEATURES = 128
GRID = 4  # positions a side that a hidden layer tells apart
LENGTH_WEIGHT = 0.05  # of the lengths of direction vectors in the loss


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
    """A convolutional net with one linear head an attribute and a direction; `labels` name the logits."""

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
        size, self.hidden = FEATURES, None
        if options.hidden is not None:
            size = options.hidden
            layers = nn.Linear(FEATURES * GRID**2, size), nn.BatchNorm1d(size), nn.ReLU()
            self.hidden = nn.Sequential(nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), *layers)
        # torch allows no dots in the names of modules
        heads = {name.replace(".", "/"): nn.Linear(size, len(v)) for name, v in self.labels.items()}
        self.heads = nn.ModuleDict(heads)
        self.direction_heads = nn.ModuleDict({name: nn.Linear(size, 2) for name in options.directions})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 128), or (N, hidden), of images (N, 3, H, W) in [0, 1], of at least 16 x 16 pixels."""
        centred = (images * 4 - 2).contiguous(memory_format=torch.channels_last)
        maps = self.trunk(centred)
        return maps.mean((2, 3)) if self.hidden is None else self.hidden(maps)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The activations (N, C, h, w) of every block, differentiable, for perceptual distances."""
        values = [(images * 4 - 2).contiguous(memory_format=torch.channels_last)]
        for block in self.trunk:
            values.append(block(values[-1]))
        return values[1:]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (N, number of labels) of each attribute for images (N, 3, H, W) in [0, 1]."""
        return self.outputs(images)[0]

    def outputs(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits (N, number of labels) of each attribute, and vectors (N, 2) along each direction."""
        features = self.features(images)
        heads = zip(self.labels, self.heads.values(), strict=True)
        logits = {name: head(features) for name, head in heads}
        return logits, {name: head(features) for name, head in self.direction_heads.items()}


def judge_loss(logits: Mapping[str, Tensor], targets: Tensor, smoothing: float) -> Tensor:
    """The sum over attributes of the mean cross-entropy of rows that count; `targets` (B, attributes)."""
    losses = [targets.new_zeros((), dtype=torch.float32)]
    for scores, target in zip(logits.values(), targets.T, strict=True):
        total = F.cross_entropy(
            scores, target, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
        )
        losses.append(total / (target != IGNORE).sum().clamp(min=1))
    return torch.stack(losses).sum()


def direction_loss(vectors: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """The sum over directions of 1 - cos of the angle between vector and target, mean of rows that count.

    targets (B, directions, 2), NaN where a row does not count. A small term draws the vectors to length 1:
    near 0 their direction would be unstable.
    """
    losses = [targets.new_zeros(())]
    for vector, target in zip(vectors.values(), targets.unbind(1), strict=True):
        given = ~target.isnan().any(1)
        cosine = F.cosine_similarity(vector, target.nan_to_num(0.0))
        error = 1 - cosine + LENGTH_WEIGHT * (vector.norm(dim=1) - 1).square()
        losses.append((error * given).sum() / given.sum().clamp(min=1))
    return torch.stack(losses).sum()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] under random affine maps, blur, colour jitter, noise and erasing.

    They make the judge robust to reconstructions, samples and NeRF renders. No mirroring and no change of
    hue: both would change labels.
    """
    images = color_jitter(blur_sharpen(random_affine(images, generator), generator), generator)
    return random_erasing(add_noise(images, generator, 0.04), generator).clamp(0, 1)


def train_judge(
    run: Run, data: CaptionedImages, options: JudgeOptions, initial: Judge | None = None
) -> Judge:
    """Train on a split; returns the judge in evaluation mode, its weights as `save_judge` rounds them.

    Training starts from the convolutions of `initial`. Raises `UserError` for an attribute with fewer than
    two values, and for an initial judge of another width.
    """
    judge = Judge(collect_labels(data.rows, options), options, data.images.shape[-1]).to(run.device)
    if initial is not None:
        load_initial(judge.trunk, initial.trunk, "judge")
    table = label_table(data.rows, judge.labels, options).to(run.device)
    directions = direction_table(data.rows, options).to(run.device)
    device, generator = run.data_device(data.images.nbytes)
    data = data.to(device)
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.2)
    run.track(model=judge, optimizer=optimizer, schedule=schedule)

    for step in run.steps():
        index = upload(batch_indices(len(data), options.batch, step, run.options.seed), device)
        images = augment(data.composite(index, grey_levels(len(index), generator)), generator)
        with run.precision.autocast():
            outputs = judge.outputs(images.to(run.device))
        logits, vectors = ({name: value.float() for name, value in output.items()} for output in outputs)
        index = index.to(run.device)
        loss = judge_loss(logits, table[index], options.label_smoothing)
        direction = direction_loss(vectors, directions[index])
        loss = loss + options.direction_weight * direction
        optimizer_step(optimizer, loss, scaler=run.scaler)
        schedule.step()
        run.log(loss=loss.detach())
        if run.due(run.options.preview_every):
            run.preview("augmented", images[:16])
    return judge.half().float().eval()


@torch.no_grad()
def judge_features(judge: Judge, images: Tensor, batch: int = 256) -> Tensor:
    """Features (N, D) on the CPU of images (N, 3, H, W) in [0, 1], by the judge as it was trained."""
    device = next(judge.parameters()).device
    judge.eval()
    return torch.cat([judge.features(part.to(device)).cpu() for part in images.split(batch)])


@torch.no_grad()
def predict(judge: Judge, images: Tensor) -> dict[str, list[str]]:
    """The most probable value of each attribute for each of the images (N, 3, H, W) in [0, 1]."""
    chosen = {name: values.argmax(1).tolist() for name, values in label_probabilities(judge, images).items()}
    return {name: [judge.labels[name][index] for index in indices] for name, indices in chosen.items()}


@torch.no_grad()
def label_probabilities(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """The probabilities (N, K) of the K labels of each attribute in images (N, 3, H, W) in [0, 1]."""
    features = judge_features(judge, images).to(next(judge.parameters()).device)
    heads = zip(judge.labels, judge.heads.values(), strict=True)
    return {name: head(features).softmax(1).cpu() for name, head in heads}


@torch.no_grad()
def read_directions(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """Angles (N,) in degrees, in [-180, 180], of each direction in images (N, 3, H, W) in [0, 1]."""
    features = judge_features(judge, images).to(next(judge.parameters()).device)
    vectors = {name: head(features).cpu() for name, head in judge.direction_heads.items()}
    return {name: torch.rad2deg(torch.atan2(xy[:, 1], xy[:, 0])) for name, xy in vectors.items()}


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
        pairs = tuple((column, condition) for column, condition in saved["only_if"])
        columns = {name: tuple(saved.get(name, ())) for name in ("attributes", "directions")}
        options = JudgeOptions(**{**saved, **columns, "only_if": pairs})
        judge = Judge(facts["labels"], options, facts.get("resolution", 64))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the judge in {folder} is damaged ({error}): train it again") from None
    return judge.to(device).eval().requires_grad_(False)
