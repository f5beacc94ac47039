"""The frames of the clips and images that are evaluated."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.data.samples import Cut, cut_picture
from leanvae.media.folder import open_clip
from leanvae.media.image import read_image
from leanvae.media.naming import NamedItem


@dataclass(frozen=True)
class Source:
    """A clip or an image, as models get it and as they are measured against it.

    Attributes:
        job: the file.
        num_frames: most frames of a clip, from its start; None takes all.
        resolution: (height, width) that frames are resized to cover and cut to, centrally; None leaves them as
            they are.
    """

    job: NamedItem
    num_frames: int | None = None
    resolution: tuple[int, int] | None = None

    def images(self) -> Iterator[NDArray[np.uint8]]:
        """Reads the frames, `(H, W, 3)`, all of one size; each call reads the file anew.

        Raises:
            MediaError: the file cannot be read, or its size changes on the way.
        """
        for image in self._images():
            yield image if self.resolution is None else cut_picture(image, self.resolution, Cut())

    def _images(self) -> Iterator[NDArray[np.uint8]]:
        item = self.job.item
        if not self.job.is_video:
            yield read_image(item)
            return
        with open_clip(item, threads=0) as reader:
            for frame in islice(reader.frames(item.start, item.end), self.num_frames):
                yield frame.image

    def frames(self) -> Iterator[Tensor]:
        """The frames as float32 `(3, H, W)` in [0, 1]."""
        for image in self.images():
            yield torch.from_numpy(image).movedim(-1, 0).float() / 255
