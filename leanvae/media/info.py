"""What is known of a video and its frames; free of torch."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from leanvae.media.boxes import Aperture
from leanvae.media.colour import HDR_TRANSFERS, WIDE_PRIMARIES
from leanvae.media.convert import MATRIX_UNSPECIFIED, has_alpha, orientation, square_size
from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.format import Flags
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class VideoInfo:
    """What the header and the first frame of a video say.

    Attributes:
        path: the file's name.
        width, height: size of the frames that the reader gives, in pixels.
        rotation: clockwise degrees (0, 90, 180, 270) that bring a coded frame upright.
        mirrored: the display matrix mirrors the picture besides turning it.
        pixel_aspect: width over height of the file's pixels, once upright.
        num_frames: number of frames by the header, or None where the container does not store it; broken files may
            hold fewer.
        fps: average frames per second, or None where unknown.
        duration: seconds, or None where unknown.
        time_base: seconds per unit of `Frame.pts`.
        start_time: seconds at which the container's earliest stream starts; `Frame.time` counts from here.
        clock_offset: `start_time` of formats whose clock starts anywhere, such as broadcasts; 0 for others.
        container, codec, pix_fmt: FFmpeg's names.
        matrix, color_range, transfer: H.273 code points as read (2, 0 and 2 mean unspecified).
        primaries: likewise (2 means unspecified).
        is_hdr: the transfer function is PQ or HLG; frames are tone-mapped, or refused.
        interlaced: frames consist of two fields, and are deinterlaced.
        has_alpha: frames can be transparent, and are laid over white.
        num_video_streams: video streams in the container; one of them is read.
        notes: in words, what was changed of the file's own pictures.
    """

    path: str
    width: int
    height: int
    num_frames: int | None
    fps: Fraction | None
    duration: float | None
    time_base: Fraction
    container: str
    codec: str
    pix_fmt: str
    pixel_aspect: Fraction = Fraction(1)
    rotation: int = 0
    mirrored: bool = False
    start_time: float = 0.0
    clock_offset: Fraction = Fraction(0)
    matrix: int = MATRIX_UNSPECIFIED
    color_range: int = 0
    transfer: int = 2
    primaries: int = 2
    has_audio: bool = False
    is_hdr: bool = False
    interlaced: bool = False
    has_alpha: bool = False
    num_video_streams: int = 1
    notes: tuple[str, ...] = ()


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


def video_info(
    name: str,
    container: InputContainer,
    stream: VideoStream,
    frame: VideoFrame,
    square: bool,
    aperture: Aperture | None = None,
) -> VideoInfo:
    """Collect what the header and a decoded frame say.

    Args:
        name: what errors call the file.
        square: resample pixels that are not square.
        aperture: the part of frames that is shown; None means all.

    Raises:
        MediaError: the pixels are absurdly long.
    """
    time_base = stream.time_base or Fraction(1, 1000)
    transpose, flip_x, flip_y = orientation(frame)
    shown = aperture and aperture.place_in(frame.width, frame.height)
    rows, columns = shown or (slice(0, frame.height), slice(0, frame.width))
    width, height = columns.stop - columns.start, rows.stop - rows.start
    width, height = (height, width) if transpose else (width, height)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    aspect = 1 / aspect if transpose else aspect
    size = square_size(name, width, height, aspect) if square else (width, height)
    transfer = frame.color_trc
    primaries = frame.color_primaries
    seconds = None if container.duration is None else container.duration / av.time_base
    start = Fraction(container.start_time or 0, av.time_base)
    transparent = has_alpha(frame)
    changes = {
        "deinterlaced (bwdif)": frame.interlaced_frame,
        f"HDR, {HDR_TRANSFERS.get(transfer)}, is tone-mapped to SDR (BT.2390, 1,000 to 203 nits)": transfer
        in HDR_TRANSFERS,
        f"{WIDE_PRIMARIES.get(primaries)} primaries are converted to BT.709": primaries in WIDE_PRIMARIES,
        f"cropped to the clean aperture: {width}x{height}": shown is not None,
        "transparent parts are laid over white": transparent,
        f"pixels of {aspect.numerator}:{aspect.denominator} are resampled to square ones: "
        f"{width}x{height} to {size[0]}x{size[1]}": size != (width, height),
    }
    return VideoInfo(
        path=name,
        width=size[0],
        height=size[1],
        rotation=-frame.rotation % 360,
        mirrored=transpose ^ flip_x ^ flip_y,
        pixel_aspect=aspect,
        num_frames=stream.frames or None,
        fps=stream.average_rate or stream.guessed_rate,
        duration=seconds if stream.duration is None else float(stream.duration * time_base),
        time_base=time_base,
        start_time=float(start),
        clock_offset=start if container.format.flags & Flags.ts_discont.value else Fraction(0),
        container=container.format.name,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=frame.format.name,
        matrix=frame.colorspace,
        color_range=frame.color_range,
        transfer=transfer,
        primaries=primaries,
        has_audio=bool(container.streams.audio),
        is_hdr=transfer in HDR_TRANSFERS,
        interlaced=frame.interlaced_frame,
        has_alpha=transparent,
        num_video_streams=len(container.streams.video),
        notes=tuple(note for note, applies in changes.items() if applies),
    )
