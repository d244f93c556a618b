"""Encodes images as GIF or MP4."""

import importlib.util
import io
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.rundir import write_output

FPS, FPS_OF_GAMES = 30, 2
"""Default images per second; fewer for board games, in which each image is a move."""
MAX_FPS_OF_GIF = 50
"""GIF files count time in hundredths of a second; viewers slow down images shorter than two."""


def check_video(path: Path, fps: int) -> None:
    """Check a file to write, and its images per second, before the images are made.

    Raises:
        ConfigError: if the file exists, it is neither a GIF nor an MP4, or cannot be written with
            the installed packages.
    """
    if os.path.lexists(path):
        raise ConfigError(f"file {str(path)!r}: already exists; choose another name")
    kind = path.suffix.lower()
    if kind not in (".gif", ".mp4", ".html"):
        raise ConfigError(f"file {str(path)!r}: must end in .gif, .mp4 or .html")
    if fps < 1:
        raise ConfigError(f"fps = {fps}: must be at least 1")
    if kind != ".mp4" and fps > MAX_FPS_OF_GIF:
        raise ConfigError(f"fps = {fps}: a GIF can have at most {MAX_FPS_OF_GIF}; write an .mp4")
    if kind == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ConfigError(
            f"file {str(path)!r}: MP4 files need imageio-ffmpeg; pip install 'purejaxppo[video]'"
        )


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> int:
    """Write images `[H, W, 3]` as .gif or .mp4 and return their number; `check_video` checks the
    arguments.

    Raises:
        StorageError: if the file cannot be written.
    """
    count = itertools.count()
    counted = (frame for frame, _ in zip(frames, count, strict=False))
    encode = gif if path.suffix.lower() == ".gif" else _mp4
    write_output(path, encode(counted, fps))
    return next(count)


def gif(frames: Iterator[np.ndarray], fps: int) -> bytes:
    """Images `[H, W, 3]` as an animated GIF."""
    images = map(_indexed, frames)
    file = io.BytesIO()
    next(images).save(
        file, "GIF", save_all=True, append_images=images, loop=0, duration=round(100 / fps) * 10
    )
    return file.getvalue()


def _indexed(frame: np.ndarray) -> Any:
    """An image with a palette, which loses nothing if the frame has at most 256 colours."""
    from PIL import Image

    packed = frame.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > 256:
        return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    image = Image.fromarray(index.reshape(packed.shape).astype(np.uint8))
    palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


def _mp4(frames: Iterator[np.ndarray], fps: int) -> bytes:
    import imageio_ffmpeg

    first = _even(next(frames))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "video.mp4")
        writer = imageio_ffmpeg.write_frames(
            str(file), first.shape[1::-1], fps=fps, quality=8, macro_block_size=1
        )
        writer.send(None)
        for frame in itertools.chain([first], map(_even, frames)):
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return file.read_bytes()


def _even(frame: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of an odd number: MP4 needs even ones."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
