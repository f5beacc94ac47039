"""The part of a picture that a training sample shows; shared by clips and images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from litevae.errors import extra

with extra("video"):
    import cv2


@dataclass(frozen=True)
class Cut:
    """Where to cut: fractions of the possible range, so that they are drawn before anything is known.

    Attributes:
        window: place of a clip's first frame.
        pace: place in the range of strides or frame rates.
        down, across: place of the crop.
        flip: mirror left to right.
    """

    window: float = 0.5
    down: float = 0.5
    across: float = 0.5
    flip: bool = False
    pace: float = 0.5


def draw_cut(generator: np.random.Generator | None, flip: bool) -> Cut:
    """Draws a cut, flipped half of the time if ``flip``; the central one, unflipped, without a generator."""
    if generator is None:
        return Cut()
    window, down, across, flipped, pace = generator.random(5)
    return Cut(window, down, across, flip and flipped < 0.5, pace)


def cut_picture(image: NDArray[np.uint8], resolution: tuple[int, int], cut: Cut) -> NDArray[np.uint8]:
    """Resizes a picture to cover (height, width), keeping its aspect, and cuts out the chosen part.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (height, width, 3) uint8.
    """
    height, width = resolution
    scale = max(height / image.shape[0], width / image.shape[1])
    covering = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    if covering != (image.shape[1], image.shape[0]):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, covering, interpolation=interpolation), np.uint8)
    top = int(cut.down * (image.shape[0] - height + 1))
    left = int(cut.across * (image.shape[1] - width + 1))
    image = image[top : top + height, left : left + width]
    return np.ascontiguousarray(image[:, ::-1] if cut.flip else image)
