"""Measures of the paper's analysis: the latents' distance to a Gaussian, feature maps, and latents as colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RBF_SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # bandwidths of LiteVAE, Table 6

_MMD_BLOCK = 512  # samples whose distances to as many others are held at once
_PEAK_SHARE = 0.001  # of the positions, whose magnitude is compared with the median
_TOP_SHARE = 0.01  # of the positions, whose energy is compared with the whole
_TAIL = 0.01  # of a latent channel's values, cut off at either end of the colour scale


def mmd(x: Tensor, y: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Compute the squared maximum mean discrepancy of two samples, with the kernel exp(-|a - b|^2 / (2 sigma^2)).

    The unbiased estimate of Gretton et al., "A kernel two-sample test" (2012), Equation 3: the mean kernel of pairs
    within `x`, plus that within `y`, minus twice that between them. A sample does not pair with itself, so for two
    samples of one distribution the estimate scatters around 0 and may be negative. It is at most 2.

    A flattened latent is one sample, as the bandwidths 25 to 500 in LiteVAE's Table 6 suggest: two standard normal
    vectors of D = 32 * 32 * 4 elements are sqrt(2 D) = 90 apart. The paper does not say how it scales its numbers.
    Ours are not scaled, so compare them only with each other, and only at the same D.

    Args:
        x: `(M, D)`, at least two samples.
        y: `(N, D)`, at least two samples, on the same device.
        sigma: bandwidth of the kernel in the samples' own unit, or several bandwidths.

    Returns:
        `()`, or `(S,)` for S bandwidths; float64. Memory is bounded for any M and N.

    Raises:
        ValueError: a shape, a bandwidth or a value is wrong.
    """
    for name, samples in (("x", x), ("y", y)):
        if samples.ndim != 2 or len(samples) < 2 or samples.shape[1] != x.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(samples.shape)}: expected two or more samples (N, D), of one D"
                f" (x has {tuple(x.shape)})"
            )
        if not samples.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    sigmas = torch.as_tensor(sigma, dtype=torch.float64)
    if sigmas.ndim > 1 or not (sigmas.isfinite() & (sigmas > 0)).all():
        raise ValueError(f"sigma is {sigma}: expected one or several positive bandwidths")
    rates = (-0.5 / sigmas.square()).reshape(-1).to(x.device)
    m, n = len(x), len(y)
    # The kernel of a sample with itself is 1.
    within_x = (_kernel_sums(x, x, rates) - m) / (m * (m - 1))
    within_y = (_kernel_sums(y, y, rates) - n) / (n * (n - 1))
    between = _kernel_sums(x, y, rates) / (m * n)
    return (within_x + within_y - 2 * between).reshape(sigmas.shape)


def _kernel_sums(x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """Sum exp(rate * |a - b|^2) over all pairs, block by block: `(S,)` for S rates, float64."""
    total = torch.zeros_like(rates)
    for row, a in enumerate(x.split(_MMD_BLOCK)):
        a = a.double()
        for column, b in enumerate(y.split(_MMD_BLOCK)):
            b = b.double()
            squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
            if x is y and row == column:
                squares.fill_diagonal_(0.0)  # cancellation leaves rounding errors
            squares.clamp_(min=0.0)
            total += torch.stack([torch.exp(rate * squares).sum() for rate in rates])
    return total


@dataclass(frozen=True)
class Imbalance:
    """Measures of how unevenly feature maps spread their magnitude over the positions.

    Both numbers are ours, because the paper shows only pictures. They do not depend on the features' scale.

    Attributes:
        magnitude: `(B, H, W)`, root mean square over the channels; float32 at least.
        peak_ratio: `(B,)`, root mean square of the largest 0.1% of the magnitudes (at least one position) over the
            median: 1 for a flat map; infinite if more than half the map is zero, but not all.
        top_share: `(B,)`, share of the energy (the sum of squares) in the strongest 1% of the positions (at least
            one): their share of the positions for a flat map, 1 if they have all the energy.
    """

    magnitude: Tensor
    peak_ratio: Tensor
    top_share: Tensor


def feature_imbalance(features: Tensor) -> Imbalance:
    """Measure the magnitude of feature maps, and how far its peaks exceed the rest (LiteVAE, Figure 3).

    Args:
        features: `(B, C, H, W)`, such as `litevae.decoder.Decoder.features`.

    Raises:
        ValueError: the shape is wrong or a value is not finite.
    """
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(f"features have shape {tuple(features.shape)}: expected (B, C, H, W)")
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite")
    dtype = torch.promote_types(features.dtype, torch.float32)
    energy = features.to(dtype).square().mean(1)  # B C H W -> B H W
    ranked = energy.flatten(1).sort(dim=1, descending=True).values.double()
    count = ranked.shape[1]
    peak = ranked[:, : math.ceil(_PEAK_SHARE * count)].mean(1).sqrt()
    median = ranked[:, (count - 1) // 2 : count // 2 + 1].sqrt().mean(1)
    top, whole = ranked[:, : math.ceil(_TOP_SHARE * count)].sum(1), ranked.sum(1)
    flat = whole == 0
    peak_ratio = torch.where(flat, 1.0, peak / median)
    top_share = torch.where(flat, math.ceil(_TOP_SHARE * count) / count, top / whole)
    return Imbalance(energy.sqrt(), peak_ratio.to(dtype), top_share.to(dtype))


def latents_as_rgb(latent: Tensor) -> Tensor:
    """Show the first three channels of latents as red, green and blue (LiteVAE, Figures 2 and 4).

    Each channel of each image is stretched so that 0 and 1 lie at its 1st and 99th percentile, and clipped there. A
    flat channel becomes 0.5. With fewer than three channels, the last is repeated.

    Args:
        latent: `(B, Z, h, w)`, finite.

    Returns:
        `(B, 3, h, w)` in [0, 1]; float32 at least.

    Raises:
        ValueError: the shape is wrong or a value is not finite.
    """
    if latent.ndim != 4 or 0 in latent.shape:
        raise ValueError(f"latent has shape {tuple(latent.shape)}: expected (B, Z, h, w)")
    if not latent.isfinite().all():
        raise ValueError("latent holds values that are not finite")
    channels = [min(channel, latent.shape[1] - 1) for channel in range(3)]
    colours = latent[:, channels].to(torch.promote_types(latent.dtype, torch.float32))
    ranked = colours.flatten(2).sort(dim=2).values
    last = ranked.shape[2] - 1
    low, high = (ranked[:, :, round(share * last), None, None] for share in (_TAIL, 1 - _TAIL))
    spread = high - low
    scaled = (colours - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, scaled, 0.5).clamp(0, 1)
