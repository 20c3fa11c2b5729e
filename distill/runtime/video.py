"""Frames to video and animation files that every player reads."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from distill.runtime.images import to_bytes


def _pixels(frames: Tensor, fps: float) -> np.ndarray:
    """Frames (F, 3, H, W) in [0, 1] as (F, H, W, 3) uint8.

    Raises `UserError` for another shape, no frame and a frame rate that is not above zero.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        shape = tuple(frames.shape)
        raise UserError(f"frames have shape {shape}: expected (frames, 3, height, width), at least one frame")
    if not fps > 0:
        raise UserError(f"fps is {fps}: give a number above zero")
    return to_bytes(frames)


def save_video(frames: Tensor, path: Path | str, fps: float = 24) -> Path:
    """Write an H.264 .mp4 (yuv420p, index first); an odd height or width grows by one repeated row or column.

    Raises `UserError` for invalid frames, another suffix, and where imageio-ffmpeg finds no ffmpeg.
    """
    import imageio.v3 as iio
    from imageio_ffmpeg import get_ffmpeg_exe

    pixels = _pixels(frames, fps)
    if Path(path).suffix != ".mp4":
        raise UserError(f"{path} is no video file name: it must end in .mp4")
    try:
        get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(
            f"no ffmpeg for {path} ({error}): pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
        ) from None

    # yuv420p stores colour at half the resolution, so both sides must be even
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    options: dict[str, Any] = {"fps": fps, "codec": "libx264", "macro_block_size": 2, "quality": None}
    options["output_params"] = ["-crf", "16", "-movflags", "+faststart"]  # crf 16 is visually lossless
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, pixels, plugin="FFMPEG", **options)
        if not temporary.is_file():
            raise OSError(f"ffmpeg wrote nothing for {path}")
    return Path(path)


def save_animation(frames: Tensor, path: Path | str, fps: float = 24) -> Path:
    """Write an endless .gif (an octree palette per frame, times in hundredths of a second) or .webp.

    Raises `UserError` for invalid frames or another suffix.
    """
    kind, pixels = Path(path).suffix, _pixels(frames, fps)
    if kind not in (".gif", ".webp"):
        raise UserError(f"{path} is no animation file name: it must end in .gif or .webp")

    # imageio would pass the frames on to Pillow too, but without a choice of the palette
    images, duration = [Image.fromarray(frame) for frame in pixels], round(1000 / fps)
    options: dict[str, Any] = {"quality": 90, "method": 4}
    if kind == ".gif":
        images = [image.quantize(method=Image.Quantize.FASTOCTREE) for image in images]
        options, duration = {"disposal": 1}, max(round(100 / fps), 2) * 10  # players slow down below 20 ms
    options |= {"duration": duration, "loop": 0}
    with atomic_path(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], **options)
    return Path(path)
