"""The page's pictures of a clip: frames before and after, the latent, and the most visible blocks."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leanvae.evaluation.records import SOURCE, folder_name
from leanvae.media.writer import VideoWriter, write_png
from leanvae.metrics.artefacts import BlockWindow
from litevae.analysis import latents_as_rgb
from litevae.pixels import to_bytes

SHOWN_FRAMES = 120  # of a clip; the page is for viewing, not for archiving
_SHOWN_CHANNELS = 16
_COLUMNS = 4  # of latent channels in a picture


def picture_paths(clip: str, model: str, is_video: bool) -> dict[str, str]:
    """Return a clip's and model's files relative to the media folder: `frames`, and for models `latent`, `blocks`."""
    stem = f"{clip}/{SOURCE if model == SOURCE else folder_name(model)}"
    paths = {"frames": f"{stem}.{'mp4' if is_video else 'png'}"}
    if model != SOURCE:
        paths |= {"latent": f"{stem}.latent.png", "blocks": f"{stem}.blocks.png"}
    return paths


class FrameWriter:
    """A writer of a clip's first frames as an mp4 file, or of an image as PNG; use it in a `with` block.

    Sides of clips are made even by repeating the last row and column, because browsers fail on odd ones.

    Args:
        path: the file; nothing is written if None.
        is_video: whether it is a clip.
        rate: frames per second.
    """

    def __init__(self, path: Path | None, is_video: bool, rate: Fraction) -> None:
        self._path, self._is_video, self._rate = path, is_video, rate
        self._writer: VideoWriter | None = None
        self.num_frames = 0

    def __enter__(self) -> "FrameWriter":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, frames: Tensor) -> None:
        """Add frames `(N, 3, H, W)` in [0, 1]."""
        if self._path is None:
            return
        for image in to_bytes(frames[: SHOWN_FRAMES - self.num_frames]):
            self.num_frames += 1
            if not self._is_video:
                write_png(self._path, image)
                continue
            even = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            if self._writer is None:
                height, width = even.shape[:2]
                self._writer = VideoWriter(self._path, width, height, time_base=1 / self._rate, rate=self._rate)
                self._writer.__enter__()
            self._writer.write(even)

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)  # pyright: ignore[reportArgumentType]


def write_latent(path: Path, latent: Tensor) -> None:
    """Draw the channels of a latent `(Z, h, w)` in grey, each stretched to its own range, four in a row."""
    channels = to_bytes(latents_as_rgb(latent[:_SHOWN_CHANNELS, None]))  # Z h w 3
    count, height, width = channels.shape[:3]
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 128, np.uint8)
    for index, channel in enumerate(channels):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = channel
    write_png(path, canvas)


def write_blocks(path: Path, window: BlockWindow) -> None:
    """Draw the window of reference and reconstruction side by side (LeanVAE, Figure 4)."""
    assert window.reference is not None
    assert window.output is not None
    write_png(path, np.concatenate(to_bytes(torch.stack((window.reference, window.output))), axis=1))
