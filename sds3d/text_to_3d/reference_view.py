"""The picture of an image-to-3D run: its camera, the loss of the view from there, the teacher's condition."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from transformers import CLIPModel

from distill.core.teacher import Teacher
from distill.objectives.options import LinearSchedule, resolve
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from distill.teacher.pictures import PictureCondition, check_takes_pictures, encode_pictures
from sds3d.scene.cameras import CameraOptions, Cameras, orbit
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.picture import Picture

DISTANCE, FOVY = 3.0, 35.0  # of the picture's camera: what `EXTENT` of `picture.py` belongs to


@dataclass(frozen=True)
class ImageTo3dOptions:
    """The picture's camera, and how closely the scene follows the picture.

    The weights are of mean squared errors, on the scale of the objective: those of the code of DreamGaussian
    (Tang et al. 2023, arXiv:2309.16653), which raises them from 0, as {start: 0, end: 10000} does here.
    """

    elevation: float | None = None  # degrees of the picture's camera; null: estimated with the teacher
    rgb_weight: float | LinearSchedule = 10_000.0  # of the view's colours, over a random grey
    mask_weight: float | LinearSchedule = 1_000.0  # of its opacity

    def __post_init__(self) -> None:
        low, high = CameraOptions().elevation
        if self.elevation is not None and not low <= self.elevation <= high:
            raise UserError(
                f"image_to_3d.elevation is {self.elevation:g}: degrees within [{low:g}, {high:g}] are "
                "expected, those of the teacher's cameras, or null to estimate it"
            )
        for name in ("rgb_weight", "mask_weight"):
            value = vars(self)[name]
            if min(resolve(value, 0.0), resolve(value, 1.0)) < 0:
                raise UserError(f"image_to_3d.{name} is {value}: 0 or more is expected")


def picture_camera(elevation: float, resolution: int) -> Cameras:
    """The camera of a picture: azimuth 0, from which the azimuths of all views are counted."""
    azimuth, phi, distance, fovy = torch.tensor([[0.0], [elevation], [DISTANCE], [FOVY]])
    return orbit(azimuth, phi, distance, fovy, resolution)


@final
class ReferenceView:
    """A picture with the elevation of its camera; checkpoints hold both, so that a resumed run keeps them."""

    def __init__(
        self,
        teacher: Teacher,
        clip: CLIPModel | None,
        picture: Picture,
        elevation: float,
        options: ImageTo3dOptions,
        nfe: int = 0,
    ) -> None:
        """clip: the teacher's own, for its embedding of the picture; nfe: what the estimate of the elevation
        took. Raises `UserError` for a teacher that takes no pictures.
        """
        check_takes_pictures(teacher)
        self.teacher, self.clip, self.options, self.nfe = teacher, clip, options, nfe
        self.estimated = options.elevation is None
        self._set_picture(picture, elevation)

    def _set_picture(self, picture: Picture, elevation: float) -> None:
        """Take over a picture and its elevation in degrees."""
        device = self.teacher.device
        self.picture = Picture(upload(picture.rgb, device), upload(picture.alpha, device))
        self.elevation = elevation
        camera = picture_camera(elevation, picture.rgb.shape[-1])
        self.camera, self.pose = camera.to(device), upload(camera.view_poses(), device)

    def condition(self, backgrounds: Tensor) -> PictureCondition:
        """What the teacher reads of the picture over backgrounds (G, 3), one a group of views."""
        pose = self.pose.expand(len(backgrounds), -1)
        return encode_pictures(self.teacher, self.clip, self.picture.over(backgrounds), pose)

    def errors(self, views: RenderedViews, background: Tensor) -> dict[str, Tensor]:
        """Mean squared errors of the view from the picture's camera over a background (1, 3), by name."""
        return {
            "reference_rgb": (views.rgb - self.picture.over(background)).square().mean(),
            "reference_mask": (views.opacity - self.picture.alpha).square().mean(),
        }

    def weights(self, progress: float) -> dict[str, float]:
        """Their weights at a fraction of the run in [0, 1]."""
        options = self.options
        return {
            "reference_rgb": resolve(options.rgb_weight, progress),
            "reference_mask": resolve(options.mask_weight, progress),
        }

    def psnr(self, render: Tensor, background: Tensor) -> float:
        """PSNR in dB of a render (1, 3, R, R) of the scene from the picture's camera."""
        error = (render - self.picture.over(background.to(render.device))).square().mean()
        return float(-10 * error.clamp_min(1e-10).log10())

    def state_dict(self) -> Mapping[str, Any]:
        """The picture and its elevation."""
        return {"rgb": self.picture.rgb, "alpha": self.picture.alpha, "elevation": self.elevation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over those of another session."""
        self._set_picture(Picture(state["rgb"].cpu(), state["alpha"].cpu()), float(state["elevation"]))
