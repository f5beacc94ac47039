"""LiteVAE: parameter counts of the paper, shapes, sizes, bad input, and what each option changes."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from litevae import LiteVAE, LiteVAEConfig

SMALL = {
    "extraction_channels": 8,
    "extraction_multipliers": (1, 2),
    "aggregation_channels": 8,
    "aggregation_multipliers": (1, 2),
    "encoder_channels": 8,
    "decoder_channels": 8,
    "num_res_blocks": 1,
}
VARIANTS = {
    "default": {},
    "shared": {"shared_extraction": True},
    "naf": {"extraction": "naf"},
    "levels": {"levels": (2, 3)},
    "deepest": {"levels": (3,)},
    "vit": {"aggregation": "vit", "vit_grid": (4, 6)},
    "smc": {"encoder_norm": "smc", "decoder_norm": "smc"},
    "convolutional": {"encoder_norm": "smc", "decoder_norm": "smc", "decoder_attention": False},
    "bands": {"output_type": "wavelet"},
    "latent_conv": {"latent_conv": True},
    "sd": {"encoder": "sd"},
    "dwt": {"encoder": "dwt", "latent_channels": 12},
    "dwt2": {"encoder": "dwt2", "latent_channels": 48},
}


def make(**fields):
    torch.manual_seed(0)
    return LiteVAE(LiteVAEConfig(**SMALL | fields)).eval()


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def meta(config):
    with torch.device("meta"):
        return LiteVAE(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("S", 1.036e6), ("B", 6.75e6), ("M", 32.75e6), ("L", 41.42e6), ("SD-VAE", 34.16e6)],
)
def test_encoders_have_the_parameters_of_the_paper(name, expected):
    digits = 1e3 if name == "S" else 1e4
    assert round(count(meta(LiteVAEConfig.preset(name)).encoder) / digits) == round(expected / digits)


def test_small_vae_has_the_parameters_of_lite_vae_b():
    small, base = (count(meta(LiteVAEConfig.preset(name)).encoder) for name in ("VAE-Small", "B"))
    assert small == pytest.approx(base, rel=0.01)


def test_vit_has_half_the_parameters_of_the_unet():
    base, vit = meta(LiteVAEConfig()), meta(LiteVAEConfig(aggregation="vit"))
    assert count(base.encoder.aggregation) == pytest.approx(1.69e6, rel=0.005)
    assert count(vit.encoder.aggregation) == pytest.approx(0.84e6, rel=0.02)


def test_shared_extraction_has_a_third_of_the_parameters():
    base, shared = meta(LiteVAEConfig()), meta(LiteVAEConfig(shared_extraction=True))
    assert 3 * count(shared.encoder.extraction) == count(base.encoder.extraction)


@pytest.mark.parametrize("name", ["dwt", "dwt2"])
def test_encoders_of_bands_have_no_parameters(name):
    assert count(make(**VARIANTS[name]).encoder) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size_is_padded_and_cropped_back(variant):
    vae = make(**VARIANTS[variant])
    x = images(2, 3, 27, 43)
    with torch.inference_mode():
        posterior = vae.encode(x)
        assert posterior.mean.shape[1:] == vae.latent_shape((27, 43)) == (vae.config.latent_channels, 4, 6)
        assert posterior.size == (27, 43)
        assert vae.decode(posterior.mode(), posterior.size).shape == x.shape
        assert vae.decode(posterior.mode()).shape == (2, 3, 32, 48)
        padded = F.pad(x, (0, 5, 0, 5), mode="replicate")
        torch.testing.assert_close(vae.encode(padded).mean, posterior.mean)


@pytest.mark.parametrize("variant", VARIANTS)
def test_overwriting_in_inference_changes_no_result(variant):
    vae = make(**VARIANTS[variant])
    x = images(3, 3, 32, 48)
    before = x.clone()
    expected, posterior = vae(x)
    with torch.inference_mode():
        actual, _ = vae(x)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    assert posterior.mean.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    vae = make(**VARIANTS[variant]).train()
    for parameter in vae.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # NAFNet's scales start at zero, which hides what is behind them
    x = images(2, 3, 32, 48)
    reconstruction, posterior = vae(x, torch.randn(2, *vae.latent_shape((32, 48))))
    ((reconstruction - x).square().mean() + 1e-3 * posterior.kl().mean()).backward()
    missing = [name for name, value in vae.named_parameters() if value.grad is None or not value.grad.any()]
    # A key's bias adds the same to a query's score with every key, which the softmax takes away again.
    assert [name for name in missing if not name.endswith("attention.key.bias")] == []


@pytest.mark.parametrize("variant", ["default", "convolutional", "sd"])
def test_an_image_does_not_depend_on_its_batch(variant):
    vae = make(**VARIANTS[variant]).double()
    x = images(3, 3, 32, 32).double()
    with torch.inference_mode():
        torch.testing.assert_close(vae(x[1:2])[0], vae(x)[0][1:2], rtol=1e-9, atol=1e-9)


def test_the_deepest_level_alone_sees_the_image_smoothed():
    """Without levels 1 and 2, detail missing from the third level's bands cannot matter."""
    vae = make(levels=(3,))
    x = images(1, 3, 32, 32)
    detail = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16) * 0.1
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(x + detail).mean, vae.encode(x).mean)
        assert not torch.allclose(make().encode(x + detail).mean, make().encode(x).mean, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), [("dwt", 8), ("dwt2", 4)])
def test_bands_as_latents_keep_the_mean_colour(name, size):
    """A level's low band over 2^l is the mean of the pixels below it; constant images have no other bands."""
    vae = make(**VARIANTS[name])
    colour = images(2, 3, 1, 1)
    mean = vae.encode(colour.expand(2, 3, 16, 16)).mean
    torch.testing.assert_close(mean[:, :3], colour.expand(2, 3, 2, 2))
    torch.testing.assert_close(mean[:, 3:], torch.zeros_like(mean[:, 3:]))
    x = images(2, 3, 16, 16)
    torch.testing.assert_close(vae.encode(x).mean[:, :3], F.avg_pool2d(x, 8))
    assert (vae.encode(x).mean[:, 3:].abs().amax((0, 2, 3)) > 0).all()
    assert vae.encode(x).std.max() < 1e-6


def test_dwt2_holds_all_but_the_finest_detail():
    """With 48 channels a 16x16 image without first-level detail can be recovered: the map is orthogonal."""
    vae = make(**VARIANTS["dwt2"])
    coarse = torch.eye(48).reshape(48, 3, 4, 4)
    matrix = vae.encode(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)).mean.flatten(1)
    gram = matrix @ matrix.T
    assert torch.linalg.matrix_rank(matrix) == 48
    assert (gram - torch.diag(gram.diag())).abs().max() > 0  # levels are scaled apart, by 4 and by 8


def test_vit_refuses_a_size_that_it_was_not_built_for():
    vae = make(**VARIANTS["vit"])
    with pytest.raises(ValueError, match=r"built for latents of 4x6 \(vit_grid\), and the image gives 4x4"):
        vae.encode(images(1, 3, 32, 32))


@pytest.mark.parametrize("variant", ["smc", "convolutional"])
def test_a_compiled_model_computes_the_same_until_its_weights_change(variant):
    vae = make(**VARIANTS[variant]).double()
    for name, parameter in vae.named_parameters():
        if name.endswith(("scale", "gain", "bias")):
            nn.init.normal_(parameter, 1.0, 0.3)
    x = images(2, 3, 32, 32).double()
    names = set(vae.state_dict())
    with torch.inference_mode():
        expected = vae(x)[0]
        assert vae.compile() is vae
        torch.testing.assert_close(vae(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert set(vae.state_dict()) == names
    assert vae.layers is not vae
    assert vae.train().layers is vae
    torch.testing.assert_close(vae(x)[0], expected, rtol=1e-12, atol=1e-12)
    vae.compile().load_state_dict({name: 0.5 * weight for name, weight in vae.state_dict().items()})
    assert not torch.allclose(vae(x)[0], expected)


def test_convolutional_model_is_shifted_with_its_input():
    """Self-modulated everywhere and without attention, only what is near the border can tell where it is."""
    vae = make(**VARIANTS["convolutional"]).double()
    x = images(1, 3, 32, 400).double()
    with torch.inference_mode():
        whole, part = vae.encode(x).mean, vae.encode(x[..., 80:]).mean
        torch.testing.assert_close(whole[..., 30:], part[..., 20:], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(whole[..., 10:20], part[..., :10])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\): expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 5, 32, 32), r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 0, 32), r"expected \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 32, 32), r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"dtype torch\.uint8 and values from 0 to 0: expected"),
        (torch.full((1, 3, 32, 32), float("nan")), "not finite"),
        (torch.full((1, 3, 32, 32), float("inf")), "not finite"),
        (torch.tensor([0.0, 255]).expand(1, 3, 32, 2), r"from 0 to 255: .* pass x / 127\.5 - 1"),
    ],
)
def test_bad_images_are_refused(x, message):
    vae = make()
    for call in (vae.encode, vae):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_bad_latents_and_sizes_are_refused():
    vae = make()
    with pytest.raises(ValueError, match=r"latent has shape \(1, 3, 4, 4\): expected \(B, 4, H', W'\)"):
        vae.decode(torch.zeros(1, 3, 4, 4))
    for size in [(33, 32), (24, 32), (32,), (1, 32, 32)]:
        with pytest.raises(ValueError, match=r"does not fit this latent: it decodes to \(32, 32\)"):
            vae.decode(torch.zeros(1, 4, 4, 4), size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (0, 1)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"levels": (3, 2)}, "ascending"),
        ({"encoder": "dwt"}, "set latent_channels to 12"),
        ({"encoder": "dwt2", "latent_channels": 12}, "set latent_channels to 48"),
        ({"decoder_multipliers": (1, 2)}, "decoder_multipliers"),
        ({"channels": 3}, "channels"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LiteVAEConfig(**fields)
    with pytest.raises(ValueError, match="preset 'XL' does not exist: expected one of S, B"):
        LiteVAEConfig.preset("XL")


def test_half_precision_works():
    vae = make().to(torch.bfloat16)
    with torch.inference_mode():
        y, posterior = vae(images(1, 3, 32, 32).bfloat16())
    assert y.dtype == posterior.mean.dtype == torch.bfloat16
    assert y.isfinite().all()
