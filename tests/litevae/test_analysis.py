"""MMD against a plain double loop, imbalance of constructed maps, and latents as colours."""

import math

import pytest
import torch

from litevae import analysis
from litevae.analysis import feature_imbalance, latents_as_rgb, mmd


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kernel_mean(x: torch.Tensor, y: torch.Tensor, sigma: float, same: bool) -> float:
    values = [
        math.exp(-sum((float(a) - float(b)) ** 2 for a, b in zip(x[i], y[j], strict=True)) / (2 * sigma**2))
        for i in range(len(x))
        for j in range(len(y))
        if not (same and i == j)
    ]
    return sum(values) / len(values)


@pytest.mark.parity
@pytest.mark.parametrize("block", [1, 4, 512])
def test_mmd_agrees_with_a_double_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(analysis, "_MMD_BLOCK", block)
    x, y = _normal(7, 5), 0.5 + 2 * _normal(10, 5, seed=1)
    sigmas = [0.5, 1.0, 3.0]
    expected = [
        _kernel_mean(x, x, s, True) + _kernel_mean(y, y, s, True) - 2 * _kernel_mean(x, y, s, False) for s in sigmas
    ]
    several = mmd(x, y, sigmas)
    assert several.dtype == torch.float64
    assert several.tolist() == pytest.approx(expected, abs=1e-12)
    assert mmd(x, y, 1.0).shape == ()
    assert mmd(x, y, 1.0).item() == pytest.approx(expected[1], abs=1e-12)


def test_mmd_of_shifted_gaussians_is_that_of_the_closed_form() -> None:
    x, y = _normal(300, 64), _normal(300, 64, seed=1)
    shifts = (0.0, 0.1, 0.3, 1.0)
    values = [mmd(x, y + shift, 8.0).item() for shift in shifts]
    # Of standard normals in D dimensions, one of them moved by m: 2 (1 + 2/s^2)^(-D/2) (1 - exp(-m^2 / (2 s^2 + 4))).
    expected = [2 * (1 + 2 / 64) ** -32 * (1 - math.exp(-64 * shift**2 / 132)) for shift in shifts]
    assert values == pytest.approx(expected, abs=4e-3)
    assert values == sorted(values)


def test_mmd_is_unbiased() -> None:
    values = [mmd(_normal(10, 4, seed=2 * i), _normal(10, 4, seed=2 * i + 1), 2.0).item() for i in range(200)]
    assert abs(sum(values) / len(values)) < 5e-3  # the biased estimate's mean is about 0.1
    assert min(values) < 0


def test_mmd_stays_exact_for_samples_far_from_the_origin() -> None:
    x, y = _normal(6, 4).double(), _normal(6, 4, seed=1).double()
    assert mmd(x + 1e4, y + 1e4, 1.0).item() == pytest.approx(mmd(x, y, 1.0).item(), abs=1e-6)


def test_mmd_refuses_wrong_samples_and_bandwidths() -> None:
    x = _normal(4, 3)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\)"):
        mmd(x[:1], x, 1.0)
    with pytest.raises(ValueError, match=r"y has shape \(4, 2\)"):
        mmd(x, x[:, :2], 1.0)
    with pytest.raises(ValueError, match="positive bandwidths"):
        mmd(x, x, [1.0, 0.0])
    with pytest.raises(ValueError, match="y holds values that are not finite"):
        mmd(x, x / 0, 1.0)


def test_imbalance_of_a_flat_map_is_one() -> None:
    features = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 20, 30)
    imbalance = feature_imbalance(features)
    assert imbalance.magnitude.shape == (1, 20, 30)
    assert torch.allclose(imbalance.magnitude, torch.tensor(12.5).sqrt())
    assert imbalance.peak_ratio.tolist() == pytest.approx([1.0])
    assert imbalance.top_share.tolist() == pytest.approx([0.01])


def test_imbalance_of_one_hot_position_is_its_strength() -> None:
    features = torch.ones(2, 3, 10, 20)
    features[1, :, 4, 7] = 50.0
    imbalance = feature_imbalance(features)
    assert imbalance.peak_ratio.tolist() == pytest.approx([1.0, 50.0])
    assert imbalance.top_share.tolist() == pytest.approx([0.01, 2501 / (2500 + 199)])
    assert imbalance.magnitude[1, 4, 7].item() == pytest.approx(50.0)


def test_imbalance_does_not_change_with_scale() -> None:
    features = _normal(2, 4, 32, 32)
    small, large = feature_imbalance(features), feature_imbalance(1000 * features)
    assert torch.allclose(small.peak_ratio, large.peak_ratio)
    assert torch.allclose(small.top_share, large.top_share)


def test_imbalance_of_empty_and_sparse_maps() -> None:
    features = torch.zeros(2, 1, 10, 10)
    features[1, 0, 0, 0] = 1.0
    imbalance = feature_imbalance(features)
    assert imbalance.peak_ratio.tolist() == [1.0, math.inf]
    assert imbalance.top_share.tolist() == pytest.approx([0.01, 1.0])
    assert feature_imbalance(features.bfloat16()).magnitude.dtype == torch.float32


def test_latents_as_rgb_shows_three_stretched_channels() -> None:
    latent = torch.arange(101.0).reshape(1, 1, 101, 1) * torch.tensor([1.0, -10.0, 0.0, 7.0]).reshape(1, 4, 1, 1)
    colours = latents_as_rgb(latent)
    assert colours.shape == (1, 3, 101, 1)
    assert colours[0, 0, :3, 0].tolist() == pytest.approx([0.0, 0.0, 1 / 98])
    assert colours[0, 0, -2:, 0].tolist() == [1.0, 1.0]
    assert torch.allclose(colours[0, 1], 1 - colours[0, 0])
    assert (colours[0, 2] == 0.5).all()


def test_latents_as_rgb_stretches_each_image_alone() -> None:
    latent = _normal(2, 4, 8, 8)
    both = latents_as_rgb(torch.cat((latent[:1], 100 * latent[1:])))
    assert torch.allclose(both, latents_as_rgb(latent), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_latents_as_rgb_repeats_the_last_of_few_channels(channels: int) -> None:
    colours = latents_as_rgb(_normal(1, channels, 4, 4))
    assert colours.shape == (1, 3, 4, 4)
    assert torch.equal(colours[:, 2], colours[:, channels - 1])


def test_maps_refuse_other_shapes_and_values() -> None:
    for function in (feature_imbalance, latents_as_rgb):
        with pytest.raises(ValueError, match=r"\(4, 4\)"):
            function(torch.ones(4, 4))
        with pytest.raises(ValueError, match="not finite"):
            function(torch.full((1, 3, 4, 4), math.nan))
