"""The probe: a small network that predicts silhouette and depth of an image, to measure control fidelity.

Like the judge it is independent of every teacher: it is trained on augmented renders with true geometry.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.identity import TeacherIdentity, recorded_teacher, teacher_mismatch, teacher_record
from distill.core.teacher import Teacher
from distill.data.augmentation import add_noise, blur_sharpen, color_jitter
from distill.data.folders import CaptionedImages, batch_indices, grey_levels
from distill.evaluation.judge import Block
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.runtime.optim import one_cycle, optimizer_step
from distill.runtime.run import Run
from distill.runtime.shipped import resolve

FORMAT = "distill-probe-1"


@dataclass(frozen=True)
class ProbeOptions:
    """Size and training."""

    width: int = 32  # channels of the finest level
    batch: int = 32
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.width < 4 or self.batch < 1 or self.learning_rate <= 0:
            raise UserError(
                "the probe's width must be at least 4, its batch at least 1 and its learning rate positive"
            )


@final
class Probe(nn.Module):
    """Silhouette logits and depth (B, 1, H, W) of images (B, 3, H, W) in [0, 1], H and W multiples of 8."""

    def __init__(self, options: ProbeOptions) -> None:
        super().__init__()
        self.options = options
        width = options.width
        self.fine = nn.Sequential(Block(3, width, 5, 2), Block(width, width))
        self.middle = nn.Sequential(Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.coarse = nn.Sequential(
            Block(2 * width, 4 * width, stride=2),
            *(Block(4 * width, 4 * width) for _ in range(3)),
            Block(4 * width, 2 * width),
        )
        self.join = nn.Sequential(Block(4 * width, width), Block(width, width))
        self.out = nn.Sequential(
            Block(2 * width, width), nn.Conv2d(width, 8, 3, padding=1), nn.PixelShuffle(2)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Silhouette logits and depth, as closeness: near 1, far 0, up to a shift."""
        fine = self.fine((images * 4 - 2).contiguous(memory_format=torch.channels_last))
        middle = self.middle(fine)
        joined = self.join(torch.cat([middle, F.interpolate(self.coarse(middle), scale_factor=2)], 1))
        output = self.out(torch.cat([fine, F.interpolate(joined, scale_factor=2)], 1))
        return output[:, :1], output[:, 1:]


def train_probe(run: Run, data: CaptionedImages, near: Tensor, options: ProbeOptions) -> Probe:
    """Train on a split with alpha and its closeness `near` (N, 1, H, W), near 1, far 0.

    Returns the probe in evaluation mode, its weights as `save_probe` rounds them.
    """
    probe = Probe(options).to(run.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = one_cycle(optimizer, run.options.steps, warmup=0.1)
    run.track(model=probe, optimizer=optimizer, schedule=schedule)

    for step in run.steps():
        index = batch_indices(len(data), options.batch, step, run.options.seed)
        images = data.composite(index, grey_levels(len(index), run.generator))
        images = color_jitter(blur_sharpen(images, run.generator), run.generator)
        images = add_noise(images, run.generator, 0.02).clamp(0, 1).to(run.device)
        mask = data.images[index, 3:].float().to(run.device) / 255
        with run.precision.autocast():
            logits, depth = (output.float() for output in probe(images))
        silhouette_loss = F.binary_cross_entropy_with_logits(logits, mask)
        depth_term = depth_loss(depth, near[index].float().to(run.device), mask)
        optimizer_step(optimizer, silhouette_loss + 4 * depth_term, scaler=run.scaler)
        schedule.step()
        run.log(silhouette=silhouette_loss.detach(), depth=depth_term.detach())
    return probe.half().float().eval()


@torch.no_grad()
def predict_geometry(probe: Probe, images: Tensor, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Silhouettes (N, 1, H, W) bool and depth (N, 1, H, W) of images (N, 3, H, W) in [0, 1], on the CPU."""
    device = next(probe.parameters()).device
    parts = [probe(part.to(device)) for part in images.split(batch)]
    silhouettes = torch.cat([logits.cpu() for logits, _ in parts]) > 0
    return silhouettes, torch.cat([depth.cpu() for _, depth in parts])


def _pair_mask(mask: Tensor, dim: int) -> Tensor:
    """1 where a pixel and its neighbour along a dimension are both within a mask."""
    length = mask.shape[dim] - 1
    return mask.narrow(dim, 0, length).minimum(mask.narrow(dim, 1, length))


def depth_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of depth (B, 1, H, W) in a mask after each image's mean shift, plus gradient error.

    The shift itself has the weight 0.1: distance and size of an object are ambiguous, and ranks do not depend
    on it (shift-invariant error: Eigen et al. 2014, arXiv:1406.2283, section 3.2). Gradient error as in MiDaS
    (arXiv:1907.01341, eq. 11).
    """
    pixels = mask.sum((1, 2, 3), keepdim=True).clamp_min(1)
    error = (prediction - target) * mask
    shift = error.sum((1, 2, 3), keepdim=True) / pixels
    shape = ((error - shift * mask).abs().sum((1, 2, 3), keepdim=True) / pixels).mean()
    gradients = [(prediction - target).diff(dim=dim) * _pair_mask(mask, dim) for dim in (2, 3)]
    gradient = sum((value.abs().sum((1, 2, 3), keepdim=True) / pixels).mean() for value in gradients)
    return shape + gradient + 0.1 * shift.abs().mean()


def save_probe(
    probe: Probe, folder: Path | str, metrics: dict[str, float], teacher: TeacherIdentity | None = None
) -> None:
    """Write model.safetensors, in half precision, and probe.json, with the teacher that it is for."""
    state = {
        k: (v.half() if v.is_floating_point() else v).cpu().contiguous()
        for k, v in probe.state_dict().items()
    }
    with atomic_path(Path(folder) / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    facts = {"format": FORMAT, "options": asdict(probe.options), "metrics": metrics}
    write_json(Path(folder) / "probe.json", facts | teacher_record(teacher))


def load_probe(
    folder: Path | str, device: torch.device | str = "cpu", teacher: Teacher | None = None
) -> Probe:
    """The probe in a folder, or a shipped one by name (`probe64`), float32, frozen.

    It is loaded to `device`. teacher: the one whose samples are graded. A probe for another's is reported on
    stderr and not refused: it sees images only, and fits those that are like its data. Raises `UserError`
    where there is none.
    """
    path = resolve("probe", folder)
    facts = read_json(path / "probe.json") if (path / "probe.json").is_file() else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{folder} holds no probe: train one with scripts/train_probe.py")
    if teacher is not None:
        owner = recorded_teacher(facts, str(path / "probe.json"))
        mismatch = teacher_mismatch(f"probe {folder}", owner, teacher.identity)
        if mismatch is not None:
            remedy = "where its images differ, train one (scripts/train_probe.py)"
            print(f"warning: {mismatch}: {remedy}", file=sys.stderr)
    probe = Probe(ProbeOptions(**facts["options"]))
    probe.load_state_dict(load_file(path / "model.safetensors"))
    return probe.to(device).eval().requires_grad_(False)
