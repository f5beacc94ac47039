"""The diagonal Gaussian posterior against torch.distributions and its own properties."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from litevae.posterior import DiagonalGaussian


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parity
def test_kl_agrees_with_torch_distributions(parameters):
    mean, logvar = parameters
    expected = kl_divergence(Normal(mean, torch.exp(logvar / 2)), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected, rtol=1e-12, atol=0)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere(parameters):
    zeros = torch.zeros(2, 4, 3, 3)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0, 0]
    assert (DiagonalGaussian(*parameters).kl() > 0).all()


def test_kl_is_computed_in_float32_for_bfloat16(parameters):
    mean, logvar = (p.bfloat16() for p in parameters)
    kl = DiagonalGaussian(mean, logvar).kl()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, DiagonalGaussian(mean.double(), logvar.double()).kl().float())


def test_logvar_is_clamped():
    logvar = torch.tensor([[-1000.0, -30.0, 3.0, 20.0, 1000.0]])
    posterior = DiagonalGaussian(torch.zeros(1, 5), logvar)
    assert posterior.logvar.tolist() == [[-30, -30, 3, 20, 20]]
    assert torch.isfinite(posterior.kl()).all()
    assert torch.isfinite(posterior.sample()).all()


def test_mode_is_the_mean_and_size_travels_along(parameters):
    posterior = DiagonalGaussian(*parameters, size=(5, 33, 47))
    assert posterior.mode() is posterior.mean
    assert posterior.size == (5, 33, 47)


def test_sample_with_is_mean_plus_std_times_noise(parameters):
    mean, logvar = parameters
    noise = torch.randn_like(mean)
    sample = DiagonalGaussian(mean, logvar).sample_with(noise)
    torch.testing.assert_close(sample, mean + logvar.exp().sqrt() * noise)


def test_sample_has_the_statistics_of_the_posterior():
    mean, logvar = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.0], [-2.0]])
    posterior = DiagonalGaussian(mean.expand(2, 20000), logvar.expand(2, 20000))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.mean(1, keepdim=True), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(sample.std(1, keepdim=True), (logvar / 2).exp(), atol=0.03, rtol=0)


def test_sample_repeats_with_its_generator_in_any_precision(parameters):
    posteriors = [DiagonalGaussian(*(p.to(dtype) for p in parameters)) for dtype in (torch.float32, torch.bfloat16)]
    single, half = (p.sample(torch.Generator().manual_seed(7)) for p in posteriors)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), single, atol=0.1, rtol=0)
    again = posteriors[0].sample(torch.Generator().manual_seed(7))
    assert torch.equal(single, again)
    assert not torch.equal(single, posteriors[0].sample(torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_sample_lies_on_the_device_of_the_posterior(parameters, generator):
    # The meta device stands for any other than the generator's.
    posterior = DiagonalGaussian(*(p.to("meta") for p in parameters))
    assert posterior.sample(generator).device.type == "meta"


def test_gradients_reach_both_parameters(parameters):
    mean, logvar = (p[:, :1, 0, :2, 0].clone().requires_grad_() for p in parameters)
    noise = torch.randn_like(mean)
    assert torch.autograd.gradcheck(
        lambda m, v: (DiagonalGaussian(m, v).sample_with(noise), DiagonalGaussian(m, v).kl()), (mean, logvar)
    )


def test_shapes_that_differ_are_errors(parameters):
    mean, logvar = parameters
    with pytest.raises(ValueError, match=r"logvar has shape \(3, 4, 2, 5, 5\)"):
        DiagonalGaussian(mean, logvar[..., 1:])
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 2, 5, 6\)"):
        DiagonalGaussian(mean, logvar).sample_with(torch.zeros(1, 4, 2, 5, 6))
