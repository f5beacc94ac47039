"""What a video's header alone says about the frames of a part: how many there are, and when; free of torch."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import overload

from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

TIME_SLACK = 1e-4  # seconds; below the shortest time between frames, above rounding errors of float
_LISTS_EVERY_FRAME = {"mov,mp4,m4a,3gp,3g2,mj2", "avi"}
_DEFAULT_RATE = Fraction(25)

Part = tuple[float, float | None]  # seconds at which it begins and ends; None is the end of the file
WHOLE: Part = (0.0, None)


@dataclass(frozen=True)
class Timeline:
    """The frames of a part of a video, as its header or its packets tell.

    Attributes:
        count: number of frames.
        first, last: seconds since the container's start of the first and the last frame.
        listed: where the first frame stands in the container's own list of all; None if there is no list.
    """

    count: int
    first: float
    last: float
    listed: int | None = None

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return self.last - self.first

    def before(self, index: int, container: InputContainer, stream: VideoStream) -> float:
        """Choose a time to begin at, so that the frame of an index comes first: halfway to the one before it."""
        if index <= 0:
            return 0.0
        if self.listed is None:
            return self.first + (index - 0.5) * self.seconds / max(1, self.count - 1)
        times = ListedTimes(container, stream)
        return (times[self.listed + index - 1] + times[self.listed + index]) / 2


class ListedTimes(Sequence[float]):
    """Seconds since the container's start of all frames, where the container lists them; empty elsewhere.

    The list holds decoding times. Coders that reorder frames decode each of them as long before it is shown as the
    reordering takes: from the time of the first frame on, they are the times of the frames in order. The last few
    frames, for which none are left, follow at the mean distance.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._entries = stream.index_entries
        self._unit = float(stream.time_base or Fraction(1, 1000))
        self._origin = container_start(container)
        stop = 0
        if container.format.name in _LISTS_EVERY_FRAME and stream.frames:  # fragmented files have no count
            stop = len(self._entries)
        start = 0
        while start < stop and self._entries[start].is_discard:  # by an edit list
            start += 1
        self._count = stop - start
        ticks = range(start, stop)
        shown = bisect.bisect_left(ticks, stream.start_time or 0, key=lambda number: self._entries[number].timestamp)
        self._first, self._stop = start + shown, stop
        if self._count:
            span = self._entries[stop - 1].timestamp - self._entries[start].timestamp
            self._step = span * self._unit / max(1, self._count - 1)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = self._first + range(len(self))[index]
        listed = min(number, self._stop - 1)
        return self._entries[listed].timestamp * self._unit - self._origin + (number - listed) * self._step


def frame_rate(stream: VideoStream) -> float:
    """Read the average frames per second; 25 if the file does not say."""
    return float(stream.average_rate or stream.guessed_rate or _DEFAULT_RATE)


def container_start(container: InputContainer) -> float:
    """Read the seconds at which the container's earliest stream starts: the zero of all times here."""
    return (container.start_time or 0) / av.time_base


def first_time(container: InputContainer, stream: VideoStream) -> float:
    """Compute the seconds from the container's start to the stream's first frame, by the header."""
    return float((stream.start_time or 0) * (stream.time_base or 0)) - container_start(container)


def expect_frames(container: InputContainer, stream: VideoStream, part: Part) -> Timeline | None:
    """Read what the header says about a part's frames; None if that is too little. It may be wrong."""
    start, end = part
    times = ListedTimes(container, stream)
    if len(times):
        begin = bisect.bisect_left(times, start - TIME_SLACK) if start > 0 else 0
        stop = len(times) if end is None else bisect.bisect_left(times, end - TIME_SLACK)
        count = max(0, stop - begin)
        return Timeline(count, times[begin], times[stop - 1], begin) if count else Timeline(0, start, start)
    first, seconds = first_time(container, stream), _length(container, stream)
    if not stream.frames and seconds is None:
        return None
    count = stream.frames or round((seconds or 0.0) * frame_rate(stream))
    step = seconds / count if seconds and stream.frames else 1 / frame_rate(stream)
    # Timestamps are rounded to the container's clock, and may lie half a tick beside an even pace.
    slack = first + TIME_SLACK + float(stream.time_base or 0) / 2
    begin = max(0, math.ceil((start - slack) / step)) if start > 0 else 0
    stop = count if end is None else min(count, math.ceil((end - slack) / step))
    count = max(0, stop - begin)
    return Timeline(count, first + begin * step, first + (stop - 1) * step) if count else Timeline(0, start, start)


def _length(container: InputContainer, stream: VideoStream) -> float | None:
    """Compute the seconds from the video's first frame to the end of its last one."""
    if stream.duration is not None:
        return float(stream.duration * (stream.time_base or 0))
    first = first_time(container, stream)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")  # of Matroska's streams, counted from 0
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - first - container_start(container)
    except ValueError:
        return None if container.duration is None else container.duration / av.time_base - first
