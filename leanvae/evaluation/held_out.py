"""Measures and pictures of single clips and images, such as those that training holds out."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.evaluation.artefacts import Parts
from leanvae.evaluation.feature_networks import FeatureNetworks
from leanvae.evaluation.measuring import ClipMeasures
from leanvae.evaluation.pictures import to_bytes

_NO_NETWORKS = FeatureNetworks(None, None, None, [])
_ERROR_GAIN = 4.0
_FRAMES_AT_ONCE = 4  # what LPIPS keeps of them takes the most memory


def measure_clip(
    output: Tensor, reference: Tensor, period: int, networks: FeatureNetworks = _NO_NETWORKS
) -> dict[str, Any]:
    """The measures of `leanvae evaluate` of one clip or image.

    Args:
        output: reconstruction, `(3, T, H, W)` or `(3, H, W)` in [0, 1].
        reference: the same shape and range.
        period: side of the model's patches in pixels.
        networks: what LPIPS is computed with.

    Returns:
        `psnr`, `ssim`, `ms_ssim`, `lpips`, `flicker`, `block_score`, `frame_psnr` and others of a line of `clips.csv`;
        None where one is infinite or not defined.

    Raises:
        ValueError: the shapes differ or are no clip or image.
    """
    frames, target = _as_frames(output, reference)
    measures = ClipMeasures(frames.shape[2], frames.shape[3], period, networks)
    for output_frames, target_frames in zip(frames.split(_FRAMES_AT_ONCE), target.split(_FRAMES_AT_ONCE), strict=True):
        measures.update(output_frames, target_frames)
    return measures.row(Parts())


def picture_row(output: Tensor, reference: Tensor) -> NDArray[np.uint8]:
    """Reference, reconstruction and their absolute difference, four times as strong, side by side.

    Args:
        output: reconstruction, `(3, T, H, W)` or `(3, H, W)` in [0, 1].
        reference: the same shape and range.

    Returns:
        `(H, W', 3)`: of an image the three pictures, of a clip those of its first, middle and last frame.

    Raises:
        ValueError: the shapes differ or are no clip or image.
    """
    frames, target = _as_frames(output, reference)
    pieces = []
    for index in sorted({0, len(frames) // 2, len(frames) - 1}):
        error = (_ERROR_GAIN * (frames[index] - target[index]).abs()).clamp(max=1)
        pieces += [target[index], frames[index], error]
    return to_bytes(torch.cat(pieces, dim=2)[None])[0]


def _as_frames(output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 `(T, 3, H, W)`."""
    if output.shape != reference.shape or output.ndim not in (3, 4) or output.shape[0] != 3:
        raise ValueError(
            f"expected two clips (3, T, H, W) or images (3, H, W) of one shape;"
            f" got {tuple(output.shape)} and {tuple(reference.shape)}"
        )
    frames, target = (x.unsqueeze(1) if x.ndim == 3 else x for x in (output, reference))
    return frames.transpose(0, 1).float(), target.transpose(0, 1).float()
