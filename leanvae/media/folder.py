"""Clips that are folders of numbered images or animated WebP files, read as videos are; free of torch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from leanvae.media.errors import MediaError
from leanvae.media.image import ANIMATION_SUFFIX, open_animation, read_image
from leanvae.media.info import Frame, VideoInfo
from leanvae.media.item import Hdr, Item, open_item, read_item
from leanvae.media.timeline import TIME_SLACK, WHOLE, Part, Timeline
from leanvae.media.video import VideoReader
from leanvae.media.worker import show_life

_DEFAULT_RATE = 25


class PictureReader:
    """A folder of numbered images or an animated WebP, with the methods of `VideoReader`.

    Args:
        item: a folder, with the names of its images, whose rate is `columns["fps"]`, 25 by default; or a WebP file.

    Attributes:
        rate: average frames per second.

    Raises:
        MediaError: the rate is not a positive number; or the file is no animation, or cut.
        OSError: a remote file cannot be read.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        self._info: VideoInfo | None = None
        if item.frames:
            self.rate = self._rate(item.columns.get("fps") or _DEFAULT_RATE)
            self._times = np.arange(len(item.frames)) / self.rate
            self._duration = len(item.frames) / self.rate
            self._image = self._image_of_folder
        else:
            durations, self._image = open_animation(item.name, read_item(item))
            self._times = np.cumsum([0.0, *durations[:-1]])
            self._duration = sum(durations)
            self.rate = len(durations) / self._duration

    def _rate(self, value: Any) -> float:
        try:
            rate = float(value)
        except (TypeError, ValueError):
            rate = math.nan
        if not 0 < rate < math.inf:
            raise MediaError(self._item.name, f"fps: expected frames per second, above 0, got {value!r}")
        return rate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing, because nothing is held open."""

    @property
    def info(self) -> VideoInfo:
        """What the number of images, their times and the first of them say."""
        if self._info is None:
            self._read(0)
        assert self._info is not None
        return self._info

    def frames(self, start: float = 0.0, end: float | None = None) -> Iterator[Frame]:
        """Read the images of a part; see `VideoReader.frames`."""
        indices = self._indices((start, end))
        if not indices:
            raise MediaError(self._item.name, f"no frame from {start:g} s on")
        yield from map(self._read, indices)

    def window(
        self, start: float, count: int, *, stride: int = 1, fps: float | None = None, part: Part = WHOLE
    ) -> list[Frame]:
        """Read every stride-th image, or the nearest to each 1/fps; see `VideoReader.window`."""
        inside = self._indices(part)
        if fps is None:
            chosen = list(self._indices((max(start, part[0]), part[1]))[::stride][:count])
        else:
            points = start + np.arange(count) / fps
            points = points[points <= self._times[inside.stop - 1] + 0.5 / fps + TIME_SLACK] if inside else points[:0]
            # Of two that are equally near, the earlier one.
            middles = (self._times[1:] + self._times[:-1]) / 2
            nearest = np.searchsorted(middles, points - TIME_SLACK).tolist()
            chosen = [min(max(index, inside.start), inside.stop - 1) for index in nearest]
        return [self._read(index) for index in chosen]

    def count(self, start: float = 0.0, end: float | None = None) -> int:
        """Count the images in a part."""
        return len(self._indices((start, end)))

    def measure(self, part: Part = WHOLE) -> Timeline:
        """Find the images of a part, and their times."""
        indices = self._indices(part)
        if not indices:
            return Timeline(0, part[0], part[0])
        return Timeline(len(indices), float(self._times[indices[0]]), float(self._times[indices[-1]]), indices[0])

    expect = measure

    def before(self, timeline: Timeline, index: int) -> float:
        """Choose a time to begin at; see `VideoReader.before`."""
        number = (timeline.listed or 0) + index
        return 0.0 if number < 1 else float(self._times[number - 1] + self._times[number]) / 2

    def _indices(self, part: Part) -> range:
        start, end = part
        stop = len(self._times) if end is None else int(np.searchsorted(self._times, end - TIME_SLACK))
        return range(int(np.searchsorted(self._times, start - TIME_SLACK)), stop)

    def _image_of_folder(self, index: int) -> NDArray[np.uint8]:
        return read_image(Item(f"{self._item.address}/{self._item.frames[index]}", "image"))

    def _read(self, index: int) -> Frame:
        show_life()
        image = self._image(index)
        height, width = image.shape[:2]
        info = self._info = self._info or self._describe(width, height)
        if (width, height) != (info.width, info.height):
            raise MediaError(
                self._item.name,
                f"the size changes from {info.width}x{info.height} to {width}x{height} at frame {index}",
            )
        time = float(self._times[index])
        return Frame(image, round(time / self._info.time_base), time)

    def _describe(self, width: int, height: int) -> VideoInfo:
        fps = Fraction(self.rate).limit_denominator(1001)
        is_folder = bool(self._item.frames)
        return VideoInfo(
            path=self._item.name,
            width=width,
            height=height,
            num_frames=len(self._times),
            fps=fps,
            duration=self._duration,
            time_base=1 / fps if is_folder else Fraction(1, 1000),
            container="folder" if is_folder else "webp",
            codec=PurePosixPath(self._item.frames[0] if is_folder else self._item.path).suffix[1:].lower(),
            pix_fmt="rgb24",
        )


ClipReader = VideoReader | PictureReader


@contextmanager
def open_clip(item: Item, *, square: bool = True, threads: int = 1, hdr: Hdr = "tonemap") -> Iterator[ClipReader]:
    """Open a clip, wherever it lies.

    Raises:
        MediaError, OSError: as in `VideoReader` and `leanvae.media.item.open_item`.
    """
    if item.frames or item.path.lower().endswith(ANIMATION_SUFFIX):
        with PictureReader(item) as pictures:
            yield pictures
        return
    with open_item(item) as file, VideoReader(file, item.name, square=square, threads=threads, hdr=hdr) as reader:
        yield reader


def read_frames(item: Item, count: int | None = None) -> Iterator[Frame]:
    """Read a clip, on all cores, or an image as a clip of one frame.

    Args:
        count: most frames to read; None reads all.

    Raises:
        MediaError, OSError: the file cannot be read.
    """
    if item.kind == "image":
        yield Frame(read_image(item), None, 0.0)
        return
    with open_clip(item, threads=0) as reader:
        yield from islice(reader.frames(item.start, item.end), count)
