"""Reading of training clips: a window of frames, resized, cropped and flipped by a seeded generator; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanvae.data.config import ClipDataConfig
from leanvae.data.cutting import cut_picture, draw_cut
from leanvae.data.decoding import DecoderDisagrees, decode_window, read_frame_table
from leanvae.data.sources import Clip
from leanvae.media import MediaError


@dataclass(frozen=True)
class ClipSample:
    """A decoded clip.

    Attributes:
        item: the clip that it comes from.
        frames: (T, H, W, 3) uint8, full-range RGB.
        times: (T,) seconds since the file's start.
        backend: ``decord``, ``pyav``, or ``pyav counting`` for files with timestamps out of order.
    """

    item: Clip
    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    backend: str


def read_clip(
    clip: Clip, config: ClipDataConfig, resolution: tuple[int, int], generator: np.random.Generator | None
) -> ClipSample:
    """Reads ``config.num_frames`` frames, ``config.stride`` apart, resized to cover ``resolution`` and cropped.

    Args:
        resolution: (height, width) in pixels.
        generator: draws the window, the crop and the flip; None takes the central ones, unflipped.

    Raises:
        MediaError: the file is no usable video, or too short; the reason says what is wrong.
    """
    cut = draw_cut(generator, config.flip)
    table = read_frame_table(clip)

    def choose(count: int) -> Sequence[int]:
        if count < config.span:
            at_stride = f" ({config.num_frames} at stride {config.stride})" if config.stride > 1 else ""
            raise MediaError(clip.path, f"too short: {count} frames, {config.span} needed{at_stride}")
        start = int(cut.window * (count - config.span + 1))
        return range(start, start + config.span, config.stride)

    for backend, timed_images in decode_window(clip, table, choose):
        frames, times = [], []
        try:
            for image, time in timed_images:
                frames.append(cut_picture(image, resolution, cut))
                times.append(time)
        except DecoderDisagrees:
            continue
        return ClipSample(clip, np.stack(frames), np.asarray(times), backend)
    raise AssertionError("the last way of decoding raises no DecoderDisagrees")
