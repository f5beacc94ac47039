"""Latents normalized to mean 0 and standard deviation 1 in each channel, by a data set's statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from litevae.config import AutoencoderConfig
from litevae.errors import InvalidInput
from litevae.posterior import DiagonalGaussian


def normalize_posterior(posterior: DiagonalGaussian, config: AutoencoderConfig) -> DiagonalGaussian:
    """Return the distribution of (z - mean) / std, channel by channel, for z from a posterior `(B, Z, ...)`.

    Raises:
        ValueError: the configuration holds no statistics.
    """
    mean, std = statistics_of(config)
    center, scale = _as_channels(mean, posterior.mean), _as_channels(std, posterior.mean)
    return DiagonalGaussian((posterior.mean - center) / scale, posterior.logvar - 2 * scale.log(), posterior.size)


def denormalize(latent: Tensor, config: AutoencoderConfig) -> Tensor:
    """Return the latent `(B, Z, ...)` that a normalized one stands for.

    Raises:
        ValueError: the configuration holds no statistics, or those of another number of channels.
    """
    mean, std = statistics_of(config)
    return latent * _as_channels(std, latent) + _as_channels(mean, latent)


def statistics_of(config: AutoencoderConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel.

    Raises:
        ValueError: the configuration holds none.
    """
    if config.latent_mean is None or config.latent_std is None:
        raise InvalidInput(
            "normalize: the configuration has no latent_mean and latent_std; "
            "`leanvae encode_clips --update-checkpoint` measures them and writes them there"
        )
    return config.latent_mean, config.latent_std


def _as_channels(values: Sequence[float], latent: Tensor) -> Tensor:
    return torch.tensor(values, dtype=latent.dtype, device=latent.device).view(1, -1, *[1] * (latent.ndim - 2))
