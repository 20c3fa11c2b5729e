"""Frames to files that every player takes."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from distill.runtime.images import to_bytes


def _pixels(frames: Tensor, fps: float) -> np.ndarray:
    """Frames as (F, H, W, 3) bytes. Raises `UserError` for another shape, no frame, or a rate that is not above zero."""
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise UserError(
            f"frames have shape {tuple(frames.shape)}: expected (frames, 3, height, width) with at least one frame"
        )
    if not fps > 0:
        raise UserError(f"fps is {fps}: give a number above zero")
    return to_bytes(frames)


def save_video(frames: Tensor, path: Path | str, fps: float = 24) -> Path:
    """H.264 in an .mp4 that every player takes (yuv420p, index first); an odd height or width grows by one repeated line.

    Raises `UserError` for wrong frames, another suffix, and where imageio-ffmpeg finds no ffmpeg.
    """
    from imageio_ffmpeg import get_ffmpeg_exe, write_frames

    pixels = _pixels(frames, fps)
    if Path(path).suffix != ".mp4":
        raise UserError(f"{path} is no video file name: it must end in .mp4")
    try:
        get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(
            f"no ffmpeg for {path} ({error}): pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
        ) from None
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    options = [
        "-crf",
        "16",
        "-movflags",
        "+faststart",
    ]  # crf 16 is visually lossless; file size does not matter here
    with atomic_path(path) as temporary:
        size = (pixels.shape[2], pixels.shape[1])
        writer = write_frames(
            str(temporary), size, fps=fps, codec="libx264", macro_block_size=2, output_params=options
        )
        writer.send(None)
        for frame in pixels:
            writer.send(frame)
        writer.close()
        if not temporary.is_file():
            raise OSError(f"ffmpeg wrote nothing for {path}")
    return Path(path)


def save_animation(frames: Tensor, path: Path | str, fps: float = 24) -> Path:
    """An endless .gif, each frame with its own octree palette (fast; the format counts hundredths of a second), or .webp.

    Raises `UserError` for wrong frames or another suffix.
    """
    kind, pixels = Path(path).suffix, _pixels(frames, fps)
    if kind not in (".gif", ".webp"):
        raise UserError(f"{path} is no animation file name: it must end in .gif or .webp")
    images, options = [Image.fromarray(frame) for frame in pixels], {"quality": 90, "method": 4}
    duration = round(1000 / fps)
    if kind == ".gif":
        images, options = (
            [image.quantize(method=Image.Quantize.FASTOCTREE) for image in images],
            {"disposal": 1},
        )
        duration = max(round(100 / fps), 2) * 10  # players slow anything below 20 ms down
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=duration, loop=0, **options
        )
    return Path(path)
