"""Statistics of a run's patches, from which the start in closed form follows (`start.py`)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leanvae.config import LeanVAEConfig
from leanvae.patchify import Patches, image_and_video_patches, to_bands, to_patches

_LONGEST_COVARIANCE = 1024  # elements of a patch vector; of longer ones some vectors are kept instead
_MOST_KEPT = 2048


@dataclass
class PatchStatistics:
    """Sums over patch vectors of one kind, from which their mean and covariance follow.

    Attributes:
        size: S, elements of a vector.
        count: number of vectors.
        total: `(S,)` float64, their sum.
        products: `(S, S)` float64, the sum of their outer products; None if S is large.
        kept: `(n, S)`, every `stride`-th vector, if S is large.
    """

    size: int
    count: int = 0
    stride: int = 1
    total: Tensor = field(init=False)
    products: Tensor | None = field(init=False)
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.size, dtype=torch.float64)
        self.kept = torch.zeros(0, self.size)
        self.products = None
        if self.size <= _LONGEST_COVARIANCE:
            self.products = torch.zeros(self.size, self.size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add vectors `(N, S)`."""
        if self.products is None:
            chosen = vectors[-self.count % self.stride :: self.stride]
            self.kept = torch.cat((self.kept, chosen.float().cpu()))
            while len(self.kept) > _MOST_KEPT:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
        vectors = vectors.double()
        self.count += len(vectors)
        self.total += vectors.sum(0).cpu()
        if self.products is not None:
            self.products += (vectors.T @ vectors).cpu()

    def factor(self) -> tuple[Tensor, Tensor]:
        """Return the mean `(S,)` and a factor `(S, K)` of the covariance, `factor @ factor.T`, both float64.

        The columns of the factor are the principal directions, the strongest first, times their standard deviations.
        """
        mean = self.total / self.count
        if self.products is not None:
            variances, directions = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
            return mean, (directions * variances.clamp_min(0).sqrt()).flip(1)
        centred = (self.kept.double() - mean) / math.sqrt(len(self.kept))
        _, directions = torch.linalg.eigh(centred @ centred.T)
        return mean, (centred.T @ directions).flip(1)


@dataclass
class ClipStatistics:
    """Statistics of the patches of image frames and of groups of video frames.

    Attributes:
        config: of the model whose patches they are.
        image, video: of each kind.
    """

    config: LeanVAEConfig
    image: PatchStatistics = field(init=False)
    video: PatchStatistics = field(init=False)

    def __post_init__(self) -> None:
        image, video = image_and_video_patches(self.config)
        self.image, self.video = PatchStatistics(_vector_size(image)), PatchStatistics(_vector_size(video))

    def add(self, pixels: Tensor) -> None:
        """Add clips `(B, 3, T, H, W)` in [-1, 1] whose sizes the patches divide."""
        bands = to_bands(pixels * self.config.data_scale, self.config.wavelet)
        image, video = image_and_video_patches(self.config)
        if bands.image is not None:
            self.image.add(patch_vectors(bands.image, image))
        if bands.video is not None:
            self.video.add(patch_vectors(bands.video, video))


def _vector_size(patches: Patches) -> int:
    return sum(map(patches.vector_size, patches.channels))


def patch_vectors(bands: Tensor, patches: Patches) -> Tensor:
    """Return the patches of bands `(B, C, T, H, W)` as vectors `(N, S)`, stream after stream."""
    parts = [to_patches(part, patches.shape) for part in patches.of_streams(bands)]
    return torch.cat(parts, dim=-1).flatten(0, 3)
