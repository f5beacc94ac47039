"""Held-out files beside their reconstructions: as one picture, as an animation, and as files."""

import io
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvae.media.writer import VideoWriter, write_png

_NUM_KEPT = 3  # steps whose reconstructions stay


@dataclass(frozen=True)
class Comparison:
    """A held-out file and its reconstruction.

    Attributes:
        name: name of the file.
        frames: uint8 `(T, H, 2W, 3)`, the file's on the left and the reconstruction's on the right; T = 1 for an image.
        rate: frames per second; None for an image.
        row: uint8 `(H, W', 3)`; see `leanvae.metrics.clips.picture_row`.
    """

    name: str
    frames: NDArray[np.uint8]
    rate: float | None
    row: NDArray[np.uint8]


def picture(comparisons: Sequence[Comparison]) -> NDArray[np.uint8]:
    """Return all comparisons as uint8 `(H', W', 3)`, a row each."""
    rows = [comparison.row for comparison in comparisons]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])


def animation(clip: Comparison) -> bytes:
    """Return a clip as an endlessly repeated GIF."""
    assert clip.rate
    first, *others = (Image.fromarray(frame) for frame in clip.frames)
    file = io.BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=others, duration=round(1000 / clip.rate), loop=0)
    return file.getvalue()


def write_comparisons(root: Path, step: int, comparisons: Sequence[Comparison]) -> list[Path]:
    """Write an mp4 file of each clip and a PNG of each image, and remove all except the last few steps' files.

    Args:
        root: gets a folder for the step.
        step: number of steps taken.
        comparisons: what to write.

    Returns:
        The files, in the order of `comparisons`.
    """
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [_write(folder, number, each) for number, each in enumerate(comparisons)]
    for old in sorted(root.glob("step_*"), key=lambda path: path.stat().st_mtime_ns)[:-_NUM_KEPT]:
        shutil.rmtree(old)
    return files


def _write(folder: Path, number: int, comparison: Comparison) -> Path:
    name = re.sub(r"[^\w.-]+", "_", Path(comparison.name).stem)
    if comparison.rate is None:
        path = folder / f"{number:02d}_{name}.png"
        write_png(path, comparison.frames[0])
        return path
    path = folder / f"{number:02d}_{name}.mp4"
    height, width = comparison.frames.shape[1:3]
    rate = Fraction(comparison.rate).limit_denominator(1001)
    with VideoWriter(path, width, height, time_base=1 / rate, rate=rate) as writer:
        for frame in comparison.frames:
            writer.write(frame)
    return path
