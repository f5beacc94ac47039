"""Reading of training images, from files or out of tars; no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanvae.data.cutting import cut_picture, draw_cut
from leanvae.data.sources import Picture
from leanvae.media.image import read_image
from leanvae.media.item import Item


@dataclass(frozen=True)
class PictureSample:
    """A decoded image.

    Attributes:
        item: the picture that it comes from.
        frames: (H, W, 3) uint8, full-range RGB.
    """

    item: Picture
    frames: NDArray[np.uint8]


def read_picture(
    picture: Picture, resolution: tuple[int, int], flip: bool, generator: np.random.Generator | None
) -> PictureSample:
    """Reads an image, resized to cover ``resolution`` (smaller ones are enlarged), and cropped.

    Args:
        resolution: (height, width) in pixels.
        flip: let the generator mirror half of the images left to right.
        generator: draws the crop and the flip; None takes the central crop, unflipped.

    Raises:
        MediaError: the file or the tar's member is no usable image; the reason says what is wrong.
    """
    return PictureSample(picture, cut_picture(load_picture(picture), resolution, draw_cut(generator, flip)))


def load_picture(picture: Picture) -> NDArray[np.uint8]:
    """Decodes an image, (H, W, 3) uint8.

    Raises:
        MediaError: the file or the tar's member is no usable image; the reason says what is wrong.
    """
    if picture.archive is None:
        return read_image(picture.path)
    return read_image(
        Item(picture.archive, "image", picture.path.removeprefix(f"{picture.archive}/"), picture.offset, picture.size)
    )
