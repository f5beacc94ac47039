"""Losses as pure functions of tensors, computed in float32 at least.

They know nothing of processes: the caller averages over ranks. Losses of a discriminator's logits take one tensor; if a
discriminator has several outputs, the caller sums over them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from litevae.posterior import DiagonalGaussian
from litevae.wavelet import dwt2d

_MAX_ADAPTIVE_WEIGHT = 1e4


def _in_full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expect_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}: expected the target's, {tuple(target.shape)}"
        )


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    _expect_same_shape(prediction, target)
    return _in_full_precision(prediction) - _in_full_precision(target)


def _expect_images(prediction: Tensor) -> None:
    if prediction.ndim != 4:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}: expected images (N, C, H, W)")


def _expect_odd(name: str, value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} is {value}: it must be odd and positive")


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute difference, `mean |prediction - target|`.

    Args:
        prediction: any shape.
        target: the same shape.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    return _difference(prediction, target).abs().mean()


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, `mean (prediction - target)^2`; arguments and errors as for `l1`."""
    return _difference(prediction, target).square().mean()


def charbonnier(prediction: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Compute a smooth absolute difference, `mean sqrt((prediction - target)^2 + eps^2)`.

    Source: the Charbonnier loss, as in Barron, "A general and adaptive robust loss function" (2019), up to a
    factor and an offset.

    Args:
        prediction: any shape.
        target: the same shape.
        eps: positive; far larger differences count as in L1. Also the loss of equal tensors.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ, or `eps` is not positive.
    """
    return _charbonnier(_difference(prediction, target), eps)


def _charbonnier(difference: Tensor, eps: float) -> Tensor:
    if not eps > 0:
        raise ValueError(f"eps is {eps}: it must be positive, or equal pixels have no gradient")
    return (difference.square() + eps**2).sqrt().mean()


def wavelet_charbonnier(prediction: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Compute the Charbonnier loss between the three high sub-bands of one Haar level, divided by 2.

    Source: LiteVAE, Section 4.3, with the scale of its listing, `dwt(level=1) / 2`. The transform is linear, so it is
    applied to the difference.

    Args:
        prediction: `(N, C, H, W)`, H and W even.
        target: the same shape.
        eps: as in `charbonnier`.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ or are not those of images, H or W is odd, or `eps` is not positive.
    """
    difference = _difference(prediction, target)
    _expect_images(difference)
    return _charbonnier(dwt2d(difference)[:, difference.shape[1] :] / 2, eps)


def _gaussian_blur(images: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Filter the last two axes with a Gaussian, repeating edge pixels; the shape stays the same."""
    radius = kernel_size // 2
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    blurred = images
    for axis in (-2, -1):
        length = blurred.shape[axis]
        first, last = blurred.narrow(axis, 0, 1), blurred.narrow(axis, length - 1, 1)
        # On GPUs, F.pad's gradient depends on the order of additions, and convolutions may use lower precision.
        padded = torch.cat([first] * radius + [blurred] + [last] * radius, dim=axis)
        taps = [padded.narrow(axis, start, length) * (w / sum(weights)) for start, w in enumerate(weights)]
        blurred = torch.stack(taps).sum(0)
    return blurred


def gaussian_high_frequency_l1(prediction: Tensor, target: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """Compute the L1 of what a Gaussian filter h removes: `mean |(x - h(x)) - (y - h(y))|`.

    Source: LiteVAE, Section 4.3. The paper does not give the filter; five taps with a standard deviation of one
    pixel are our choice. The filter is linear, so it is applied to the difference. Edge pixels are repeated.

    Args:
        prediction: `(N, C, H, W)`.
        target: the same shape.
        kernel_size: taps along each axis, odd.
        sigma: standard deviation in pixels.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ or are not those of images, or the filter is impossible.
    """
    _expect_odd("kernel_size", kernel_size)
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}: it must be positive")
    difference = _difference(prediction, target)
    _expect_images(difference)
    return (difference - _gaussian_blur(difference, kernel_size, sigma)).abs().mean()


def _local_variance(x: Tensor, kernel_size: int) -> Tensor:
    """Compute the population variance of the window around each pixel of `(N, 1, H, W)`, reflected at the edges."""
    # Centred, because the mean of squares minus the square of the mean is accurate only for values around zero.
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    padded = F.pad(centred, [kernel_size // 2] * 4, mode="reflect")
    mean = F.avg_pool2d(padded, kernel_size, stride=1)
    return (F.avg_pool2d(padded.square(), kernel_size, stride=1) - mean.square()).clamp_min(0)


def ldl(prediction: Tensor, average_prediction: Tensor, target: Tensor, kernel_size: int = 7) -> Tensor:
    """Compute the L1 where the prediction looks like an artifact (locally discriminative learning), `mean |M (x - y)|`.

    Source: Liang et al., "Details or artifacts: a locally discriminative learning approach to realistic image
    super-resolution" (2022), Section 3. With the residuals R1 = |target - prediction| and
    R2 = |target - average_prediction|, summed over the channels, the map M is the variance of R1 in the window
    around each pixel times the fifth root of its variance over the image, and zero where R1 < R2. Both are
    population variances. The map carries no gradient.

    Args:
        prediction: `(N, C, H, W)`.
        average_prediction: the same from the model's averaged (EMA) weights, in the same shape.
        target: the same shape.
        kernel_size: side of the window, odd.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ or are not those of images larger than half the window, or the window is
            even.
    """
    _expect_odd("kernel_size", kernel_size)
    difference = _difference(prediction, target)
    _expect_images(difference)
    if min(difference.shape[-2:]) <= kernel_size // 2:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}: a window of {kernel_size} needs "
            f"H and W of at least {kernel_size // 2 + 1}"
        )
    with torch.no_grad():
        residual = difference.abs().sum(1, keepdim=True)
        average_residual = _difference(average_prediction, target).abs().sum(1, keepdim=True)
        scale = residual.var(dim=(1, 2, 3), correction=0, keepdim=True) ** 0.2
        artifacts = _local_variance(residual, kernel_size) * scale * (residual >= average_residual)
    return (artifacts * difference).abs().mean()


def kl(posterior: DiagonalGaussian) -> Tensor:
    """Compute the divergence from the standard normal in nats, summed over the latent and averaged over the batch.

    Source: LiteVAE, Section 3; the reduction is that of the published LeanVAE recipe.

    Returns:
        A scalar.
    """
    return posterior.kl().mean()


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute a discriminator's hinge loss, `(mean relu(1 - real) + mean relu(1 + fake)) / 2`.

    Source: Lim and Ye, "Geometric GAN" (2017); halved as in VQGAN (Esser et al., 2021).

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions without a gradient to the generator, any shape.

    Returns:
        A scalar; 1 for a discriminator that returns 0 everywhere.
    """
    real = F.relu(1 - _in_full_precision(real_logits)).mean()
    fake = F.relu(1 + _in_full_precision(fake_logits)).mean()
    return 0.5 * (real + fake)


def hinge_g_loss(fake_logits: Tensor) -> Tensor:
    """Compute the generator's part of the hinge loss, `-mean fake` (Lim and Ye, 2017): a scalar.

    Args:
        fake_logits: logits of reconstructions, any shape.
    """
    return -_in_full_precision(fake_logits).mean()


def logistic_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute a discriminator's logistic loss, `(mean softplus(-real) + mean softplus(fake)) / 2`.

    Source: Goodfellow et al., "Generative adversarial nets" (2014), Equation 1; halved like the hinge loss.

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions without a gradient to the generator, any shape.

    Returns:
        A scalar; ln 2 for a discriminator that returns 0 everywhere.
    """
    real = F.softplus(-_in_full_precision(real_logits)).mean()
    fake = F.softplus(_in_full_precision(fake_logits)).mean()
    return 0.5 * (real + fake)


def logistic_g_loss(fake_logits: Tensor) -> Tensor:
    """Compute a generator's non-saturating loss, `mean softplus(-fake)` (Goodfellow et al., 2014): a scalar.

    Args:
        fake_logits: logits of reconstructions, any shape.
    """
    return F.softplus(-_in_full_precision(fake_logits)).mean()


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """Penalise logits that move away from the running average of the opposite kind.

    `mean relu(real - average_fake)^2 + mean relu(average_real - fake)^2`. Source: Tseng et al., "Regularizing
    generative adversarial networks under limited data" (2021), with one-sided distances: a real logit below the
    reconstructions' average, or the reverse, costs nothing.

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions, any shape.
        average_real: running mean of real logits, a scalar without gradient, the same on all ranks.
        average_fake: running mean of the reconstructions' logits, the same kind of scalar.

    Returns:
        A scalar.
    """
    real = F.relu(_in_full_precision(real_logits) - average_fake).square().mean()
    fake = F.relu(average_real - _in_full_precision(fake_logits)).square().mean()
    return real + fake


@torch.no_grad()
def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all tensors together, in float32 at least, without a gradient: a scalar.

    Args:
        tensors: at least one, of any shapes, on one device.

    Raises:
        ValueError: `tensors` is empty.
    """
    if not tensors:
        raise ValueError("tensors is empty: a norm needs at least one gradient")
    norms = [torch.linalg.vector_norm(_in_full_precision(tensor)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def adaptive_weight(
    reconstruction_gradients: Sequence[Tensor],
    adversarial_gradients: Sequence[Tensor],
    factor: float = 0.5,
    delta: float = 1e-6,
) -> Tensor:
    """Compute the weight that brings the adversarial gradient to a share of the reconstruction gradient's norm.

    `factor * |g_rec| / (|g_adv| + delta)`, at most 10,000. Source: LiteVAE, Equation 2, after Esser et al., "Taming
    transformers for high-resolution image synthesis" (2021); the bound is ours.

    Args:
        reconstruction_gradients: gradients of the reconstruction loss, usually for the last layer's weight.
        adversarial_gradients: gradients of the adversarial loss for the same parameters.
        factor: the share; the equation's 1/2.
        delta: keeps the weight finite without an adversarial gradient.

    Returns:
        A scalar without a gradient.

    Raises:
        ValueError: one of the sequences is empty.
    """
    ratio = gradient_norm(reconstruction_gradients) / (gradient_norm(adversarial_gradients) + delta)
    return (factor * ratio).clamp_max(_MAX_ADAPTIVE_WEIGHT)
