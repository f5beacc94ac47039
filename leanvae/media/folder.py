"""Clips that are folders of numbered images, read as videos are; free of torch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np

from leanvae.media.errors import MediaError
from leanvae.media.image import read_image
from leanvae.media.info import Frame, VideoInfo
from leanvae.media.item import Hdr, Item, open_item
from leanvae.media.timeline import TIME_SLACK, WHOLE, Part, Timeline
from leanvae.media.video import VideoReader
from leanvae.media.worker import show_life

_DEFAULT_RATE = 25


class FolderReader:
    """A folder of numbered images, with the methods of `VideoReader`.

    Args:
        item: the folder, with the names of its images; `columns["fps"]` is their rate, 25 by default.

    Raises:
        MediaError: the rate is not a positive number.
    """

    def __init__(self, item: Item) -> None:
        self._item = item
        self._info: VideoInfo | None = None
        self.rate = self._rate(item.columns.get("fps") or _DEFAULT_RATE)

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
        """Nothing is held open."""

    @property
    def info(self) -> VideoInfo:
        """What the number of images, their rate and the first of them say."""
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
            # Of two that are equally near, the earlier one.
            points = np.ceil((start + np.arange(count) / fps) * self.rate - 0.5 - TIME_SLACK).astype(int)
            chosen = [max(index, inside.start) for index in points.tolist() if index < inside.stop]
        return [self._read(index) for index in chosen]

    def count(self, start: float = 0.0, end: float | None = None) -> int:
        """Number of images in a part."""
        return len(self._indices((start, end)))

    def measure(self, part: Part = WHOLE) -> Timeline:
        """The images of a part."""
        indices = self._indices(part)
        if not indices:
            return Timeline(0, part[0], part[0])
        return Timeline(len(indices), indices[0] / self.rate, indices[-1] / self.rate)

    expect = measure

    def before(self, timeline: Timeline, index: int) -> float:
        """See `VideoReader.before`."""
        return max(0.0, timeline.first + (index - 0.5) / self.rate)

    def _indices(self, part: Part) -> range:
        start, end = part
        count = len(self._item.frames)
        stop = count if end is None else min(count, math.ceil((end - TIME_SLACK) * self.rate))
        return range(max(0, math.ceil((start - TIME_SLACK) * self.rate)), stop)

    def _read(self, index: int) -> Frame:
        show_life()
        name = self._item.frames[index]
        image = read_image(Item(f"{self._item.address}/{name}", "image"))
        height, width = image.shape[:2]
        info = self._info = self._info or self._describe(width, height, name)
        if (width, height) != (info.width, info.height):
            raise MediaError(
                self._item.name,
                f"the size changes from {info.width}x{info.height} to {width}x{height} at frame {index}",
            )
        return Frame(image, index, index / self.rate)

    def _describe(self, width: int, height: int, name: str) -> VideoInfo:
        count, fps = len(self._item.frames), Fraction(self.rate).limit_denominator(1001)
        codec = PurePosixPath(name).suffix[1:].lower()
        return VideoInfo(
            self._item.name, width, height, count, fps, count / self.rate, 1 / fps, "folder", codec, pix_fmt="rgb24"
        )


ClipReader = VideoReader | FolderReader


@contextmanager
def open_clip(item: Item, *, square: bool = True, threads: int = 1, hdr: Hdr = "tonemap") -> Iterator[ClipReader]:
    """Open a clip, wherever it lies.

    Raises:
        MediaError, OSError: as in `VideoReader` and `leanvae.media.item.open_item`.
    """
    if item.frames:
        with FolderReader(item) as folder:
            yield folder
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
