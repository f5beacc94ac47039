"""Decoding of chosen frames: decord where it is known to agree with PyAV, PyAV everywhere else.

Measured (decord 0.6, PyAV 18): rotation, order and timestamps agree, and tagged matrices and ranges are honoured
by both. decord differs, and PyAV is taken, where

- the container is not MP4, Matroska or AVI: decord lands on wrong frames in MPEG-TS and opens no Ogg;
- the codec is VP8 or VP9: decord counts hidden frames and repeats others for them;
- the samples have more than 8 bits: decord's colours are off by up to 2 levels on average;
- the colour matrix is not tagged and the picture has 720 lines or more: decord takes BT.601;
- the picture is mirrored by its display matrix, or there are several video streams;
- only a part of the file is wanted: decord indexes whole files;
- decord is missing, fails, lists other timestamps than the file, or gives images of another shape (it counts the
  padding of narrow pictures as channels).

Elsewhere decord's colours lie about 1 level (8 bit, mean) from PyAV's, whose conversion rounds correctly.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from numpy.typing import NDArray

from leanvae.data.sources import Clip
from leanvae.media.errors import MediaError
from leanvae.media.video import (
    MATRIX_UNSPECIFIED,
    TIME_SLACK,
    VideoInfo,
    av,
    container_start,
    decode_from,
    frame_to_rgb,
    open_video,
    probe,
    refuse_hdr,
)

_EIGHT_BIT_YUV = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}
_SEEKS_EXACTLY = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
_HEADER_HAS_DURATION = {"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
_SAME_TIME = 2e-3  # seconds; decord gives float32, Matroska whole milliseconds

TimedImage = tuple[NDArray[np.uint8], float]


class DecoderDisagrees(Exception):
    """A decoder fails, or gives other frames than the file's timestamps promise; another way is tried."""


@dataclass(frozen=True)
class FrameTable:
    """What a file's packets say of its frames, without decoding.

    Attributes:
        info: header and first frame.
        times: (N,) seconds since the container's start of the shown frames, ascending.
        stream_start: the same for the stream's own start.
    """

    info: VideoInfo
    times: NDArray[np.float64]
    stream_start: float


def read_frame_table(clip: Clip) -> FrameTable:
    """Lists the times of a clip's frames from its packets.

    Raises:
        MediaError: see :func:`leanvae.media.video.open_video`; HDR; or a file that ends before its header says.
    """
    try:
        state = os.stat(clip.path)
    except OSError as error:
        raise MediaError(clip.path, "no such file") from error
    return _frame_table(clip, state.st_size, state.st_mtime_ns)


# Training comes back to the same files; a decoder process need not list their packets each time.
@lru_cache(maxsize=4096)
def _frame_table(clip: Clip, _size: int, _changed: int) -> FrameTable:
    info = probe(clip.path)
    refuse_hdr(clip.path, info.transfer)
    with open_video(clip.path, threads=1) as (container, stream):
        origin = container_start(container)
        time_base = float(stream.time_base or 1)
        stream_start = (stream.start_time or 0) * time_base - origin
        if clip.start > 0:
            container.seek(int((clip.start + origin) / time_base), stream=stream)
        step = 1 / float(info.fps or 25)
        times: list[float] = []
        last = 0.0
        # All streams count for where the data end: sound may outlast the picture.
        for packet in container.demux():
            if packet.dts is None and packet.size == 0:
                continue
            if packet.is_corrupt:
                raise MediaError(clip.path, "truncated: the file ends inside a frame")
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = float(stamp * packet.time_base) - origin if stamp is not None else len(times) * step
            last = max(last, time)
            if packet.stream_index == stream.index:
                if packet.is_discard or _is_hidden(info.codec, packet):
                    continue
                times.append(time)
                # A second covers the reordering of frames between decoding and display.
                if clip.end is not None and time > clip.end + 1:
                    break
        else:
            _check_complete(clip, container, last)
    shown = np.sort(np.asarray(times, np.float64))
    ends = np.inf if clip.end is None else clip.end
    inside = (shown >= clip.start - TIME_SLACK if clip.start > 0 else True) & (shown < ends - TIME_SLACK)
    return FrameTable(info, shown[inside], stream_start)


def _check_complete(clip: Clip, container: InputContainer, last: float) -> None:
    """Compares where the data end with the header's duration; cut files often lack nothing else."""
    if container.format.name not in _HEADER_HAS_DURATION or not container.duration:
        return
    promised = container.duration / av.time_base
    if last < 0.9 * promised - 1:
        raise MediaError(clip.path, f"truncated: the data end at {last:.1f} s of {promised:.1f} s")


def _is_hidden(codec: str, packet: Packet) -> bool:
    """Whether a packet holds only a frame that is never shown (VP8: RFC 6386, 9.1; VP9 bitstream, 7.2)."""
    if codec not in ("vp8", "vp9") or packet.size == 0:
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] >> 4 & 1
    if data[-1] & 0xE0 == 0xC0:  # a superframe ends in a shown frame
        return False
    profile = (data[0] >> 5 & 1) | (data[0] >> 4 & 1) << 1
    bits = data[0] << 8 | (data[1] if len(data) > 1 else 0)
    show_existing = 15 - 4 - (profile == 3)
    return not bits >> show_existing & 1 and not bits >> (show_existing - 2) & 1


def decord_agrees(clip: Clip, info: VideoInfo) -> bool:
    """Whether decord reads a clip as PyAV does, by what the header says; see the module's list."""
    coded_lines = info.width if info.rotation in (90, 270) else info.height
    return (
        clip.start == 0
        and clip.end is None
        and info.container in _SEEKS_EXACTLY
        and info.codec not in ("vp8", "vp9")
        and info.pix_fmt in _EIGHT_BIT_YUV
        and (info.matrix != MATRIX_UNSPECIFIED or coded_lines < 720)
        and not info.mirrored
        and info.num_video_streams == 1
    )


@lru_cache(maxsize=1)
def _decord() -> ModuleType | None:
    # leanvae.media.video has imported cv2 by now: after decord, cv2 could no longer read PNG files.
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def decode_window(
    clip: Clip, table: FrameTable, choose: Callable[[int], Sequence[int]]
) -> Iterator[tuple[str, Iterator[TimedImage]]]:
    """Offers ways to decode the same frames, the preferred one first; the caller takes the first that works.

    Args:
        choose: gives the indices of the wanted frames, never descending, from the number of frames; one that stands
            there twice is yielded twice. It is asked again where a file proves to hold another number of frames than
            its packets promised.

    Yields:
        The way's name and its frames: (H, W, 3) uint8 images with their times.
    """
    indices = choose(len(table.times))
    if decord_agrees(clip, table.info) and _decord() is not None:
        yield "decord", _with_decord(clip, table, indices)
    yield "pyav", _with_pyav(clip, table, indices)
    yield "pyav counting", _by_counting(clip, table, choose)


def _with_decord(clip: Clip, table: FrameTable, indices: Sequence[int]) -> Iterator[TimedImage]:
    decord = _decord()
    assert decord is not None
    # decord's errors share no base class, and any of them only means that PyAV has to try.
    try:
        reader = decord.VideoReader(clip.path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(table.times):
            raise DecoderDisagrees(f"{len(reader)} frames, {len(table.times)} expected")
        times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0] + table.stream_start
        if np.abs(times - table.times).max() > _SAME_TIME:
            raise DecoderDisagrees("other timestamps")
        for index in indices:
            image = reader[index].asnumpy()
            if image.shape != (table.info.height, table.info.width, 3):
                raise DecoderDisagrees(f"an image of shape {image.shape}")
            yield image, float(table.times[index])
    except Exception as error:
        raise DecoderDisagrees(str(error)) from error


def _with_pyav(clip: Clip, table: FrameTable, indices: Sequence[int]) -> Iterator[TimedImage]:
    """Seeks to the first wanted frame and decodes on, checking every frame's time against the table."""
    wanted = Counter(indices)
    with open_video(clip.path, threads=1) as (container, stream):
        origin = container_start(container)
        start = float(table.times[indices[0]]) if indices[0] > 0 or clip.start > 0 else 0.0
        frames = decode_from(clip.path, container, stream, start)
        for index in range(indices[0], indices[-1] + 1):
            frame = next(frames, None)
            if frame is None or frame.time is None:
                raise DecoderDisagrees("fewer frames than packets")
            if abs(frame.time - origin - table.times[index]) > _SAME_TIME:
                raise DecoderDisagrees("other timestamps")
            if index in wanted:
                yield from wanted[index] * [(frame_to_rgb(clip.path, frame), float(table.times[index]))]


def _by_counting(clip: Clip, table: FrameTable, choose: Callable[[int], Sequence[int]]) -> Iterator[TimedImage]:
    """Decodes from the clip's start in the decoder's order, for files whose timestamps are out of order.

    Such files may also hold fewer frames than packets; then the wanted frames are chosen anew.
    """
    with open_video(clip.path, threads=1) as (container, stream):
        frames = decode_from(clip.path, container, stream, clip.start)
        count = sum(1 for _, _ in zip(range(len(table.times)), frames, strict=False))
    indices = choose(count)
    wanted = Counter(indices)
    with open_video(clip.path, threads=1) as (container, stream):
        frames = decode_from(clip.path, container, stream, clip.start)
        for index, frame in zip(range(indices[-1] + 1), frames, strict=False):
            if index in wanted:
                yield from wanted[index] * [(frame_to_rgb(clip.path, frame), float(table.times[index]))]
