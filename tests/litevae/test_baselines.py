"""The SD-VAE against diffusers' own, on random weights."""

import pytest
import torch

from litevae.baselines import from_diffusers
from litevae.model import LiteVAE
from litevae.torchvision_compat import prepare_torchvision


@pytest.fixture
def build():
    """A function that makes a small AutoencoderKL with random weights, even where they start at 0 or 1."""
    prepare_torchvision()
    from diffusers import AutoencoderKL

    def make(**fields):
        torch.manual_seed(0)
        settings = {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 1, "latent_channels": 4, **fields}
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        reference = AutoencoderKL(**settings, **kinds).eval()
        for parameter in reference.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        return reference

    return make


def ours(state):
    config, renamed = from_diffusers(state)
    vae = LiteVAE(config).eval()
    vae.load_state_dict(renamed, strict=True)
    return vae


@pytest.mark.parity
@pytest.mark.parametrize(
    "fields",
    [{}, {"layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}],
    ids=["sd", "without 1x1 convolutions"],
)
def test_sd_vae_computes_what_diffusers_does(build, fields):
    reference = build(**fields)
    vae = ours(reference.state_dict())
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    with torch.inference_mode():
        expected = reference.encode(images).latent_dist
        posterior = vae.encode(images)
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
        latent = torch.randn(2, vae.config.latent_channels, 6, 8)
        torch.testing.assert_close(vae.decode(latent), reference.decode(latent).sample, rtol=1e-5, atol=1e-5)


def test_weights_in_the_names_of_old_diffusers_load_too(build):
    state = build().state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        renamed[name] = value[..., None, None] if "attentions" in name and value.ndim == 2 else value
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(ours(renamed)(images)[0], ours(state)(images)[0], rtol=0, atol=0)


def test_other_state_dicts_are_refused(build):
    state = build().state_dict()
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight is missing"):
        from_diffusers({name: value for name, value in state.items() if name != "decoder.conv_in.weight"})
    with pytest.raises(ValueError, match="quant_conv and post_quant_conv: expected both or none"):
        from_diffusers({name: value for name, value in state.items() if not name.startswith("quant_conv")})
    with pytest.raises(ValueError, match="expected four levels"):
        from_diffusers({name: value for name, value in state.items() if "blocks.3." not in name})
