"""PSNR, SSIM and MS-SSIM of frames, and their running means; torchmetrics does the arithmetic."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from litevae.errors import extra
from litevae.torchvision_compat import prepare_torchvision

prepare_torchvision()  # torchmetrics imports torchvision if it is installed

with extra("video"):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_SIGMA = 1.5
SSIM_WINDOW = 11  # pixels: 3.5 sigma to either side of the centre
_SSIM_STRIP = 2**18  # pixels at once, about 200 MiB
MS_SSIM_SIDE = 161  # pixels, so that the window still fits after four halvings, by torchmetrics' rule
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from fine to coarse


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Compute each frame's peak signal-to-noise ratio, 10 log10(1 / mean squared error over its pixels and colours).

    Args:
        x: images `(N, C, H, W)` or clips `(B, C, T, H, W)` in [0, 1], not quantized.
        y: what `x` is compared with, of the same shape.

    Returns:
        `(N,)` or `(B * T,)` decibels, infinite for equal frames.

    Raises:
        ValueError: the shapes differ or are no images or clips.
    """
    x, y = _as_frames(x, y)
    return peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute each frame's structural similarity (Wang et al., 2004), the mean over its pixels and colours.

    The window is Gaussian with sigma 1.5 over 11 pixels; population covariance, K1 = 0.01, K2 = 0.03. Only pixels whose
    window lies inside the frame count.

    Args:
        x: images `(N, C, H, W)` or clips `(B, C, T, H, W)` in [0, 1], not quantized.
        y: what `x` is compared with, of the same shape.

    Returns:
        `(N,)` or `(B * T,)` values up to 1; NaN for frames with a side under 11 pixels, for which it is undefined.

    Raises:
        ValueError: the shapes differ or are no images or clips.
    """
    x, y = _as_frames(x, y)
    if min(x.shape[2:]) < SSIM_WINDOW:
        return x.new_full((len(x),), math.nan)
    return torch.stack([_ssim_of_frame(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])


def _ssim_of_frame(x: Tensor, y: Tensor) -> Tensor:
    """Compute the SSIM, a scalar, of two images `(1, C, H, W)`, over the pixels whose window lies inside.

    torchmetrics' own mean includes a mirrored border.
    """
    margin = SSIM_WINDOW // 2
    total = x.new_zeros(())
    for strip in _strips(x):
        _, similarity = structural_similarity_index_measure(
            x[:, :, strip], y[:, :, strip], sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_full_image=True
        )
        total += similarity[..., margin:-margin, margin:-margin].sum()
    return total / _num_windows(x)


def _contrast_of_frame(x: Tensor, y: Tensor) -> Tensor:
    """Compute the SSIM without its luminance term, a scalar, of two images `(1, C, H, W)`."""
    total = x.new_zeros(())
    for strip in _strips(x):
        a, b = x[:, :, strip], y[:, :, strip]
        _, contrast = structural_similarity_index_measure(
            a, b, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_contrast_sensitivity=True
        )
        total += contrast.squeeze() * _num_windows(a)  # its mean is over the pixels whose window lies inside
    return total / _num_windows(x)


def _strips(x: Tensor) -> Iterator[slice]:
    """Yield rows of `(1, C, H, W)` to process at a time, because SSIM takes about 60 times its input's memory.

    They overlap by a window minus a row, so that each window lies in one of them.
    """
    overlap = SSIM_WINDOW - 1
    rows = max(1, _SSIM_STRIP // x.shape[3])
    for top in range(0, x.shape[2] - overlap, rows):
        yield slice(top, min(top + rows + overlap, x.shape[2]))


def _num_windows(x: Tensor) -> int:
    """Count the windows inside `(1, C, H, W)`."""
    overlap = SSIM_WINDOW - 1
    return x.shape[1] * (x.shape[2] - overlap) * (x.shape[3] - overlap)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute each frame's multi-scale structural similarity (Wang et al., 2003), with the paper's five scales and
    weights.

    Windows are those of `ssim`; terms below 0 count as 0. torchmetrics' own function includes a mirrored border at the
    last scale, which changes the fourth decimal.

    Args:
        x: images `(N, C, H, W)` or clips `(B, C, T, H, W)` in [0, 1], not quantized.
        y: what `x` is compared with, of the same shape.

    Returns:
        `(N,)` or `(B * T,)` values up to 1; NaN for frames with a side under 161 pixels, for which it is undefined.

    Raises:
        ValueError: the shapes differ or are no images or clips.
    """
    x, y = _as_frames(x, y)
    if min(x.shape[2:]) < MS_SSIM_SIDE:
        return x.new_full((len(x),), math.nan)
    return torch.stack([_ms_ssim_of_frame(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])


def _ms_ssim_of_frame(x: Tensor, y: Tensor) -> Tensor:
    *finer, coarsest = _SCALE_WEIGHTS
    result = x.new_ones(())
    for weight in finer:
        result *= _contrast_of_frame(x, y).clamp_min(0) ** weight
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    return result * _ssim_of_frame(x, y).clamp_min(0) ** coarsest


def _as_frames(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check a pair and convert it to `(N, C, H, W)` in float32 or wider."""
    if x.shape != y.shape or x.ndim not in (4, 5) or 0 in x.shape:
        raise ValueError(
            f"expected two batches of one shape, (N, C, H, W) or (B, C, T, H, W);"
            f" got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.ndim == 5:
        x, y = (clips.transpose(1, 2).flatten(0, 1) for clips in (x, y))  # B C T H W -> (B T) C H W
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


@dataclass
class FrameMetrics:
    """Running means of PSNR and SSIM over frames, in constant memory.

    Attributes:
        num_frames: frames seen.
        psnr_sum: sum of their PSNR in decibels.
        ssim_sum: sum of their SSIM.
    """

    num_frames: int = 0
    psnr_sum: float = 0.0
    ssim_sum: float = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add frames, with the arguments of :func:`psnr`."""
        psnr_values, ssim_values = psnr(x, y), ssim(x, y)
        self.num_frames += len(psnr_values)
        self.psnr_sum += psnr_values.double().sum().item()
        self.ssim_sum += ssim_values.double().sum().item()

    @property
    def psnr(self) -> float | None:
        """Mean PSNR over frames in decibels; None if it is infinite or there are no frames."""
        return _finite_mean(self.psnr_sum, self.num_frames)

    @property
    def ssim(self) -> float | None:
        """Mean SSIM over frames; None if a frame was too small or there are no frames."""
        return _finite_mean(self.ssim_sum, self.num_frames)


def _finite_mean(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None
