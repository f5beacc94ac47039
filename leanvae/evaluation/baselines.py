"""Plain baselines: the frames themselves, JPEG, H.264, and bicubic interpolation."""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from leanvae.evaluation.coder import Coder, Observe
from leanvae.evaluation.h264 import decode_h264, encode_h264
from leanvae.media.image import read_image
from litevae.errors import InvalidInput, extra
from litevae.pixels import to_bytes

with extra("video"):
    import cv2

_BLOCK = 8  # pixels; JPEG's, and that of most of H.264's transforms
_SPECIFICATION = re.compile(r"(identity)|(jpeg|h264|bicubic):(\S+)")
_RANGES = {
    "jpeg": (1, 100, "a quality of 1 to 100"),
    "h264": (0, 51, "a CRF of 0 to 51"),
    "bicubic": (2, 64, "a factor of 2 to 64"),
}


def is_baseline(spec: str) -> bool:
    """Whether a specification is `identity`, `jpeg:...`, `h264:...` or `bicubic:...`."""
    return _SPECIFICATION.fullmatch(spec) is not None


def make_baseline(spec: str) -> Coder:
    """The baseline that a specification names, and that is called by it.

    Raises:
        ValueError: its number is out of range.
    """
    match = _SPECIFICATION.fullmatch(spec)
    assert match is not None, "is_baseline tells"
    if match[1]:
        return _framewise(spec, "the frames themselves", _BLOCK, lambda frame: frame)
    kind, number = match[2], match[3]
    low, high, rule = _RANGES[kind]
    if not number.isdecimal() or not low <= int(number) <= high:
        raise InvalidInput(f"{spec}: expected {kind} with {rule}, such as {kind}:{(low + high) // 2}")
    value = int(number)
    if kind == "jpeg":
        return _framewise(spec, f"JPEG of quality {value}", _BLOCK, lambda frame: _jpeg(frame, value))
    if kind == "bicubic":
        return _framewise(spec, f"bicubic, {value} times smaller and back", value, lambda frame: _bicubic(frame, value))

    def run(frames: Iterable[Tensor], _: Observe) -> Iterator[Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            size = encode_h264(path, (to_bytes(frame[None])[0] for frame in frames), value)
            for image in decode_h264(path, size):
                yield _to_unit(image)[None]

    return Coder(spec, f"H.264 (x264) at CRF {value}", spec, _BLOCK, run)


def _framewise(name: str, source: str, period: int, function: Callable[[Tensor], Tensor]) -> Coder:
    """A coder that takes each frame `(3, H, W)` in [0, 1] alone."""

    def run(frames: Iterable[Tensor], _: Observe) -> Iterator[Tensor]:
        for frame in frames:
            yield function(frame)[None]

    return Coder(name, source, source, period, run)


def _to_unit(image: NDArray[np.uint8]) -> Tensor:
    """`(H, W, 3)` bytes as `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(image).movedim(-1, 0).float() / 255


def _jpeg(frame: Tensor, quality: int) -> Tensor:
    """A frame through OpenCV's JPEG, with chroma at half the resolution."""
    image = cv2.cvtColor(to_bytes(frame[None])[0], cv2.COLOR_RGB2BGR)
    encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    return _to_unit(read_image(data.tobytes()))


def _bicubic(frame: Tensor, factor: int) -> Tensor:
    """A frame made `factor` times smaller in each direction, with antialiasing, and brought back."""
    size = list(frame.shape[1:])
    small = [-(-side // factor) for side in size]
    shrunk = F.interpolate(frame[None], size=small, mode="bicubic", align_corners=False, antialias=True)
    return F.interpolate(shrunk, size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
