"""Writing of upright RGB frames as mp4 (H.264, through PyAV) and of images as PNG; complete or not at all."""

from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from litevae.errors import extra
from litevae.files import atomic_path

with extra("video"):
    import av
    import cv2
    from av.video.frame import VideoFrame
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from leanvae.media.audio import AudioTracks

_X264_OPTIONS = {"crf": "12", "preset": "medium"}
_DEFAULT_RATE = Fraction(25)  # guides x264's rate control only, where the source has no rate
_SMALLEST_TIMESCALE = 48_000
# Bicubic chroma with exact rounding and without dropping every second column.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


class VideoWriter:
    """Writes frames with their own timestamps as an mp4 file; use it in a ``with`` block.

    The file appears under its name when the block ends without an error, and not at all otherwise. Pixels are
    coded as limited-range BT.709, tagged so, in yuv420p for even sizes and yuv444p for odd ones. Frames are
    taken as upright; no rotation is tagged.

    Args:
        path: the mp4 file.
        width, height: size of every frame in pixels.
        time_base: seconds per unit of the timestamps.
        rate: average frames per second; the length of the last frame follows from it.
        pixel_aspect: width of a pixel over its height, or None where pixels are square.
        audio_from: a file whose audio streams are taken over, or None for silence.
        origin: seconds of the source's clock that become zero, for video and audio alike.

    Attributes:
        notes: what differs from what was asked for, in words.
        num_frames: frames written so far.

    Raises:
        ValueError: a size, time base or rate that is not positive.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        time_base: Fraction,
        rate: Fraction | None = None,
        pixel_aspect: Fraction | None = None,
        audio_from: str | Path | None = None,
        origin: Fraction = Fraction(0),
    ) -> None:
        if width < 1 or height < 1:
            raise ValueError(f"{path}: width and height must be positive, got {width}x{height}")
        if time_base <= 0 or (rate is not None and rate <= 0):
            raise ValueError(f"{path}: time_base and rate must be positive, got {time_base} and {rate}")
        self.notes: list[str] = []
        self.num_frames = 0
        self._path = Path(path)
        self._size = (width, height)
        self._time_base = time_base
        self._rate = rate or _DEFAULT_RATE
        self._pixel_aspect = pixel_aspect
        self._audio_from = audio_from
        self._origin = origin
        self._shift = round(origin / time_base)
        self._held: VideoFrame | None = None
        self._moved = 0
        self._audio: AudioTracks | None = None

    def __enter__(self) -> Self:
        width, height = self._size
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            options = {"movie_timescale": str(_movie_timescale(self._time_base))}
            self._container = stack.enter_context(
                av.open(f"file:{temporary}", "w", format="mp4", container_options=options)
            )
            stream = self._container.add_stream("libx264", rate=self._rate, options=dict(_X264_OPTIONS))
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
            stream.time_base = self._time_base
            context = stream.codec_context
            context.time_base = self._time_base
            context.colorspace = Colorspace.ITU709
            context.color_range = ColorRange.MPEG
            context.color_primaries = ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
            if self._pixel_aspect is not None:
                context.sample_aspect_ratio = self._pixel_aspect
            self._stream = stream
            if self._audio_from is not None:
                self._audio = AudioTracks(self._audio_from, self._container, self._origin)
                stack.callback(self._audio.close)
            self._stack = stack.pop_all()
        return self

    def write(self, image: NDArray[np.uint8], pts: int | None = None) -> None:
        """Add a frame.

        Args:
            image: (H, W, 3) uint8, full-range RGB, upright.
            pts: its timestamp on the source's clock; None places it one frame length after the last. One that
                does not lie after the last is moved there, and a note says how often.

        Raises:
            ValueError: the image has another size or type than the file.
        """
        width, height = self._size
        if image.shape != (height, width, 3) or image.dtype != np.uint8:
            raise ValueError(
                f"{self._path}: frame {self.num_frames} is {image.shape} {image.dtype},"
                f" expected ({height}, {width}, 3) uint8"
            )
        last = self._held.pts if self._held is not None else None
        if pts is not None:
            pts -= self._shift
        elif last is not None:
            pts = last + self._frame_length()
        else:
            pts = 0
        if last is not None and pts <= last:
            pts = last + 1
            self._moved += 1
        frame = to_yuv(image, self._stream.pix_fmt or "yuv420p")
        frame.pts = pts
        frame.time_base = self._time_base
        self._encode_held(next_pts=pts)
        self._held = frame
        self.num_frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            self._finish()

    def _finish(self) -> None:
        """Write what is held back, and the rest of the sound."""
        if self._held is None:
            raise ValueError(f"{self._path}: no frame was written")
        self._encode_held(next_pts=(self._held.pts or 0) + self._frame_length())
        self._container.mux(self._stream.encode(None))
        if self._audio is not None:
            self._container.mux(list(self._audio.packets_until(float("inf"))))
            self.notes += self._audio.notes
        if self._moved:
            self.notes.append(f"{self._moved} timestamps did not increase and were moved")

    def _frame_length(self) -> int:
        """Compute the length of an average frame in units of the time base."""
        return max(1, round(1 / (self._rate * self._time_base)))

    def _encode_held(self, next_pts: int) -> None:
        """Encode the frame that waited for its length to be known, and the sound until its end."""
        if self._held is None:
            return
        self._held.duration = next_pts - (self._held.pts or 0)
        self._container.mux(self._stream.encode(self._held))
        if self._audio is not None:
            for packet in self._audio.packets_until(float(next_pts * self._time_base + self._origin)):
                self._container.mux(packet)


def _movie_timescale(time_base: Fraction) -> int:
    """Compute the units per second in which mp4 stores where its tracks start; the default of 1000 would round them."""
    timescale = time_base.denominator
    while timescale < _SMALLEST_TIMESCALE:
        timescale *= 2
    return timescale


def to_yuv(
    image: NDArray[np.uint8], pix_fmt: str = "yuv420p", interpolation: Interpolation = _INTERPOLATION
) -> VideoFrame:
    """Convert (H, W, 3) full-range RGB to limited-range BT.709, tagged so.

    Args:
        image: the picture; yuv420p needs even sides.
        pix_fmt: FFmpeg's name of the layout.
        interpolation: swscale's flags; the default is the most exact.
    """
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(
        format=pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=interpolation,
        threads=1,
    )
    frame.colorspace = Colorspace.ITU709
    frame.color_range = ColorRange.MPEG
    frame.color_primaries = ColorPrimaries.BT709
    frame.color_trc = ColorTrc.BT709
    return frame


def write_png(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write an (H, W, 3) uint8 RGB image as PNG, atomically.

    Raises:
        ValueError: the image has another shape or type.
        OSError: the file cannot be written.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{path}: expected an (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
    encoded, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise OSError(f"{path}: OpenCV cannot encode the image as PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())
