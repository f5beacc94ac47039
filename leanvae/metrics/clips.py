"""Measures of one clip or image, frame by frame, in memory that does not grow with its length."""

import math
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from leanvae.metrics.artefacts import ErrorSteps
from leanvae.metrics.frames import ms_ssim, psnr, ssim
from leanvae.metrics.i3d import CLIP_FRAMES
from leanvae.metrics.networks import FeatureNetworks
from litevae.pixels import to_bytes

FRAME_MEASURES = ("psnr", "ssim", "ms_ssim", "lpips")  # means over frames
_MIN_LPIPS_SIDE = 16  # pixels
_CLIP_SIDE = 224  # pixels of I3D's input
_LATENTS_PER_CALL, _LATENTS_PER_CLIP = 64, 256  # positions whose latents are kept for MMD
_NO_NETWORKS = FeatureNetworks(None, None, None, [])
_ERROR_GAIN = 4.0
_FRAMES_AT_ONCE = 4  # for LPIPS, whose features take the most memory


class ClipMeasures:
    """Measures of a reconstruction, in the units of the report.

    Args:
        height, width: size of the frames.
        period: side of the model's patches in pixels.
        networks: networks for LPIPS and the features.
    """

    def __init__(self, height: int, width: int, period: int, networks: FeatureNetworks) -> None:
        self.steps = ErrorSteps(height, width, period)
        self.features = ClipFeatures(networks)
        self._lpips = networks.lpips if min(height, width) >= _MIN_LPIPS_SIDE else None
        self._values: dict[str, list[float]] = {name: [] for name in FRAME_MEASURES}

    def update(self, output: Tensor, reference: Tensor) -> None:
        """Add frames and their references, both `(N, 3, H, W)` in [0, 1]."""
        measured = {name: measure(output, reference) for name, measure in _MEASURES.items()}
        if self._lpips is not None:
            measured["lpips"] = self._lpips(2 * output - 1, 2 * reference - 1)
        for name, values in measured.items():
            self._values[name] += values.double().tolist()
        self.steps.update(output, reference)
        self.features.update(output)

    def row(
        self, rows: Collection[int] = (), columns: Collection[int] = (), frames: Collection[int] = ()
    ) -> dict[str, Any]:
        """Return the measures by name; None if one is infinite or undefined.

        Args:
            rows, columns, frames: where the model's tiles and chunks begin, without 0.
        """
        scores = {
            "flicker": self.steps.flicker(),
            "block_score": self.steps.block_score(),
            "tile_seam": self.steps.tile_seam(rows, columns),
            "chunk_seam": self.steps.chunk_seam(frames),
        }
        return {
            **{name: _finite_mean(self._values[name]) for name in FRAME_MEASURES},
            **{name: _finite(score) for name, score in scores.items()},
            "frame_psnr": [_finite(value) for value in self._values["psnr"]],
        }


_MEASURES = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def _finite_mean(values: list[float]) -> float | None:
    return _finite(math.fsum(values) / len(values)) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class ClipFeatures:
    """Features of frames for rFID, and of each 16 consecutive frames for rFVD; the remaining frames have none."""

    def __init__(self, networks: FeatureNetworks) -> None:
        self._networks = networks
        self._images: list[Tensor] = []
        self._videos: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def update(self, frames: Tensor) -> None:
        """Add frames, `(N, 3, H, W)` in [0, 1]."""
        if self._networks.image is not None:
            self._images.append(self._networks.image(frames).float().cpu())
        if self._networks.video is not None:
            small = F.interpolate(frames, size=(_CLIP_SIDE, _CLIP_SIDE), mode="bilinear", align_corners=False)
            self._waiting += small.unbind()
            while len(self._waiting) >= CLIP_FRAMES:
                clip = torch.stack(self._waiting[:CLIP_FRAMES], dim=1)[None]
                del self._waiting[:CLIP_FRAMES]
                self._videos.append(self._networks.video(clip).float().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """Return `image` `(frames, D)` and `video` `(windows, D)`, if there are any."""
        found = {"image": self._images, "video": self._videos}
        return {name: torch.cat(features) for name, features in found.items() if features}


class LatentStatistics:
    """Sums over a clip's latents, the posterior's means, and a sample of them for MMD.

    Args:
        name: name of the clip, which decides on the sampled positions.
    """

    def __init__(self, name: str) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode("utf-8", "surrogateescape")))
        self._count = 0
        self._sums: Tensor | None = None
        self._samples: list[Tensor] = []
        self.shown: Tensor | None = None

    def observe(self, latent: Tensor) -> None:
        """Add a latent `(Z, T', H', W')`; the first one's middle frame is kept in `shown`."""
        if self.shown is None:
            self.shown = latent[:, latent.shape[1] // 2].float().cpu()
        vectors = latent.flatten(1).double().cpu()  # Z (T' H' W')
        sums = torch.stack((vectors.sum(1), vectors.square().sum(1)))
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += vectors.shape[1]
        if sum(map(len, self._samples)) < _LATENTS_PER_CLIP:
            chosen = torch.randperm(vectors.shape[1], generator=self._generator)[:_LATENTS_PER_CALL]
            self._samples.append(vectors[:, chosen].T.float())

    def tensors(self) -> dict[str, Tensor]:
        """Return `latent_sums` `(2, Z)` of values and squares, `latent_count` `()` and `latent_samples` `(N, Z)`, if
        any.
        """
        if self._sums is None:
            return {}
        return {
            "latent_sums": self._sums,
            "latent_count": torch.tensor(self._count),
            "latent_samples": torch.cat(self._samples)[:_LATENTS_PER_CLIP].contiguous(),
        }


def measure_clip(
    output: Tensor, reference: Tensor, period: int, networks: FeatureNetworks = _NO_NETWORKS
) -> dict[str, Any]:
    """Return the measures of `leanvae evaluate` for one clip or image.

    Args:
        output: reconstruction, `(3, T, H, W)` or `(3, H, W)` in [0, 1].
        reference: the same shape and range.
        period: side of the model's patches in pixels.
        networks: networks for LPIPS.

    Returns:
        `psnr`, `ssim`, `ms_ssim`, `lpips`, `flicker`, `block_score`, `frame_psnr` and other columns of `clips.csv`;
        None if one is infinite or undefined.

    Raises:
        ValueError: the shapes differ, or are not those of clips or images.
    """
    frames, target = _as_frames(output, reference)
    measures = ClipMeasures(frames.shape[2], frames.shape[3], period, networks)
    for output_frames, target_frames in zip(frames.split(_FRAMES_AT_ONCE), target.split(_FRAMES_AT_ONCE), strict=True):
        measures.update(output_frames, target_frames)
    return measures.row()


def picture_row(output: Tensor, reference: Tensor) -> NDArray[np.uint8]:
    """Draw reference, reconstruction and their absolute difference, amplified by 4, side by side.

    Args:
        output: reconstruction, `(3, T, H, W)` or `(3, H, W)` in [0, 1].
        reference: the same shape and range.

    Returns:
        `(H, W', 3)`: the three pictures of an image, or those of a clip's first, middle and last frame.

    Raises:
        ValueError: the shapes differ, or are not those of clips or images.
    """
    frames, target = _as_frames(output, reference)
    pieces = []
    for index in sorted({0, len(frames) // 2, len(frames) - 1}):
        error = (_ERROR_GAIN * (frames[index] - target[index]).abs()).clamp(max=1)
        pieces += [target[index], frames[index], error]
    return to_bytes(torch.cat(pieces, dim=2)[None])[0]


def _as_frames(output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float32 `(T, 3, H, W)`."""
    if output.shape != reference.shape or output.ndim not in (3, 4) or output.shape[0] != 3:
        raise ValueError(
            f"expected two clips (3, T, H, W) or images (3, H, W) of one shape;"
            f" got {tuple(output.shape)} and {tuple(reference.shape)}"
        )
    frames, target = (x.unsqueeze(1) if x.ndim == 3 else x for x in (output, reference))
    return frames.transpose(0, 1).float(), target.transpose(0, 1).float()
