"""SRResNet (Ledig et al. 2017, arXiv:1609.04802, section 2.1): residual blocks and pixel shuffling."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.runtime.shipped import names, resolve

FORMAT = "distill-upscaler-1"


@dataclass(frozen=True)
class UpscalerOptions:
    """Size and training.

    The paper's network has width 64, 16 blocks and stages of 64 channels each. Its batch normalisation is
    left out (as in EDSR, arXiv:1707.02921), and its output is added to bicubic interpolation.
    """

    width: int = 48  # channels of the residual blocks, at the input's resolution
    blocks: int = 8
    stages: tuple[int, ...] = (48, 32, 16)  # channels after each doubling of the resolution
    patch: int = 24  # side of the input's crops in training
    batch: int = 8
    learning_rate: float = 1e-3
    loss: Literal["l1", "mse"] = "l1"
    perceptual_weight: float = 0.0  # of the squared difference of a judge's features beside it
    perceptual_judge: str = "judge64"
    input_noise: float = 0.01  # standard deviation, added to inputs: generated images are not exact

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.patch, self.batch, *self.stages) < 1 or not self.stages:
            raise UserError("an upscaler needs at least one stage, and sizes of at least 1")
        if self.perceptual_weight < 0 or self.input_noise < 0:
            raise UserError(
                f"perceptual_weight={self.perceptual_weight:g} and input_noise={self.input_noise:g}: "
                "expected 0 or more"
            )

    @property
    def scale(self) -> int:
        """Output side over input side."""
        return 2 ** len(self.stages)


class _Block(nn.Module):
    """Two convolutions and the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.PReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        return features + self.layers(features)


@final
class Upscaler(nn.Module):
    """Images of any size to `options.scale` times their side."""

    def __init__(self, options: UpscalerOptions) -> None:
        super().__init__()
        self.options = options
        width = options.width
        self.stem = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(
            *(_Block(width) for _ in range(options.blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        stages: list[nn.Module] = []
        for inputs, outputs in zip((width, *options.stages), options.stages, strict=False):
            convolution = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)
            stages += [convolution, nn.PixelShuffle(2), nn.PReLU()]
        self.stages = nn.Sequential(*stages)
        self.out = nn.Conv2d(options.stages[-1], 3, 3, padding=1)
        for parameter in self.out.parameters():  # bicubic interpolation at first
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] to (B, 3, scale h, scale w), not clamped."""
        stem = self.stem((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        residual = self.out(self.stages(stem + self.body(stem)))
        return bicubic(images, self.options.scale * images.shape[-1]) + residual.float()


def bicubic(images: Tensor, side: int) -> Tensor:
    """Square images (B, 3, h, h) interpolated to (B, 3, side, side), not clamped."""
    return F.interpolate(images, (side, side), mode="bicubic")


@torch.no_grad()
def upscale(upscaler: Upscaler, images: Tensor, side: int, batch: int = 16) -> Tensor:
    """Square images (N, 3, h, h) in [0, 1] as (N, 3, side, side), clamped, on their device.

    A side below `scale` times h is the average over areas of the network's output. Raises `UserError` for a
    side that is not larger than the images', or larger than the network's output.
    """
    own, largest = images.shape[-1], upscaler.options.scale * images.shape[-1]
    if not own < side <= largest:
        raise UserError(f"upscale is {side}, of images of {own} pixels: expected {own + 1} to {largest}")
    device = upscaler.out.weight.device
    parts = []
    for part in images.split(batch):
        large = upscaler(part.to(device)).clamp(0, 1)
        parts.append(F.interpolate(large, (side, side), mode="area").to(images.device))
    return torch.cat(parts)


def save_upscaler(upscaler: Upscaler, folder: Path | str, figures: dict[str, float]) -> None:
    """Write model.safetensors, in half precision, and upscaler.json: options and figures."""
    state = {name: value.half().cpu().contiguous() for name, value in upscaler.state_dict().items()}
    with atomic_path(Path(folder) / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    facts = {"format": FORMAT, "options": asdict(upscaler.options), "figures": figures}
    write_json(Path(folder) / "upscaler.json", facts)


def load_upscaler(name_or_path: Path | str, device: torch.device | str = "cpu") -> Upscaler:
    """The upscaler in a folder, or a shipped one by name; float32, frozen.

    Raises `UserError` where there is none.
    """
    folder = resolve("upscaler", name_or_path)
    facts = read_json(folder / "upscaler.json") if (folder / "upscaler.json").is_file() else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(
            f"{name_or_path} holds no upscaler: give {names('upscaler')}, or a folder of "
            "scripts/train_upscaler.py"
        )
    try:
        saved = facts["options"]
        upscaler = Upscaler(UpscalerOptions(**{**saved, "stages": tuple(saved["stages"])}))
        upscaler.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the upscaler in {folder} is damaged ({error}): train it again") from None
    return upscaler.to(device).eval().requires_grad_(False)
