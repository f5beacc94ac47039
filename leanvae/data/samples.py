"""Reading of training samples: frames of a clip or an image, resized, cropped and flipped by a seeded generator."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.media.errors import MediaError
from leanvae.media.folder import ClipReader, open_clip
from leanvae.media.image import read_image
from leanvae.media.info import Frame
from leanvae.media.item import Item
from leanvae.media.timeline import Timeline
from litevae.errors import extra

with extra("video"):
    import cv2


@dataclass(frozen=True)
class Sample:
    """A decoded clip or image.

    Attributes:
        item: what it comes from.
        frames: (T, H, W, 3) uint8 for a clip, (H, W, 3) for an image; full-range RGB.
        times: (T,) seconds since the file's start for a clip; None for an image.
    """

    item: Item
    frames: NDArray[np.uint8]
    times: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Cut:
    """Where to cut: fractions of the possible range, so that they are drawn before anything is known.

    Attributes:
        window: place of a clip's first frame.
        pace: place in the range of strides or frame rates.
        down, across: place of the crop.
        flip: mirror left to right.
    """

    window: float = 0.5
    down: float = 0.5
    across: float = 0.5
    flip: bool = False
    pace: float = 0.5


def draw_cut(generator: np.random.Generator | None, flip: bool) -> Cut:
    """Draw a cut, flipped half of the time if `flip`; the central one, unflipped, without a generator."""
    if generator is None:
        return Cut()
    window, down, across, flipped, pace = generator.random(5)
    return Cut(window, down, across, flip and flipped < 0.5, pace)


def cut_picture(
    image: NDArray[np.uint8], resolution: tuple[int, int], cut: Cut, short_side: int = 0
) -> NDArray[np.uint8]:
    """Resize a picture to cover (height, width), keeping its aspect, and cut out the chosen part.

    Args:
        image: (H, W, 3) uint8.
        resolution: (height, width).
        cut: which part.
        short_side: what the short side has at least after resizing.

    Returns:
        (height, width, 3) uint8.
    """
    height, width = resolution
    scale = max(height / image.shape[0], width / image.shape[1], short_side / min(image.shape[:2]))
    covering = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    if covering != (image.shape[1], image.shape[0]):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, covering, interpolation=interpolation), np.uint8)
    top = int(cut.down * (image.shape[0] - height + 1))
    left = int(cut.across * (image.shape[1] - width + 1))
    image = image[top : top + height, left : left + width]
    return np.ascontiguousarray(image[:, ::-1] if cut.flip else image)


def read_sample(item: Item, config: DataConfig, bucket: Shape, seed: Sequence[int] | None) -> Iterator[Sample]:
    """Read a clip or an image; what a decoder process runs.

    Args:
        config: for clips a `ClipDataConfig`.
        bucket: the shape that it is cut to.
        seed: of the generator that draws window, stride or rate, crop and flip; None takes the central ones, unflipped.

    Yields:
        The only sample.

    Raises:
        MediaError: the file cannot be used, or is too short; the reason says what is wrong.
        TypeError: a clip, but the configuration of images.
    """
    cut = draw_cut(None if seed is None else np.random.default_rng(seed), config.flip)
    if item.kind == "image":
        yield Sample(item, cut_picture(read_image(item), bucket.resolution, cut, config.short_side or 0))
        return
    if not isinstance(config, ClipDataConfig):
        raise TypeError(f"clips are read by a ClipDataConfig, got {type(config).__name__}")
    with open_clip(item, hdr=config.hdr) as reader:
        frames = read_window(reader, item, config, bucket.frames, cut)
    pictures = [cut_picture(frame.image, bucket.resolution, cut, config.short_side or 0) for frame in frames]
    yield Sample(item, np.stack(pictures), np.asarray([frame.time for frame in frames]))


class Window(NamedTuple):
    """Frames to take.

    Attributes:
        start: index of the first frame with a stride, its time in seconds with a rate.
        stride: every how many frames one is taken.
        fps: frames a second instead.
    """

    start: float
    stride: int = 1
    fps: float | None = None


def read_window(reader: ClipReader, item: Item, config: ClipDataConfig, num_frames: int, cut: Cut) -> Sequence[Frame]:
    """Read the frames that a cut chooses.

    The header says how many frames there are to choose from. Where it proves to be wrong, the packets are counted; a
    window that still runs over the end, as in videos of variable rate, is moved to end with the clip.

    Raises:
        MediaError: the clip is too short, by its packets or its frames, or cannot be read.
    """
    part = (item.start, item.end)
    expected = reader.expect(part)
    if expected is not None:
        try:
            window = choose_window(item.name, expected, num_frames, config, cut)
        except MediaError:  # which counting must confirm
            window = None
        if window is not None:
            frames = _read_frames(reader, item, config, window, expected, num_frames)
            if len(frames) == num_frames:
                return frames
            if expected.listed is not None:  # counting would find the same
                return _read_last(reader, item, window, expected, num_frames)
    counted = reader.measure(part)
    window = choose_window(item.name, counted, num_frames, config, cut)
    frames = _read_frames(reader, item, config, window, counted, num_frames)
    return frames if len(frames) == num_frames else _read_last(reader, item, window, counted, num_frames)


def _read_frames(
    reader: ClipReader, item: Item, config: ClipDataConfig, window: Window, timeline: Timeline, num_frames: int
) -> Sequence[Frame]:
    """Read a window; fewer frames where it runs over the end."""
    start = reader.before(timeline, int(window.start)) if window.fps is None else window.start
    if config.decoder == "decord" and not (item.member or item.frames or item.start or item.end):
        from leanvae.media import decord

        pace = (window.stride, window.fps)
        found = decord.read_window(item.address, reader.info, timeline.first, start, num_frames, *pace)
        if found is not None:
            return found
    return reader.window(start, num_frames, stride=window.stride, fps=window.fps, part=(item.start, item.end))


def _read_last(reader: ClipReader, item: Item, window: Window, timeline: Timeline, num_frames: int) -> Sequence[Frame]:
    """Read the last window of a pace that a clip holds, whatever its timeline promises.

    Raises:
        MediaError: it holds none.
    """
    needed = (num_frames - 1) * window.stride + 1
    step = timeline.seconds / (timeline.count - 1)
    seconds = needed * step if window.fps is None else (num_frames - 1) / window.fps
    back = seconds
    while True:
        start = timeline.last - back
        is_whole = start <= max(item.start, timeline.first)
        try:
            tail = deque(reader.frames(max(start, item.start), item.end), maxlen=needed)
        except MediaError:
            if is_whole:
                raise
            tail = deque()  # behind the last frame
        if window.fps is None and len(tail) == needed:
            return list(tail)[:: window.stride]
        if window.fps is not None and tail and (start <= tail[-1].time - seconds or is_whole):
            found = reader.window(tail[-1].time - seconds, num_frames, fps=window.fps, part=(item.start, item.end))
            if len(found) == num_frames:
                return found
        if is_whole:
            raise MediaError(item.name, f"too short: {len(tail)} frames, {needed} needed")
        back *= 2


def choose_window(name: str, timeline: Timeline, num_frames: int, config: ClipDataConfig, cut: Cut) -> Window:
    """Choose the frames of a clip that a cut stands for.

    Raises:
        MediaError: of `name`: it is too short, or its rate is too low.
    """
    if config.fps is None:
        indices = frames_at_stride(name, timeline.count, num_frames, config.stride, cut)
        return Window(indices.start, indices.step)
    start, rate = points_at_rate(name, timeline, num_frames, config.fps, cut)
    return Window(start, fps=rate)


def usable_frames(count: int, seconds: float, config: ClipDataConfig) -> int:
    """Count the most frames that a sample of a file of `count` frames can have."""
    if config.fps is None:
        return 1 + (count - 1) // config.stride[0]
    return 1 + int(min(count - 1, seconds * config.fps[1]) + 0.5)


def frames_at_stride(name: str, count: int, num_frames: int, stride: tuple[int, int], cut: Cut) -> range:
    """Choose indices of evenly spaced frames; the largest stride is as large as the file's length allows.

    Raises:
        MediaError: of `name`: it has too few frames.
    """
    lowest, highest = stride
    longest = min(highest, (count - 1) // (num_frames - 1))
    if longest < lowest:
        at_stride = f" ({num_frames} at stride {lowest})" if lowest > 1 else ""
        raise MediaError(name, f"too short: {count} frames, {(num_frames - 1) * lowest + 1} needed{at_stride}")
    step = lowest + int(cut.pace * (longest - lowest + 1))
    span = (num_frames - 1) * step + 1
    start = int(cut.window * (count - span + 1))
    return range(start, start + span, step)


def points_at_rate(
    name: str, timeline: Timeline, num_frames: int, fps: tuple[float, float], cut: Cut
) -> tuple[float, float]:
    """Choose the first of evenly spaced points of time, in seconds, and their rate.

    Args:
        fps: lowest and highest rate; the highest is that of the file at most.

    Raises:
        MediaError: of `name`: it is too short, or its own rate is lower than the lowest.
    """
    seconds = timeline.seconds
    own = (timeline.count - 1) / seconds if seconds else 0.0
    if own < 0.95 * fps[0]:  # rates are rounded in names: 23.976 for 24
        raise MediaError(name, f"{own:.3g} frames a second, at least {fps[0]:g} needed")
    # Half a frame is not missed: each point of time takes the nearest one.
    shortest = (num_frames - 1 - 0.5) / seconds
    lowest, highest = max(fps[0], shortest), max(fps[0], min(fps[1], own))
    if lowest > highest:
        raise MediaError(name, f"too short: {seconds:.3g} s, {(num_frames - 1) / highest:.3g} s needed")
    rate = lowest + cut.pace * (highest - lowest)
    return timeline.first + cut.window * max(0.0, seconds - (num_frames - 1) / rate), rate
