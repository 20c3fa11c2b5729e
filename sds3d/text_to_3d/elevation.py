"""The elevation of a picture's camera, from the teacher's denoising error at candidate cameras.

The diffusion classifier (Li et al. 2023, arXiv:2303.16203) over poses: the picture as a single view of a
camera at each candidate elevation and azimuth. One-2-3-45 (Liu et al. 2023, arXiv:2306.16928) matches views
that its teacher predicts nearby instead: that one reads relative cameras only, this one the elevation itself.
"""

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.core.views import POSE
from distill.runtime.transfer import upload
from sds3d.scene.cameras import orbit
from sds3d.text_to_3d.alignment import DISTANCE, FOVY
from sds3d.text_to_3d.stages.orientation import NOISE_LEVELS, denoising_errors

ELEVATIONS = (-5.0, 5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0)  # degrees, in equal steps
AZIMUTHS = 8  # the object's own azimuth is unknown: the best counts
DRAWS = 4  # noise samples a level
NFE = len(ELEVATIONS) * AZIMUTHS * len(NOISE_LEVELS) * DRAWS  # of one estimate


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
