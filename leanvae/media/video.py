"""Reading of videos through PyAV as upright, square-pixel, full-range RGB; free of torch."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from time import monotonic as clock
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from leanvae.media.container import best_video_stream, open_container, read_aperture
from leanvae.media.convert import deinterlace, frame_to_rgb, resample
from leanvae.media.errors import MediaError
from leanvae.media.info import Frame, VideoInfo, video_info
from leanvae.media.item import Hdr
from leanvae.media.timeline import (
    TIME_SLACK,
    WHOLE,
    Part,
    Timeline,
    container_start,
    expect_frames,
    frame_rate,
)
from leanvae.media.worker import advise, show_life
from litevae.errors import extra

with extra("video"):
    from av.container import InputContainer
    from av.error import FFmpegError
    from av.packet import Packet
    from av.video.frame import VideoFrame

# MPEG program streams: several frames share a timestamp, and after seeking it goes to the wrong one.
_MISDATED_AFTER_SEEKING = {"mpeg"}
# AVI has decoding times alone. FFmpeg guesses from them when frames are shown, for some codecs a frame late.
_WITHOUT_TIMES = {"avi"}
# For codecs that reorder freely, it guesses times in the order of the data; their frames are counted instead.
_WITHOUT_ORDER, _FREELY_ORDERED = {"avi", "asf", "mxf"}, {"h264", "hevc"}
# Their decoders keep the setting that they were opened with, and would leave frames out to the end.
_NEVER_SKIPPING = {"av1", "libdav1d", "libaom-av1"}
# Their frames that are never shown have packets of their own, with the timestamp of the next one or just before it.
_WITH_HIDDEN_FRAMES, _HIDDEN_WITHIN = {"vp8", "vp9", "libvpx", "libvpx-vp9"}, 0.0015
_SLOW = 1.0  # seconds to reach a window, after which it is said what helps
_REORDERING = 1.0  # seconds that cover the reordering of frames between decoding and display


class VideoReader:
    """A video, opened once: upright, square-pixel, full-range RGB. Use it in a `with` block, or call `close`.

    Cut files are refused: those whose container states more bytes than there are, when they are opened, and others
    where their packets break off.

    Args:
        file: a path, or a seekable file.
        name: what errors call it; a path by default.
        square: resample pixels that are not square, by enlarging the short side; else they are left as they are.
        threads: decoding threads; 0 takes one per core.
        hdr: tone-map PQ and HLG, by the rule of `leanvae.media.colour`, or refuse them.

    Attributes:
        rate: average frames per second; 25 where the file does not say.

    Raises:
        MediaError: no such file, not decodable, cut, a still image, or without a video stream.
    """

    def __init__(
        self, file: str | BinaryIO, name: str = "", *, square: bool = True, threads: int = 1, hdr: Hdr = "tonemap"
    ) -> None:
        self._file = file
        self._name = name or str(file)
        self._square = square
        self._threads = threads
        self._hdr: Hdr = hdr
        self._info: VideoInfo | None = None
        self._size: tuple[int, int] | None = None
        self._container: InputContainer | None = None
        self._open()
        self.rate = frame_rate(self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self._container is not None:
            self._unread = None
            self._container.close()
            self._container = None

    @property
    def info(self) -> VideoInfo:
        """What the header and the first frame say.

        Raises:
            MediaError: no frame can be decoded.
        """
        if self._info is None:
            with self._naming():
                frames = self._from_beginning()
                first = next(frames, None)
                if first is None:
                    raise MediaError(self._name, "no frame can be decoded")
                self._unread = chain([first], frames)
        assert self._info is not None
        return self._info

    def frames(self, start: float = 0.0, end: float | None = None) -> Iterator[Frame]:
        """Decode a part in display order.

        Args:
            start: seconds since the container's start; frames before it are passed over.
            end: seconds at which to stop; None reads to the end of the file.

        Raises:
            MediaError: there is no frame; its colours are refused; the size changes; or the file is damaged or cut,
                with the number of frames before.
        """
        count = 0
        try:
            for frame, time in self._shown((start, end)):
                yield self._convert(frame, time)
                count += 1
        except MediaError as error:
            if count:
                raise MediaError(self._name, f"{error.reason} (after {count} frames)") from error
            raise
        if not count:
            raise MediaError(self._name, f"no frame from {start:g} s on" if start > 0 else "no frame can be decoded")

    def window(
        self, start: float, count: int, *, stride: int = 1, fps: float | None = None, part: Part = WHOLE
    ) -> list[Frame]:
        """Seek, then take every stride-th frame, or the nearest to each 1/fps; fewer at the end.

        Args:
            start: seconds since the container's start.
            count: number of frames to take; with `fps`, one may come twice.
            part: frames outside it are not taken.

        Raises:
            MediaError: as in `frames`, but that there may be no frame.
        """
        if fps is not None:
            return self._nearest(start + np.arange(count) / fps, part)
        shown = islice(self._shown((max(start, part[0]), part[1])), 0, (count - 1) * stride + 1, stride)
        return [self._convert(frame, time) for frame, time in shown]

    def count(self, start: float = 0.0, end: float | None = None) -> int:
        """Count the frames of a part by its packets, without decoding."""
        return self.measure((start, end)).count

    def measure(self, part: Part = WHOLE) -> Timeline:
        """Read the packets of a part for the number of its frames and their times; nothing is kept.

        Raises:
            MediaError: the file is damaged or cut.
        """
        start, end = part
        count, first, last, before = 0, math.inf, -math.inf, -math.inf
        hides = self._stream.codec_context.name in _WITH_HIDDEN_FRAMES
        with self._naming():
            self._unread = None
            for packet in self._packets_before(start) or self._all_packets():
                show_life()
                if packet.is_corrupt:
                    raise MediaError(self._name, "truncated: the file ends inside a frame")
                if packet.size == 0 or packet.is_discard:
                    continue
                time = self._time_of(packet)
                time = count / self.rate if time is None else time
                if end is not None and time > end + _REORDERING:
                    break
                is_hidden, before = hides and time - before < _HIDDEN_WITHIN, time
                if is_hidden:
                    continue
                if (start <= 0 or time >= start - TIME_SLACK) and (end is None or time < end - TIME_SLACK):
                    count, first, last = count + 1, min(first, time), max(last, time)
        return Timeline(count, first, last) if count else Timeline(0, start, start)

    def expect(self, part: Part = WHOLE) -> Timeline | None:
        """Read what the header alone says about a part's frames; None if that is too little. It may be wrong."""
        return expect_frames(self._opened(), self._stream, part)

    def before(self, timeline: Timeline, index: int) -> float:
        """Choose a time to begin at, so that a timeline's frame of this index comes first."""
        return timeline.before(index, self._opened(), self._stream)

    def _opened(self) -> InputContainer:
        if self._container is None:
            self._open()
        assert self._container is not None
        return self._container

    def _open(self) -> None:
        """Open the file at its beginning."""
        with self._naming():
            self._container = open_container(self._file, self._name)
            stream = best_video_stream(self._container, self._name)
            stream.thread_type = "AUTO"
            stream.thread_count = self._threads
            self._stream = stream
            self._aperture = read_aperture(self._file, self._container, stream)
            self._header_size = (stream.codec_context.width, stream.codec_context.height)
            self._time_base = stream.time_base or Fraction(1, 1000)
            self._tick = float(self._time_base)
            self._origin = container_start(self._container)
            context = stream.codec_context
            self._is_counted = (
                self._container.format.name in _WITHOUT_ORDER
                and context.codec.canonical_name in _FREELY_ORDERED
                and bool(context.has_b_frames)
            )
            is_late = self._container.format.name in _WITHOUT_TIMES and not self._is_counted
            self._late: float | None = None if is_late else 0.0
            self._unread: Iterator[VideoFrame] | None = self._decode(self._container.demux(stream), from_start=True)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn FFmpeg's errors into MediaErrors."""
        try:
            yield
        except FFmpegError as error:
            raise MediaError(self._name, f"cannot be decoded: {error.strerror}") from error

    def _convert(self, frame: VideoFrame, time: float) -> Frame:
        image = frame_to_rgb(self._name, frame, self._hdr, self._aperture)
        pts = frame.pts
        if pts is not None and frame.time_base and frame.time_base != self._time_base:  # of the deinterlacer
            pts = round(pts * frame.time_base / self._time_base)
        return Frame(resample(image, (self.info.width, self.info.height)), pts, time)

    def _shown(self, part: Part) -> Iterator[tuple[VideoFrame, float]]:
        """Decode the frames of a part, with their seconds since the container's start."""
        start, end = part
        reached = start <= 0
        with self._naming():
            for frame, time in self._timed(start):
                reached = reached or time >= start - TIME_SLACK
                if not reached:
                    continue
                if end is not None and time >= end - TIME_SLACK:
                    return
                yield frame, time

    def _nearest(self, points: NDArray[np.float64], part: Part) -> list[Frame]:
        """Take the frame nearest to each point of time, the earlier one of two; `points` rise evenly."""
        start, end = part
        half = (points[-1] - points[0]) / (2 * (len(points) - 1)) if len(points) > 1 else math.inf
        found: list[Frame] = []
        before: tuple[VideoFrame, float] | None = None
        with self._naming():
            for frame, time in self._timed(max(start, points[0]), all_before=True):
                if start > 0 and time < start - TIME_SLACK:
                    continue
                if end is not None and time >= end - TIME_SLACK:
                    break
                while len(found) < len(points) and points[len(found)] <= time:
                    point = points[len(found)]
                    is_nearer = before is not None and point - before[1] <= time - point
                    self._append(found, before if is_nearer and before else (frame, time))
                if len(found) == len(points):
                    return found
                before = frame, time
        while before and len(found) < len(points) and points[len(found)] - before[1] <= half + TIME_SLACK:
            self._append(found, before)
        return found

    def _append(self, found: list[Frame], timed: tuple[VideoFrame, float]) -> None:
        """Convert a frame, unless it was the last one already."""
        found.append(found[-1] if found and found[-1].time == timed[1] else self._convert(*timed))

    def _timed(self, start: float, all_before: bool = False) -> Iterator[tuple[VideoFrame, float]]:
        """Decode from a key frame at or before `start` on, whatever the container's own index is worth.

        Frames before `start` that no other refers to are left out, unless `all_before`.
        """
        frames = self._after_seeking(start, all_before) if start > 0 else None
        time, first, began = -1 / self.rate, None, clock()
        for frame in frames or self._from_beginning():
            # Where the file gives no times, frames are counted.
            time = time + 1 / self.rate if frame.time is None else frame.time - self._origin - (self._late or 0.0)
            first = time if first is None else first
            if start > 0 and time >= start - TIME_SLACK and began is not None:
                if clock() - began > _SLOW:
                    self._advise(start - first, clock() - began)
                began = None
            yield frame, time

    def _advise(self, distance: float, seconds: float) -> None:
        advise(
            f"{self._name}: {seconds:.1f} s to reach a window, because the key frame before it lies {distance:.1f} s "
            "back. Videos like this one slow reading down; encoding them with a key frame every second or two "
            "(ffmpeg -g 48) helps"
        )

    def _after_seeking(self, start: float, all_before: bool) -> Iterator[VideoFrame] | None:
        """Decode from a key frame before `start` on; None if that has to begin at the beginning."""
        self._unread = None
        packets = self._packets_before(start)
        skipped_to = -math.inf if all_before else start - 2 / self.rate
        frames = self._decode(packets, skipped_to=skipped_to) if packets else iter(())
        first = next(frames, None)
        if first is None or first.time is None:
            return None
        if self.info.interlaced and first.time - self._origin > start - 1.5 / self.rate:
            # A frame is deinterlaced by those around it.
            packets = self._packets_before(start - 2 / self.rate)
            return self._decode(packets) if packets else None
        return chain([first], frames)

    def _from_beginning(self) -> Iterator[VideoFrame]:
        if self._unread is None:
            self.close()
            self._open()
        frames, self._unread = self._unread, None
        assert frames is not None
        return frames

    def _all_packets(self) -> Iterator[Packet]:
        self._from_beginning()
        return self._opened().demux(self._stream)

    def _time_of(self, packet: Packet) -> float | None:
        """Compute when a packet's frame is shown, in seconds since the container's start; None if unknown."""
        stamp = packet.dts if packet.pts is None or self._opened().format.name in _WITHOUT_TIMES else packet.pts
        return None if stamp is None else stamp * self._tick - self._origin

    def _packets_before(self, start: float) -> Iterator[Packet] | None:
        """Seek to a key frame at or before `start`; None where none is found, or it is at the beginning."""
        container = self._opened()
        if container.format.name in _MISDATED_AFTER_SEEKING or self._is_counted:
            return None
        if self._late is None:
            container.seek(0, stream=self._stream)
            self._late = self._lateness(next(container.demux(self._stream)))
        # Containers without an index are searched by time alone, and may land behind the key frame.
        for margin in (0.0, 2.0, 10.0):
            if start - margin <= 0:
                return None
            container.seek(math.floor((start - margin + self._origin) / self._time_base), stream=self._stream)
            packets = container.demux(self._stream)
            first = next((packet for packet in packets if packet.is_keyframe), None)
            time = self._time_of(first) if first else None
            if first and time is not None and time <= start + TIME_SLACK:
                return chain([first], packets)
        return None

    def _decode(
        self, packets: Iterable[Packet], from_start: bool = False, skipped_to: float = -math.inf
    ) -> Iterator[VideoFrame]:
        """Decode packets, deinterlace what needs it, and refuse damage and other sizes."""
        return deinterlace(self._checked(packets, from_start, skipped_to))

    def _checked(self, packets: Iterable[Packet], from_start: bool, skipped_to: float) -> Iterator[VideoFrame]:
        context = self._stream.codec_context
        context.skip_frame, is_skipping = "DEFAULT", False
        if context.codec.name in _NEVER_SKIPPING:
            skipped_to = -math.inf
        count = 0
        stamps: deque[int | None] = deque()  # in the order of the data, for frames that are counted
        for packet in packets:
            show_life()
            if self._late is None:
                self._late = self._lateness(packet)
            if self._is_counted and packet.size:
                stamps.append(packet.dts)
            if is_skipping != (packet.pts is not None and packet.pts * self._tick < skipped_to + self._origin):
                is_skipping = not is_skipping
                context.skip_frame = "NONREF" if is_skipping else "DEFAULT"
            if packet.is_corrupt:
                raise MediaError(self._name, "truncated: the file ends inside a frame")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise MediaError(self._name, "damaged: the decoder marks a frame as corrupt")
                if (frame.width, frame.height) != self._size:
                    self._check_size(frame, count if from_start else None)
                count += 1
                if stamps:
                    frame.pts = stamps.popleft()
                yield frame

    def _lateness(self, packet: Packet) -> float:
        """Compute the seconds by which FFmpeg dates frames of a file without times too late, by its first packet."""
        return ((packet.pts or 0) - (packet.dts or 0)) * self._tick

    def _check_size(self, frame: VideoFrame, number: int | None) -> None:
        """Refuse a frame whose size is not that of the file's first one."""
        size = (frame.width, frame.height)
        if self._size is None:
            if number is not None or size == self._header_size:
                self._size = size
            else:  # one inside the file, and not of the size that the header states
                self._size = self._first_size()
            if self._info is None:
                self._info = video_info(self._name, self._opened(), self._stream, frame, self._square, self._aperture)
        if size != self._size and self._size is not None:
            if number is None:
                number = round(((frame.time or 0.0) - self._origin) * self.rate)
            raise MediaError(
                self._name,
                f"the size changes from {self._size[0]}x{self._size[1]} to {size[0]}x{size[1]} at frame {number}",
            )

    def _first_size(self) -> tuple[int, int] | None:
        """Decode the file's first frame beside what is open."""
        place = 0 if isinstance(self._file, str) else self._file.tell()
        with VideoReader(self._file, self._name) as other:
            _ = other.info
        if not isinstance(self._file, str):
            self._file.seek(place)
        return other._size
