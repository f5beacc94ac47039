"""Losses as pure functions of tensors, computed in float32 at least.

They know of no processes: what is averaged over ranks is averaged by the caller.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from litevae.posterior import DiagonalGaussian


def _in_full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expect_same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}: it must be the target's, {tuple(target.shape)}"
        )


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, `mean |prediction - target|`.

    Args:
        prediction: any shape.
        target: the same shape.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ.
    """
    _expect_same_shape(prediction, target)
    return (_in_full_precision(prediction) - _in_full_precision(target)).abs().mean()


def kl(posterior: DiagonalGaussian) -> Tensor:
    """Divergence from the standard normal in nats, summed over the latent and averaged over the batch.

    Source: LiteVAE, Section 3; the reduction is that of the published LeanVAE recipe.

    Returns:
        A scalar.
    """
    return posterior.kl().mean()


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator, `(mean relu(1 - real) + mean relu(1 + fake)) / 2`.

    Source: Lim and Ye, "Geometric GAN" (2017); halved as in VQGAN (Esser et al., 2021).

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions without a gradient to the generator, any shape.

    Returns:
        A scalar; 1 for a discriminator that says 0 everywhere.
    """
    real = F.relu(1 - _in_full_precision(real_logits)).mean()
    fake = F.relu(1 + _in_full_precision(fake_logits)).mean()
    return 0.5 * (real + fake)


def hinge_g_loss(fake_logits: Tensor) -> Tensor:
    """Generator's part of the hinge loss, `-mean fake` (Lim and Ye, 2017): a scalar.

    Args:
        fake_logits: logits of reconstructions, any shape.
    """
    return -_in_full_precision(fake_logits).mean()


def logistic_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of a discriminator, `(mean softplus(-real) + mean softplus(fake)) / 2`.

    Source: Goodfellow et al., "Generative adversarial nets" (2014), Equation 1; halved like the hinge loss.

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions without a gradient to the generator, any shape.

    Returns:
        A scalar; ln 2 for a discriminator that says 0 everywhere.
    """
    real = F.softplus(-_in_full_precision(real_logits)).mean()
    fake = F.softplus(_in_full_precision(fake_logits)).mean()
    return 0.5 * (real + fake)


def logistic_g_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of a generator, `mean softplus(-fake)` (Goodfellow et al., 2014): a scalar.

    Args:
        fake_logits: logits of reconstructions, any shape.
    """
    return F.softplus(-_in_full_precision(fake_logits)).mean()


def lecam_penalty(real_logits: Tensor, fake_logits: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """Keeps a discriminator's logits near the running average of the opposite kind.

    `mean relu(real - average_fake)^2 + mean relu(average_real - fake)^2`. Source: Tseng et al., "Regularizing
    generative adversarial networks under limited data" (2021), with one-sided distances: a real logit below
    the reconstructions' average, or the reverse, is left alone.

    Args:
        real_logits: logits of real images, any shape.
        fake_logits: logits of reconstructions, any shape.
        average_real: running mean of real logits, a scalar without gradient, the same on all ranks.
        average_fake: running mean of the reconstructions' logits, likewise.

    Returns:
        A scalar.
    """
    real = F.relu(_in_full_precision(real_logits) - average_fake).square().mean()
    fake = F.relu(average_real - _in_full_precision(fake_logits)).square().mean()
    return real + fake
