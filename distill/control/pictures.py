"""A user's picture file as a control."""

from dataclasses import dataclass
from pathlib import Path

from distill.control.adapter import Control, load_adapter
from distill.data.images import composite_over, open_image
from distill.teacher.latent import Teacher


@dataclass(frozen=True)
class ControlPicture:
    """An adapter by name or folder, the file of its picture, its weight and the share of the denoising it acts in."""

    adapter: str
    picture: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


def make_control(given: ControlPicture, teacher: Teacher) -> Control:
    """The control of a file. Raises `UserError` for an adapter or an image that is none."""
    adapter, _ = load_adapter(given.adapter, teacher.device)
    picture = composite_over(open_image(Path(given.picture), teacher.resolution)).to(teacher.device)
    return Control(adapter, picture, given.weight, given.start, given.end)
