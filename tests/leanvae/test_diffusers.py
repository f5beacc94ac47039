"""The diffusers model: it passes diffusers' own tests of autoencoders, and computes the same as ours."""

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig

diffusers = pytest.importorskip("leanvae.diffusers")
AutoencoderKLLeanVAE = diffusers.AutoencoderKLLeanVAE

SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
STATISTICS = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoencoderKLLeanVAE(**SMALL, **STATISTICS).eval()


@pytest.fixture
def clips():
    return torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_computes_what_leanvae_does(clips):
    torch.manual_seed(0)
    config = LeanVAEConfig(**SMALL, latent_mean=(0.1, 0.2, 0.3, 0.4), latent_std=(1.0, 2.0, 3.0, 4.0))
    vae = LeanVAE(config).eval()
    model = AutoencoderKLLeanVAE.from_leanvae(vae)
    assert model.vae.config == config
    assert model.config.latents_mean == (0.1, 0.2, 0.3, 0.4)
    assert model.config.latents_std == (1.0, 2.0, 3.0, 4.0)
    with torch.no_grad():
        distribution, posterior = model.encode(clips).latent_dist, vae.encode(clips)
        assert torch.equal(distribution.mode(), posterior.mode())
        torch.testing.assert_close(distribution.std, posterior.std)
        assert torch.equal(model.decode(posterior.mode()).sample, vae.decode(posterior.mode()))


@pytest.mark.parametrize("size", [(9, 32, 48), (6, 30, 45), (1, 32, 32)])
def test_forward_keeps_the_shape(model, size):
    x = torch.rand(1, 3, *size) * 2 - 1
    with torch.no_grad():
        outputs = model(x), model(x, return_dict=False)
        sampled = [model(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample for _ in range(2)]
    assert outputs[0].sample.shape == x.shape
    assert torch.equal(outputs[0].sample, outputs[1][0])
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], outputs[0].sample)


@pytest.mark.parametrize("safe", [True, False])
def test_saved_models_come_back(model, clips, tmp_path, safe):
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = AutoencoderKLLeanVAE.from_pretrained(tmp_path)
    assert not loaded.training
    assert dict(loaded.config)["latents_mean"] == STATISTICS["latents_mean"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(clips).sample, model(clips).sample)


def test_half_precision_is_loaded_on_request(model, clips, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    loaded = AutoencoderKLLeanVAE.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        sample = loaded(clips.bfloat16()).sample
        torch.testing.assert_close(sample.float(), model(clips).sample, rtol=0.1, atol=0.1)


def test_configurations_make_the_same_architecture(model):
    again = AutoencoderKLLeanVAE.from_config(model.config)
    assert again.config == model.config
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (again, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("with_gradient", [False, True])
def test_tiles_and_slices_change_nothing(model, clips, with_gradient):
    with torch.set_grad_enabled(with_gradient):
        plain = model(clips).sample
        model.enable_tiling(16, 16, 4)
        torch.testing.assert_close(model(clips).sample, plain, rtol=1e-4, atol=1e-5)
        model.enable_slicing()
        torch.testing.assert_close(model(clips).sample, plain, rtol=1e-4, atol=1e-5)
        model.disable_tiling()
        torch.testing.assert_close(model(clips).sample, plain, rtol=1e-4, atol=1e-5)
        model.disable_slicing()
        assert torch.equal(model(clips).sample, plain)


def test_it_trains(model, clips):
    model.train()
    loss = torch.nn.functional.mse_loss(model(clips).sample, clips)
    loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "logvar" not in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_outputs_are_the_same_every_time(model, clips):
    with torch.no_grad():
        assert torch.equal(model(clips).sample, model(clips).sample)
