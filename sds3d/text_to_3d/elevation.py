"""The elevation of a picture's camera, read off by a judge, or from the teacher's denoising error.

A judge that reads the column `elevation` is trained on renders of any shapes (Era3D, Li et al. 2024,
arXiv:2405.11616, regresses it too). Without one, the teacher's error is compared over candidate cameras: the
diffusion classifier (Li et al. 2023, arXiv:2303.16203) over poses, the picture as a single view. One-2-3-45
(Liu et al. 2023, arXiv:2306.16928) matches views that its teacher predicts nearby instead: that one reads
relative cameras only, this one the elevation itself.
"""

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.evaluation.judge import load_judge, read_directions
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.cameras import CameraOptions, orbit
from sds3d.text_to_3d.alignment import DISTANCE, FOVY
from sds3d.text_to_3d.picture import CutOut
from sds3d.text_to_3d.stages.orientation import NOISE_LEVELS, denoising_errors

ELEVATION = "elevation"  # the judge's direction
GREYS = (0.3, 0.5, 0.7, 0.9)  # backgrounds
ELEVATIONS = (-5.0, 5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0)  # degrees, in equal steps
AZIMUTHS = 8  # the object's own azimuth is unknown: the best counts
DRAWS = 4  # noise samples a level
NFE = len(ELEVATIONS) * AZIMUTHS * len(NOISE_LEVELS) * DRAWS  # of one estimate


def read_elevation(name: str, cut_out: CutOut, device: torch.device | str = "cpu") -> float:
    """Degrees of elevation that a judge, by name or folder, reads off a picture, within the cameras' range.

    The mean over several grey backgrounds. Raises `UserError` for a judge that does not read elevations.
    """
    judge = load_judge(name, device)
    if ELEVATION not in judge.options.directions:
        raise UserError(
            f"the judge {name} does not read the direction {ELEVATION}: give "
            "image_to_3d.elevation_judge= one that does, or null"
        )
    greys = torch.tensor(GREYS)[:, None].expand(-1, 3)
    angles = read_directions(judge, cut_out.picture(judge.resolution).over(greys))[ELEVATION]
    low, high = CameraOptions().elevation
    return min(max(float(angles.mean()), low), high)


@torch.no_grad()
def estimate_elevation(teacher: Teacher, picture: Tensor, prompt: str = "", seed: int = 0) -> float:
    """Degrees of elevation of the camera of a picture (1, 3, R, R) in [0, 1], which shows one object.

    The teacher must be conditioned on cameras. The minimum over the azimuths, refined by a parabola.
    """
    angles = torch.cartesian_prod(torch.tensor(ELEVATIONS), 360.0 / AZIMUTHS * torch.arange(AZIMUTHS))
    distance, fovy = (torch.full((len(angles),), value) for value in (DISTANCE, FOVY))
    cameras = orbit(angles[:, 1], angles[:, 0], distance, fovy, teacher.resolution)
    poses = upload(cameras.view_poses(), teacher.device)

    candidates = teacher.encode_text([prompt]).expand(len(poses)).with_extras(**{POSE: poses}).split(1)
    latents = teacher.encode_images(picture.to(teacher.device))
    generator = torch.Generator().manual_seed(seed)
    errors = denoising_errors(teacher, latents, candidates, DRAWS, generator).mean((0, 1))
    return parabola_minimum(errors.view(len(ELEVATIONS), AZIMUTHS).amin(1).cpu())


def parabola_minimum(errors: Tensor) -> float:
    """Where the parabola through the least of the errors (K,) at `ELEVATIONS` and its neighbours is least."""
    best = int(errors.argmin())
    if best in (0, len(ELEVATIONS) - 1):
        return ELEVATIONS[best]
    before, least, after = errors[best - 1 : best + 2].double().tolist()
    curvature = before - 2 * least + after
    offset = 0.0 if curvature <= 0 else 0.5 * (before - after) / curvature
    return ELEVATIONS[best] + offset * (ELEVATIONS[1] - ELEVATIONS[0])
