"""Which clips a file is cut into, and what size their pictures get."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import PositiveInt, model_validator

from leanvae.data.buckets import Bucket, Shape, choose_bucket
from litevae.config import StrictConfig


class ClipRule(StrictConfig):
    """How files become clips.

    Attributes:
        frames: frames of a clip; `None` makes one clip of each file, or of the part between `start` and `end`.
        stride: every how many frames of the file one is taken.
        every: frames of the file from the start of a clip to the start of the next; by default clips touch.
        resolutions: (height, width) that pictures are resized to cover and cropped to; of several, each file goes to
            the one that its shape fits best; without any, pictures keep their size.
    """

    frames: PositiveInt | None = None
    stride: PositiveInt = 1
    every: PositiveInt | None = None
    resolutions: tuple[Bucket, ...] = ()

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.frames is None and self.every is not None:
            raise ValueError("every: whole files are one clip each; give the frames of a clip too")
        for shape in self.resolutions:
            if not shape.is_image:
                raise ValueError(f"resolutions: expected HEIGHTxWIDTH, got {shape}; 'frames' gives a clip's length")
        return self

    @property
    def span(self) -> int | None:
        """Frames of the file from a clip's first to its last; `None` for whole files."""
        return None if self.frames is None else (self.frames - 1) * self.stride + 1

    @property
    def step(self) -> int | None:
        """Frames of the file from the start of a clip to the start of the next; `None` for whole files."""
        return self.every or self.span

    def starts_at(self, index: int) -> bool:
        """Whether a clip begins with the file's frame of this index."""
        return index % self.step == 0 if self.step else index == 0


@dataclass(frozen=True)
class Placement:
    """Where a clip's pictures lie in the file's.

    Attributes:
        resolution: (height, width) of the clip in pixels.
        resized: (height, width) that the file's picture was resized to.
        crop: (top, left) of the clip in the resized picture.
    """

    resolution: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]


def place(size: tuple[int, int], resolutions: Sequence[Shape], name: str) -> Placement:
    """Chooses a file's resolution, and computes the central crop that `leanvae.data.cutting.cut_picture` makes.

    Args:
        size: (height, width) of the file's pictures.
        resolutions: of the rule.
        name: of the file; it decides between resolutions that fit equally well.
    """
    if not resolutions:
        return Placement(size, size, (0, 0))
    height, width = resolutions[choose_bucket(Shape(1, *size), resolutions, name)].resolution
    scale = max(height / size[0], width / size[1])
    resized = (max(height, round(size[0] * scale)), max(width, round(size[1] * scale)))
    return Placement((height, width), resized, ((resized[0] - height + 1) // 2, (resized[1] - width + 1) // 2))
