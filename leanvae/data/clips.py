"""Reading of training clips: a window of frames, resized, cropped and flipped by a seeded generator; no torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanvae.data.config import DataConfig
from leanvae.data.decoding import DecoderDisagrees, decode_window, read_frame_table
from leanvae.data.sources import Clip
from leanvae.media import MediaError, cv2


@dataclass(frozen=True)
class ClipSample:
    """A decoded clip.

    Attributes:
        clip: where it comes from.
        frames: (T, H, W, 3) uint8, full-range RGB.
        times: (T,) seconds since the file's start.
        backend: ``decord``, ``pyav``, or ``pyav counting`` for files with timestamps out of order.
    """

    clip: Clip
    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    backend: str


@dataclass(frozen=True)
class _Choice:
    """Where to cut: fractions of the possible range, so that they are drawn before anything is known."""

    window: float = 0.5
    down: float = 0.5
    across: float = 0.5
    flip: bool = False


def read_clip(clip: Clip, config: DataConfig, generator: np.random.Generator | None) -> ClipSample:
    """Reads ``config.num_frames`` frames, ``config.stride`` apart, resized to cover ``config.resolution``.

    Args:
        generator: draws the window, the crop and the flip; None takes the central ones, unflipped.

    Raises:
        MediaError: the file is no usable video, or too short; the reason says what is wrong.
    """
    choice = _Choice()
    if generator is not None:
        window, down, across, flip = generator.random(4)
        choice = _Choice(window, down, across, config.flip and flip < 0.5)
    table = read_frame_table(clip)

    def choose(count: int) -> Sequence[int]:
        if count < config.span:
            at_stride = f" ({config.num_frames} at stride {config.stride})" if config.stride > 1 else ""
            raise MediaError(clip.path, f"too short: {count} frames, {config.span} needed{at_stride}")
        start = int(choice.window * (count - config.span + 1))
        return range(start, start + config.span, config.stride)

    height, width = config.resolution
    for backend, timed_images in decode_window(clip, table, choose):
        frames, times = [], []
        try:
            for image, time in timed_images:
                frames.append(_cut_frame(image, height, width, choice))
                times.append(time)
        except DecoderDisagrees:
            continue
        return ClipSample(clip, np.stack(frames), np.asarray(times), backend)
    raise AssertionError("the last way of decoding raises no DecoderDisagrees")


def _cut_frame(image: NDArray[np.uint8], height: int, width: int, choice: _Choice) -> NDArray[np.uint8]:
    """Resizes a frame to cover (height, width), keeping its aspect, and cuts out the chosen part."""
    scale = max(height / image.shape[0], width / image.shape[1])
    covering = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    if covering != (image.shape[1], image.shape[0]):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, covering, interpolation=interpolation), np.uint8)
    top = int(choice.down * (image.shape[0] - height + 1))
    left = int(choice.across * (image.shape[1] - width + 1))
    image = image[top : top + height, left : left + width]
    return np.ascontiguousarray(image[:, ::-1] if choice.flip else image)


def decode_sample(clip: Clip, config: DataConfig, seed: Sequence[int] | None) -> ClipSample:
    """What a decoder process runs: :func:`read_clip` with the generator of ``seed``, or centrally without one."""
    return read_clip(clip, config, None if seed is None else np.random.default_rng(seed))


def warm_up() -> None:
    """Prepares a decoder process.

    It leaves the run's process group, so that a signal to the group lets the trainer alone decide what happens, and
    takes one thread, since there are several processes.
    """
    os.setsid()
    cv2.setNumThreads(1)
