"""Reading of videos (PyAV) as upright, full-range RGB; free of torch."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvae.media.errors import MediaError
from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.error import FFmpegError
    from av.packet import Packet
    from av.stream import Disposition
    from av.video.frame import VideoFrame
    from av.video.reformatter import ColorRange
    from av.video.stream import VideoStream

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogg", ".ogv", ".ts", ".webm", ".wmv",
})
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
})
# fmt: on

# ITU-T H.273 code points, as FFmpeg reports them.
MATRIX_UNSPECIFIED = 2
HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
# swscale's numbers for them.
_BT709, _FCC, _BT601, _SMPTE240M, _BT2020 = 1, 4, 5, 7, 9
_MATRICES = {1: _BT709, 4: _FCC, 5: _BT601, 6: _BT601, 7: _SMPTE240M, 9: _BT2020}
_RANGE_FULL = 2
# MPEG program streams: several frames share a timestamp, and after seeking it goes to the wrong one.
_MISDATED_AFTER_SEEKING = {"mpeg"}
TIME_SLACK = 1e-4  # seconds; below the shortest time between frames, above rounding errors of float
# Without these flags swscale is off by 1.0 to 1.9 levels on average instead of 0.2, and repeats chroma.
# PyAV before 18 has no names for the flags.
_BICUBIC, _ACCURATE_RND, _FULL_CHR_H_INT = 0x4, 0x40000, 0x2000
_INTERPOLATION = _BICUBIC | _ACCURATE_RND | _FULL_CHR_H_INT


@dataclass(frozen=True)
class VideoInfo:
    """What the header and the first frame of a video say.

    Attributes:
        width, height: size as displayed, after rotation, in pixels.
        rotation: clockwise degrees (0, 90, 180, 270) that bring a coded frame upright.
        num_frames: number of frames by the header, or None where the container does not store it; broken
            files may hold fewer.
        fps: average frames per second, or None where unknown.
        duration: seconds, or None where unknown.
        time_base: seconds per unit of ``Frame.pts``.
        start_time: seconds at which the container's earliest stream starts; ``Frame.time`` counts from here.
        container: FFmpeg's name of the format.
        matrix, color_range, transfer: H.273 code points as read (2, 0 and 2 mean unspecified).
        is_hdr: the transfer function is PQ or HLG.
        mirrored: the display matrix mirrors the picture besides turning it.
        num_video_streams: video streams in the container; one of them is read.
    """

    path: str
    width: int
    height: int
    rotation: int
    num_frames: int | None
    fps: Fraction | None
    duration: float | None
    time_base: Fraction
    start_time: float
    container: str
    codec: str
    pix_fmt: str
    matrix: int
    color_range: int
    transfer: int
    has_audio: bool
    is_hdr: bool
    mirrored: bool
    num_video_streams: int


@dataclass(frozen=True)
class Frame:
    """One decoded frame.

    Attributes:
        image: (H, W, 3) uint8, full-range RGB, upright.
        pts: presentation timestamp in units of the stream's time base, or None where the file has none.
        time: seconds since the container's start.
    """

    image: NDArray[np.uint8]
    pts: int | None
    time: float


@contextmanager
def open_video(path: str | Path, threads: int = 0) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a video file and its best video stream (FFmpeg's choice; cover pictures are passed over).

    Args:
        threads: decoding threads; 0 takes one per core.

    Raises:
        MediaError: no such file, not decodable, a still image, or without a video stream; FFmpeg's errors
            inside the ``with`` block become MediaErrors too.
    """
    if not os.path.isfile(path):
        raise MediaError(path, "no such file")
    if os.path.getsize(path) == 0:
        raise MediaError(path, "empty file")
    try:
        # The prefix keeps names with colons from being taken for protocols; the whitelist keeps playlists
        # from fetching addresses.
        with av.open(
            f"file:{os.fspath(path)}",
            metadata_errors="ignore",
            options={"protocol_whitelist": "file"},
        ) as container:
            format_name = container.format.name
            if format_name.endswith("_pipe") or format_name == "image2":
                raise MediaError(path, "a still image, not a video")
            stream = _best_video_stream(container)
            if stream is None:
                raise MediaError(path, "no video stream")
            stream.thread_type = "AUTO"
            stream.thread_count = threads
            yield container, stream
    except FFmpegError as error:
        raise MediaError(path, f"cannot be decoded: {error.strerror}") from error


def _best_video_stream(container: InputContainer) -> VideoStream | None:
    """FFmpeg's best video stream, unless that is a cover picture."""
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return next((s for s in moving if best is not None and s.index == best.index), moving[0] if moving else None)


def probe(path: str | Path) -> VideoInfo:
    """Reads a video's header and decodes its first frame (rotation and colour stand there).

    Raises:
        MediaError: see :func:`open_video`; or the first frame cannot be decoded.
    """
    with open_video(path, threads=1) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError(path, "no frame can be decoded")
        return _describe(path, container, stream, frame)


def _describe(path: str | Path, container: InputContainer, stream: VideoStream, frame: VideoFrame) -> VideoInfo:
    time_base = stream.time_base or Fraction(1, 1000)
    if stream.duration is not None:
        duration = float(stream.duration * time_base)
    else:
        duration = None if container.duration is None else container.duration / av.time_base
    transpose, flip_x, flip_y = _orientation(frame)
    width, height = (frame.height, frame.width) if transpose else (frame.width, frame.height)
    transfer = frame.color_trc if frame.color_trc else stream.codec_context.color_trc
    return VideoInfo(
        path=str(path),
        width=width,
        height=height,
        rotation=-frame.rotation % 360,
        num_frames=stream.frames or None,
        fps=stream.average_rate or stream.guessed_rate,
        duration=duration,
        time_base=time_base,
        start_time=container_start(container),
        container=container.format.name,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=frame.format.name,
        matrix=frame.colorspace,
        color_range=frame.color_range,
        transfer=transfer,
        has_audio=bool(container.streams.audio),
        is_hdr=transfer in HDR_TRANSFERS,
        mirrored=transpose ^ flip_x ^ flip_y,
        num_video_streams=len(container.streams.video),
    )


def iter_frames(path: str | Path, start: float = 0.0, threads: int = 0) -> Iterator[Frame]:
    """Decodes a video in display order.

    Args:
        start: seconds since the container's start; frames before it are passed over.
        threads: decoding threads; 0 takes one per core.

    Raises:
        MediaError: see :func:`open_video`; HDR; or a decoding error, with the number of frames read before.
    """
    count = 0
    try:
        with open_video(path, threads) as (container, stream):
            origin = container_start(container)
            for frame in decode_from(path, container, stream, start):
                untimed = count / float(stream.guessed_rate or 25)
                time = untimed if frame.time is None else frame.time - origin
                yield Frame(frame_to_rgb(path, frame), frame.pts, time)
                count += 1
    except MediaError as error:
        if count:
            raise MediaError(path, f"{error.reason} (after {count} frames)") from error
        raise
    if not count:
        raise MediaError(path, f"no frame from {start:g} s on" if start > 0 else "no frame can be decoded")


def container_start(container: InputContainer) -> float:
    """The start of the container's earliest stream in seconds: where its own clock is set to zero here."""
    return (container.start_time or 0) / av.time_base


def decode_from(path: str | Path, container: InputContainer, stream: VideoStream, start: float) -> Iterator[VideoFrame]:
    """Yields the decoded frames from ``start`` seconds on, whatever the container's own index is worth.

    Raises:
        MediaError: the file ends inside a frame, or the decoder marks a frame as damaged.
    """
    origin = container_start(container)
    packets = _packets_before(container, stream, start + origin) if start > 0 else container.demux(stream)
    frames = _decode(path, packets)
    yield from dropwhile(lambda frame: frame.time is not None and frame.time - origin < start - TIME_SLACK, frames)


def _packets_before(container: InputContainer, stream: VideoStream, time: float) -> Iterator[Packet]:
    """The packets from a key frame at or before ``time`` on; from the beginning where seeking finds none."""
    time_base = float(stream.time_base or 1)
    # Containers without an index are searched by time alone, and may land behind the key frame.
    margins = () if container.format.name in _MISDATED_AFTER_SEEKING else (0.0, 2.0, 10.0)
    for margin in margins:
        if time - margin <= container_start(container):
            break
        container.seek(math.floor((time - margin) / time_base), stream=stream)
        packets = container.demux(stream)
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is not None and first.pts is not None and first.pts * time_base <= time + TIME_SLACK:
            return chain([first], packets)
    container.seek(min(0, container.start_time or 0))
    return container.demux(stream)


def _decode(path: str | Path, packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    for packet in packets:
        if packet.is_corrupt:
            raise MediaError(path, "truncated: the file ends inside a frame")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise MediaError(path, "damaged: the decoder marks a frame as corrupt")
            yield frame


def frame_to_rgb(path: str | Path, frame: VideoFrame) -> NDArray[np.uint8]:
    """Converts a decoded frame to (H, W, 3) uint8 full-range RGB, upright, by its own matrix and range.

    Untagged frames are taken as BT.601 below 720 coded lines and BT.709 from there; an untagged range as
    limited, unless the pixel format says otherwise.

    Raises:
        MediaError: PQ or HLG transfer, or a colour matrix that cannot be converted.
    """
    refuse_hdr(path, frame.color_trc)
    if frame.format.is_rgb or len(frame.format.components) < 3:
        matrix = None
    elif frame.colorspace == MATRIX_UNSPECIFIED:
        matrix = _BT601 if frame.height < 720 else _BT709
    elif frame.colorspace in _MATRICES:
        matrix = _MATRICES[frame.colorspace]
    else:
        raise MediaError(path, f"the colour matrix with H.273 code {frame.colorspace} is not supported")
    full = frame.color_range == _RANGE_FULL or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    converted = frame.to_ndarray(
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_INTERPOLATION,
        threads=1,
    )
    image = np.asarray(converted, np.uint8)
    return _turn(image, *_orientation(frame))


def refuse_hdr(path: str | Path, transfer: int) -> None:
    """Raises MediaError for the transfer functions PQ and HLG, whose values would be misread as SDR."""
    if transfer in HDR_TRANSFERS:
        raise MediaError(path, f"HDR ({HDR_TRANSFERS[transfer]}) is not supported; convert it to SDR first")


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Reads a display matrix as (transpose, then flip x, then flip y); angles go to the nearest right one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y with the matrix stored as a b u c d v x y w (ISO/IEC 14496-12).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _turn(image: NDArray[np.uint8], transpose: bool, flip_x: bool, flip_y: bool) -> NDArray[np.uint8]:
    if transpose:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
