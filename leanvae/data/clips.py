"""Reading of training clips: a window of frames, resized, cropped and flipped by a seeded generator; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig
from leanvae.data.cutting import Cut, cut_picture, draw_cut
from leanvae.data.decoding import DecoderDisagrees, decode_window, read_frame_table
from leanvae.data.sources import Clip
from leanvae.media.errors import MediaError


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


def read_clip(clip: Clip, config: ClipDataConfig, bucket: Shape, generator: np.random.Generator | None) -> ClipSample:
    """Reads a bucket's frames at the configured stride or rate, resized to cover its picture and cropped.

    Args:
        generator: draws window, stride or rate, crop and flip; None takes the central ones, unflipped.

    Raises:
        MediaError: the file is no usable video, or too short; the reason says what is wrong.
    """
    cut = draw_cut(generator, config.flip)
    table = read_frame_table(clip)

    def choose(count: int) -> Sequence[int]:
        if config.fps is None:
            return frames_at_stride(clip.path, count, bucket.frames, config.stride, cut)
        times = table.times if count == len(table.times) else np.arange(count) / float(table.info.fps or 25)
        return frames_at_rate(clip.path, times, bucket.frames, config.fps, cut)

    for backend, timed_images in decode_window(clip, table, choose):
        frames, times = [], []
        try:
            for image, time in timed_images:
                frames.append(cut_picture(image, bucket.resolution, cut))
                times.append(time)
        except DecoderDisagrees:
            continue
        return ClipSample(clip, np.stack(frames), np.asarray(times), backend)
    raise AssertionError("the last way of decoding raises no DecoderDisagrees")


def usable_frames(count: int, seconds: float, config: ClipDataConfig) -> int:
    """The most frames that a sample of a file of `count` frames can have."""
    if config.fps is None:
        return 1 + (count - 1) // config.stride[0]
    return 1 + int(min(count - 1, seconds * config.fps[1]) + 0.5)


def frames_at_stride(path: str, count: int, num_frames: int, stride: tuple[int, int], cut: Cut) -> Sequence[int]:
    """Indices of evenly spaced frames; the largest stride is as large as the file's length allows.

    Raises:
        MediaError: of `path`: it has too few frames.
    """
    lowest, highest = stride
    longest = min(highest, (count - 1) // (num_frames - 1))
    if longest < lowest:
        at_stride = f" ({num_frames} at stride {lowest})" if lowest > 1 else ""
        raise MediaError(path, f"too short: {count} frames, {(num_frames - 1) * lowest + 1} needed{at_stride}")
    step = lowest + int(cut.pace * (longest - lowest + 1))
    span = (num_frames - 1) * step + 1
    start = int(cut.window * (count - span + 1))
    return range(start, start + span, step)


def frames_at_rate(
    path: str, times: NDArray[np.float64], num_frames: int, fps: tuple[float, float], cut: Cut
) -> Sequence[int]:
    """Indices of the frames nearest to evenly spaced points of time; in a file of variable rate one may come twice.

    Args:
        times: (N,) seconds of the file's frames, ascending.
        fps: lowest and highest rate; the highest is that of the file at most.

    Raises:
        MediaError: of `path`: it is too short, or its own rate is lower than the lowest.
    """
    seconds = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    own = (len(times) - 1) / seconds if seconds else 0.0
    if own < 0.95 * fps[0]:  # rates are rounded in names: 23.976 for 24
        raise MediaError(path, f"{own:.3g} frames a second, at least {fps[0]:g} needed")
    # Half a frame is not missed: each point of time takes the nearest one.
    shortest = (num_frames - 1 - 0.5) / seconds
    lowest, highest = max(fps[0], shortest), max(fps[0], min(fps[1], own))
    if lowest > highest:
        raise MediaError(path, f"too short: {seconds:.3g} s, {(num_frames - 1) / highest:.3g} s needed")
    rate = lowest + cut.pace * (highest - lowest)
    start = times[0] + cut.window * max(0.0, seconds - (num_frames - 1) / rate)
    points = start + np.arange(num_frames) / rate
    after = np.searchsorted(times, points).clip(1, len(times) - 1)
    return (after - (points - times[after - 1] <= times[after] - points)).tolist()
