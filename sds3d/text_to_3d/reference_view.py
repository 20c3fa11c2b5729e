"""The picture of an image-to-3D run: its camera, the loss of the view from there, the teacher's condition."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from transformers import CLIPModel

from distill.core.teacher import Teacher
from distill.objectives.options import LinearSchedule, resolve
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from distill.teacher.pictures import PictureCondition, check_takes_pictures, encode_pictures
from sds3d.scene.cameras import CameraOptions
from sds3d.scene.protocol import RenderedViews, Scene3D
from sds3d.text_to_3d.alignment import align_picture, picture_camera
from sds3d.text_to_3d.picture import CutOut, Picture


@dataclass(frozen=True)
class ImageTo3dOptions:
    """The picture's camera, and how closely the scene follows the picture.

    A picture with a caption is aligned to the scene at `align_at`, from where on its view counts. Else the
    teacher is given the picture, azimuths are counted from it, and its view counts from the beginning.

    The weights are of mean squared errors, on the scale of the objective: those of the code of DreamGaussian
    (Tang et al. 2023, arXiv:2309.16653), which raises them from 0, as {start: 0, end: 10000} does here.
    """

    elevation: float | None = None  # degrees of the picture's camera; null: estimated
    rgb_weight: float | LinearSchedule = 10_000.0  # of the view's colours, over a random grey
    mask_weight: float | LinearSchedule = 1_000.0  # of its opacity
    elevation_judge: str | None = (
        "elevation64"  # reads the elevation of a picture without a caption; null: by the denoising error
    )
    align_at: float = 0.5  # fraction of the run, with a caption

    def __post_init__(self) -> None:
        low, high = CameraOptions().elevation
        if self.elevation is not None and not low <= self.elevation <= high:
            raise UserError(
                f"image_to_3d.elevation is {self.elevation:g}: degrees within [{low:g}, {high:g}] are "
                "expected, those of the teacher's cameras, or null to estimate it"
            )
        if not 0 <= self.align_at < 1:
            raise UserError(f"image_to_3d.align_at is {self.align_at}: a fraction in [0, 1) is expected")
        for name in ("rgb_weight", "mask_weight"):
            value = vars(self)[name]
            if min(resolve(value, 0.0), resolve(value, 1.0)) < 0:
                raise UserError(f"image_to_3d.{name} is {value}: 0 or more is expected")


@final
class ReferenceView:
    """A picture with the angles of its camera; checkpoints hold all, so that a resumed run keeps them.

    With a caption it is `active`, its view counts, once it is aligned to the scene; else from the beginning.
    """

    def __init__(
        self,
        teacher: Teacher,
        clip: CLIPModel | None,
        cut_out: CutOut,
        elevation: float,
        options: ImageTo3dOptions,
        nfe: int = 0,
        has_caption: bool = False,
    ) -> None:
        """clip: the teacher's own, for its embedding of the picture; elevation in degrees, with a caption
        until it is aligned; nfe: what its estimate took. Raises `UserError` for a teacher that takes no
        pictures.
        """
        check_takes_pictures(teacher)
        self.teacher, self.clip, self.options, self.nfe = teacher, clip, options, nfe
        self.cut_out, self.has_caption, self.active = cut_out, has_caption, not has_caption
        self.estimated = options.elevation is None
        self._set_picture(cut_out.picture(teacher.resolution), 0.0, elevation)

    def _set_picture(self, picture: Picture, azimuth: float, elevation: float) -> None:
        """Take over a picture and its angles in degrees."""
        device = self.teacher.device
        self.picture = Picture(upload(picture.rgb, device), upload(picture.alpha, device))
        self.azimuth, self.elevation = azimuth, elevation
        camera = picture_camera(azimuth, elevation, picture.rgb.shape[-1])
        self.camera, self.pose = camera.to(device), upload(camera.view_poses(), device)

    def aligned_from(self, steps: int) -> int | None:
        """The step of a run of `steps` at which it is aligned to the scene; None without a caption."""
        return round(self.options.align_at * steps) if self.has_caption else None

    def align(self, scene: Scene3D) -> None:
        """Take over the camera from which a scene looks most like the picture, and become active.

        A scene without any opaque view leaves the camera as it is.
        """
        resolution = self.teacher.resolution
        alignment = align_picture(scene, self.cut_out, resolution, self.options.elevation)
        if alignment is not None:
            picture = self.cut_out.picture(resolution, alignment.frame)
            self._set_picture(picture, alignment.azimuth, alignment.elevation)
        self.active = True

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
        """The picture, its angles, and whether it is active."""
        angles = {"azimuth": self.azimuth, "elevation": self.elevation}
        return {"rgb": self.picture.rgb, "alpha": self.picture.alpha, **angles, "active": self.active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over those of another session."""
        picture = Picture(state["rgb"].cpu(), state["alpha"].cpu())
        self._set_picture(picture, float(state["azimuth"]), float(state["elevation"]))
        self.active = bool(state["active"])
