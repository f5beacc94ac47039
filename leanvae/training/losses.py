"""Terms of the reconstruction loss, for clips `(B, 3, T, H, W)` and images `(B, 3, H, W)` in [-1, 1]."""

from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor

from leanvae.patchify import to_bands
from leanvae.training.config import LossConfig
from litevae.losses import gaussian_high_frequency_l1, kl, l1, l2, ldl, wavelet_charbonnier
from litevae.perceptual import FeatureDistance, PerceptualDistance
from litevae.posterior import DiagonalGaussian

Perceptual = Mapping[str, PerceptualDistance | FeatureDistance]  # by the name of their term: lpips, vgg


def reconstruction_terms(
    losses: LossConfig,
    step: int,
    prediction: Tensor,
    target: Tensor,
    patch_size: tuple[int, int, int],
    posterior: DiagonalGaussian,
    perceptual: Perceptual,
    perceptual_frames: Tensor | None,
    average_prediction: Callable[[], Tensor],
) -> dict[str, tuple[float, Tensor]]:
    """Compute the terms that count in a step, with their weights; pixels and KL always, for the record.

    Args:
        losses: weights and first steps.
        step: number of the step, from 0.
        prediction: the decoder's output, float32.
        target: the true pixels.
        patch_size: pixels (frames, height, width) of a latent token.
        posterior: posterior of the latents.
        perceptual: available perceptual networks, by term.
        perceptual_frames: frames of each clip for these networks, `(B, n)`; None for images.
        average_prediction: gives the output of the averaged weights for the same latents (LDL's reference).

    Returns:
        Weight and scalar value by name.
    """
    weights = {name: getattr(losses, name).at(step) for name in _TERMS}
    terms = {"l1": (weights["l1"], l1(prediction, target)), "kl": (weights["kl"], kl(posterior))}
    if weights["l2"]:
        terms["l2"] = (weights["l2"], l2(prediction, target))
    if weights["borders"]:
        terms["borders"] = (weights["borders"], border_steps(prediction, target, patch_size))
    if weights["low_bands"] or weights["high_bands"]:
        low, high = band_l1(prediction, target)
        terms |= {"low_bands": (weights["low_bands"], low), "high_bands": (weights["high_bands"], high)}
    for name, distance in perceptual.items():
        if weights[name]:
            frames = select_frames(prediction, perceptual_frames), select_frames(target, perceptual_frames)
            terms[name] = (weights[name], distance(*frames).mean())
    images, true_images = as_images(prediction), as_images(target)
    if weights["wavelet"]:
        terms["wavelet"] = (weights["wavelet"], wavelet_charbonnier(images, true_images))
    if weights["gaussian"]:
        terms["gaussian"] = (weights["gaussian"], gaussian_high_frequency_l1(images, true_images))
    if weights["ldl"]:
        terms["ldl"] = (weights["ldl"], ldl(images, as_images(average_prediction()), true_images))
    return terms


_TERMS = ("l1", "l2", "borders", "kl", "low_bands", "high_bands", "lpips", "vgg", "wavelet", "gaussian", "ldl")


def weighted_sum(terms: Mapping[str, tuple[float, Tensor]]) -> Tensor:
    """Add up weighted terms to a scalar."""
    return torch.stack([weight * value for weight, value in terms.values()]).sum()


def band_l1(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean absolute error of the low and of the high Haar bands (published recipe of LeanVAE).

    Each is the mean over the image frame's bands plus the mean over the video frames' bands, in the bands' published
    scale.

    Args:
        prediction: clip `(B, 3, T, H, W)`, T odd, or image `(B, 3, H, W)`; H and W even.
        target: the same shape.

    Returns:
        Two scalars: low bands, high bands.
    """
    difference = prediction - target
    bands = to_bands(difference if difference.ndim == 5 else difference.unsqueeze(2))
    parts = [part.abs() for part in (bands.image, bands.video) if part is not None]
    low = torch.stack([part[:, :3].mean() for part in parts]).sum()
    high = torch.stack([part[:, 3:].mean() for part in parts]).sum()
    return low, high


def border_steps(prediction: Tensor, target: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Compute the mean absolute step of the error from each patch to its neighbours below and on the right.

    It is what makes blocks visible: an error that goes on across a border is none. Squared steps would spend most of
    the weight on textures, which hide blocks.

    Args:
        prediction: `(..., H, W)`.
        target: the same shape.
        patch_size: pixels (frames, height, width) of a latent token.

    Returns:
        A scalar; 0 for a single patch.
    """
    error = (prediction - target).float()
    steps = []
    for axis, side in ((-2, patch_size[1]), (-1, patch_size[2])):
        borders = torch.arange(side, error.shape[axis], side, device=error.device)
        steps.append(error.index_select(axis, borders) - error.index_select(axis, borders - 1))
    return torch.cat([step.flatten() for step in steps]).abs().sum() / max(1, sum(step.numel() for step in steps))


def select_frames(pixels: Tensor, frames: Tensor | None) -> Tensor:
    """Return frames `(B, n)` of a clip `(B, C, T, H, W)` as images `(B * n, C, H, W)`; images as they are."""
    if frames is None:
        return pixels
    batch = torch.arange(len(pixels), device=pixels.device)[:, None]
    return rearrange(pixels.movedim(2, 1)[batch, frames.to(pixels.device)], "b n c h w -> (b n) c h w")


def as_images(pixels: Tensor) -> Tensor:
    """Return all frames of a clip `(B, C, T, H, W)` as images `(B * T, C, H, W)`; images as they are."""
    return rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.ndim == 5 else pixels
