"""An object cut out of a picture with a plain background: colour statistics of the border, connected regions.

Images are numpy arrays (H, W, 3) in [0, 1].
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from distill.runtime.errors import UserError

BORDER = 0.03  # width of the border, as a fraction of the shorter side
MIN_TOLERANCE, MAX_TOLERANCE = 0.08, 0.16  # RGB distance up to which a pixel is background
MAX_DEVIATION = 0.05  # robust standard deviation of a plain border's colours
MIN_PLAIN = 0.75  # fraction of the border that the background covers; an object may touch the rest
FITS = 6  # of the background's colours, each without the outliers of the last
MIN_HOLE = 0.0005  # of the image; smaller enclosed regions of the background's colour are the object's
OPENING = 3  # radius in pixels of the smallest part of an object that differs little from the background
MIN_PIECE = 0.05  # of the largest piece of the object: smaller ones are specks
EDGE = 4  # pixels outwards within which the object's own colour is looked for

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def cut_out(image: Array, name: str) -> tuple[Array, Array]:
    """Colours (H, W, 3) without the background's, and alpha (H, W), of the object in an image.

    Raises `UserError`, which calls the image `name`, where the border is not plain or nothing is left.
    """
    background, tolerance = fit_background(image, name)
    distance = np.linalg.norm(image - background, axis=2)
    mask = object_mask(distance, tolerance)
    if not mask.any():
        raise UserError(
            f"nothing in {name} stands out from its background: give a picture with a background of another "
            "colour, or a cut-out (a PNG with transparency)"
        )
    return matte(image, background, mask)


def fit_background(image: Array, name: str) -> tuple[Array, float]:
    """The background's colours (H, W, 3), quadratic in the position, and the tolerance of its pixels.

    Fitted to the border by least squares, without outliers: an object may touch it, light may fall off.
    """
    height, width = image.shape[:2]
    ring = max(round(BORDER * min(height, width)), 1)
    inner = np.zeros((height, width), bool)
    inner[ring:-ring, ring:-ring] = True
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    colours, places = image[~inner], basis[~inner]

    residual = np.linalg.norm(colours - np.median(colours, axis=0), axis=1)
    for _ in range(FITS):
        inliers = residual <= max(2.5 * float(np.median(residual)), 0.02)
        coefficients = np.linalg.lstsq(places[inliers], colours[inliers], rcond=None)[0]
        residual = np.linalg.norm(colours - places @ coefficients, axis=1)
    deviation = float(np.median(residual))
    tolerance = float(np.clip(4 * deviation, MIN_TOLERANCE, MAX_TOLERANCE))
    plain = float((residual < tolerance).mean())
    if plain < MIN_PLAIN or deviation > MAX_DEVIATION:
        raise UserError(
            f"the border of {name} is not plain (one colour covers {plain:.0%} of it): give a picture with a "
            "plain background, or a cut-out (a PNG with transparency)"
        )
    return basis @ coefficients, tolerance


def object_mask(distance: Array, tolerance: float) -> Mask:
    """Pixels (H, W) of the object, from each pixel's distance to the background's colour.

    Background is what has its colour and touches the image's border, and what is seen through holes.
    """
    similar = distance < tolerance
    regions, areas, outside = _regions(similar)
    closeness = ndimage.sum_labels(distance, regions, np.arange(len(areas))) / np.maximum(areas, 1)
    holes = (areas >= MIN_HOLE * distance.size) & (closeness < tolerance / 2)
    mask = ~((outside | holes)[regions] & similar)

    # Around what differs much, compression leaves patches that differ little: only wide ones are the object.
    strong = mask & (distance >= 2 * tolerance)
    mask = strong | ndimage.binary_opening(mask & ~strong, iterations=OPENING)
    regions, areas, outside = _regions(~mask)
    mask |= ((areas < MIN_HOLE * distance.size) & ~outside)[regions]

    pieces, areas, _ = _regions(mask)
    areas[0] = 0
    return (areas >= max(MIN_PIECE * areas.max(), 1))[pieces]


def _regions(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64], Mask]:
    """Connected regions of a mask, numbered from 1, 0 elsewhere (H, W); by number, the pixels of each and
    whether it touches the image's border.
    """
    regions, count = ndimage.label(mask)
    outside = np.zeros(count + 1, bool)
    outside[np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])] = True
    return regions, np.bincount(regions.flatten(), minlength=count + 1), outside


def matte(image: Array, background: Array, mask: Mask) -> tuple[Array, Array]:
    """Colours and alpha of the object; at its edge alpha is how far a pixel is from the background's colour.

    The object's own colour there is that of the nearest pixel inside; parts too thin for one are opaque.
    """
    inside = ndimage.binary_erosion(mask, iterations=2)  # edges of photographs are blurred
    edge = ndimage.binary_dilation(mask) & ~inside
    distance, (rows, columns) = ndimage.distance_transform_edt(~inside, return_indices=True)
    edge &= distance <= EDGE
    own = image[rows, columns]
    contrast = own - background
    alpha = mask.astype(np.float64)
    projected = ((image - background) * contrast).sum(2) / np.maximum((contrast**2).sum(2), 1e-6)
    alpha[edge] = projected.clip(0, 1)[edge]
    return np.where(edge[..., None], own, image), alpha
