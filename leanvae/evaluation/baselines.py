"""Plain baselines: the frames themselves, JPEG, H.264, and bicubic interpolation."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from leanvae.coder import Reconstruction, Seams
from leanvae.media.convert import frame_to_rgb
from leanvae.media.image import read_image
from leanvae.media.info import Frame
from leanvae.media.writer import Interpolation, to_yuv
from litevae.errors import InvalidInput, extra
from litevae.pixels import from_bytes

with extra("video"):
    import cv2
    from av.codec.context import CodecContext
    from av.video.codeccontext import VideoCodecContext
    from av.video.reformatter import ColorRange, Colorspace

_BLOCK = 8  # pixels; JPEG's, and that of most of H.264's transforms
_RATE = Fraction(25)  # guides x264's rate control only
_SPECIFICATION = re.compile(r"(identity)|(jpeg|h264|bicubic):(\S+)")
_RANGES = {
    "jpeg": (1, 100, "a quality of 1 to 100"),
    "h264": (0, 51, "a CRF of 0 to 51"),
    "bicubic": (2, 64, "a factor of 2 to 64"),
}


@dataclass(frozen=True)
class Baseline:
    """A `Reconstructor` without weights, latents or parts.

    Attributes:
        source: description of its method.
        stamp: changes if the method does.
        patch: side in pixels of its blocks.
        run: maps frames to reconstructions.
    """

    source: str
    stamp: str
    patch: int
    run: Callable[[Iterable[Frame]], Iterator[Reconstruction]]

    def seams(self, frames: int, height: int, width: int) -> Seams:
        """Return no seams: frames are coded whole, and clips are not cut."""
        return Seams()

    def reconstruct(self, frames: Iterable[Frame]) -> Iterator[Reconstruction]:
        """Encode and decode frames of one size."""
        return self.run(frames)


def is_baseline(spec: str) -> bool:
    """Tell whether a specification is `identity`, `jpeg:...`, `h264:...` or `bicubic:...`."""
    return _SPECIFICATION.fullmatch(spec) is not None


def make_baseline(spec: str) -> Baseline:
    """Make the baseline that a specification names.

    Raises:
        InvalidInput: the number is out of range.
    """
    match = _SPECIFICATION.fullmatch(spec)
    assert match is not None, "is_baseline tells"
    if match[1]:
        return _framewise("the frames themselves", _BLOCK, lambda image: from_bytes(image[None]))
    kind, number = match[2], match[3]
    low, high, rule = _RANGES[kind]
    if not number.isdecimal() or not low <= int(number) <= high:
        raise InvalidInput(f"{spec}: expected {kind} with {rule}, such as {kind}:{(low + high) // 2}")
    value = int(number)
    if kind == "jpeg":
        return _framewise(f"JPEG of quality {value}", _BLOCK, lambda image: _jpeg(image, value))
    if kind == "bicubic":
        return _framewise(f"bicubic, {value} times smaller and back", value, lambda image: _bicubic(image, value))
    return Baseline(f"H.264 (x264) at CRF {value}", spec, _BLOCK, lambda frames: _h264(frames, value))


def _framewise(source: str, patch: int, function: Callable[[NDArray[np.uint8]], Tensor]) -> Baseline:
    """Make a baseline that maps each image `(H, W, 3)` separately to `(1, 3, H, W)` in [0, 1]."""

    def run(frames: Iterable[Frame]) -> Iterator[Reconstruction]:
        for frame in frames:
            yield Reconstruction([frame], function(frame.image))

    return Baseline(source, source, patch, run)


def _jpeg(image: NDArray[np.uint8], quality: int) -> Tensor:
    """Apply OpenCV's JPEG, with chroma at half the resolution."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert encoded
    return from_bytes(read_image(data.tobytes())[None])


def _bicubic(image: NDArray[np.uint8], factor: int) -> Tensor:
    """Shrink an image `factor` times in each direction, with antialiasing, and enlarge it again."""
    size = list(image.shape[:2])
    small = [-(-side // factor) for side in size]
    shrunk = F.interpolate(from_bytes(image[None]), size=small, mode="bicubic", align_corners=False, antialias=True)
    return F.interpolate(shrunk, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def _h264(frames: Iterable[Frame], crf: int) -> Iterator[Reconstruction]:
    """Code frames by x264 with its preset `medium`; about 43 frames wait, as many as it looks ahead.

    Odd sides are made even by repeating the last line.
    """
    waiting: deque[Frame] = deque()

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for frame in frames:
            waiting.append(frame)
            height, width = frame.image.shape[:2]
            yield np.pad(frame.image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    for decoded in _through_x264(pictures(), crf):
        frame = waiting.popleft()
        height, width = frame.image.shape[:2]
        yield Reconstruction([frame], from_bytes(decoded[None, :height, :width]))
    assert not waiting, "as many frames come out as go in"


def _through_x264(images: Iterator[NDArray[np.uint8]], crf: int) -> Iterator[NDArray[np.uint8]]:
    """Encode and decode images of one even size, in yuv420p."""
    first = next(images, None)
    if first is None:
        return
    encoder, decoder = CodecContext.create("libx264", "w"), CodecContext.create("h264", "r")
    assert isinstance(encoder, VideoCodecContext)
    assert isinstance(decoder, VideoCodecContext)
    encoder.height, encoder.width = first.shape[:2]
    encoder.pix_fmt = "yuv420p"
    encoder.framerate, encoder.time_base = _RATE, 1 / _RATE
    encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
    encoder.options = {"crf": str(crf), "preset": "medium"}
    # FFmpeg's default conversion.
    pictures = (to_yuv(image, interpolation=Interpolation.BILINEAR) for image in chain([first], images))
    packets = (packet for picture in chain(pictures, [None]) for packet in encoder.encode(picture))
    for packet in chain(packets, [None]):
        for frame in decoder.decode(packet):
            yield frame_to_rgb("H.264", frame)
