"""Normalization of latents: the formula, and the fields that it needs in configurations."""

import pytest
import torch
from pydantic import ValidationError

from litevae import LiteVAE, LiteVAEConfig
from litevae.normalization import denormalize, normalize_posterior
from litevae.posterior import DiagonalGaussian

SMALL = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}
STATISTICS = {"latent_mean": (1.0, -2.0, 0.0, 3.0), "latent_std": (0.5, 2.0, 1.0, 4.0)}


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 2, 3, 5)])
def test_normalized_samples_stand_for_the_same_latents(shape):
    config = LiteVAEConfig(**STATISTICS)
    posterior = DiagonalGaussian(torch.randn(shape), torch.randn(shape), size=(24, 40))
    noise = torch.randn(shape)
    normalized = normalize_posterior(posterior, config)
    expected = posterior.sample_with(noise)
    torch.testing.assert_close(denormalize(normalized.sample_with(noise), config), expected, rtol=1e-5, atol=1e-5)
    channel = (posterior.mean[:, 1] + 2) / 2
    torch.testing.assert_close(normalized.mean[:, 1], channel)
    assert normalized.size == (24, 40)


def test_image_models_normalize():
    torch.manual_seed(0)
    vae = LiteVAE(LiteVAEConfig(**SMALL, **STATISTICS)).eval()
    x = torch.rand(1, 3, 24, 32) * 2 - 1
    with torch.inference_mode():
        posterior, normalized = vae.encode(x), vae.encode(x, normalize=True)
        assert not torch.allclose(posterior.mean, normalized.mean)
        same = vae.decode(normalized.mode(), (24, 32), normalize=True)
        torch.testing.assert_close(same, vae.decode(posterior.mode(), (24, 32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_mean": (0.0,) * 4}, "expected both or none"),
        ({"latent_mean": (0.0,) * 3, "latent_std": (1.0,) * 3}, "a value for each of 4 channels"),
        ({"latent_mean": (0.0,) * 4, "latent_std": (1.0, 1.0, 0.0, 1.0)}, "greater than 0"),
    ],
)
def test_wrong_statistics_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LiteVAEConfig(**fields)


def test_models_without_statistics_say_so():
    with pytest.raises(ValueError, match="no latent_mean and latent_std"):
        LiteVAE(LiteVAEConfig(**SMALL)).decode(torch.zeros(1, 4, 2, 2), normalize=True)
