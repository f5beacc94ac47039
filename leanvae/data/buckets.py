"""Buckets: the shapes that training samples are cut to, and which of them a clip or image goes to by its own."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

_FORM = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)")


@dataclass(frozen=True, order=True)
class Shape:
    """A number of frames, a height and a width in pixels; of an image, one frame."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        """Write it as configurations do: `17x256x256`."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def is_image(self) -> bool:
        """Whether it is of images: clips have more frames than one."""
        return self.frames == 1

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width


def parse_bucket(text: Any) -> Any:
    """Parse `TxHxW` of clips, `1xHxW` or `HxW` of images, as a shape; return other types unchanged.

    Raises:
        ValueError: it is not written so, or a number is 0.
    """
    if not isinstance(text, str):
        return text
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"expected FRAMESxHEIGHTxWIDTH, as in 17x256x256, got {text!r}")
    shape = Shape(*(int(number or 1) for number in found.groups()))
    if min(shape.frames, shape.height, shape.width) < 1:
        raise ValueError(f"frames, height and width must be at least 1, got {text!r}")
    return shape


Bucket = Annotated[Shape, BeforeValidator(parse_bucket), PlainSerializer(str)]


def choose_bucket(shape: Shape | None, buckets: Sequence[Shape], name: str) -> int:
    """Choose the bucket that a clip or image goes to.

    It has the frames that the bucket asks for, need not be enlarged if some bucket allows for that, and loses as
    little as possible to the crop. Where several buckets are left, a hash of the name spreads files over them.

    Args:
        shape: of the file, with as many frames as a sample of it can have; `None` where it could not be read, which
            will show when it is decoded.
        buckets: at least one, all of clips or all of images.
        name: of the file.

    Returns:
        An index into `buckets`; that of a bucket with the fewest frames if the file has too few for all.
    """
    fewest = min(bucket.frames for bucket in buckets)
    frames = max(fewest, shape.frames if shape else 0)
    choice = [n for n, bucket in enumerate(buckets) if bucket.frames <= frames]
    if shape is None or shape.frames < fewest:
        choice = [n for n in choice if buckets[n].frames == fewest]
    if shape is not None:
        choice = [n for n in choice if _enlargement(shape, buckets[n]) <= 1.0] or choice
        kept = [_kept_by_crop(shape, buckets[n]) for n in choice]
        choice = [n for n, share in zip(choice, kept, strict=True) if math.isclose(share, max(kept))]
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return choice[int.from_bytes(digest[8:16], "big") % len(choice)]


def _enlargement(shape: Shape, bucket: Shape) -> float:
    """Compute the factor that scales a picture to cover a bucket."""
    return max(bucket.height / shape.height, bucket.width / shape.width)


def _kept_by_crop(shape: Shape, bucket: Shape) -> float:
    """Compute the share of a picture that a crop of the bucket's aspect ratio keeps."""
    ratio = (shape.width / shape.height) / (bucket.width / bucket.height)
    return min(ratio, 1.0 / ratio)
