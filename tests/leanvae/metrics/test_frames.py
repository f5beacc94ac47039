"""PSNR and SSIM against scikit-image, and their running means."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from leanvae.metrics import frames as metrics
from leanvae.metrics.frames import FrameMetrics, psnr, ssim


def _pair(*shape: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.nn.functional.avg_pool2d(torch.rand(*shape, generator=generator), 5, 1, 2)
    return (y + noise * torch.randn(*shape, generator=generator)).clamp(0, 1), y


@pytest.mark.parity
@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize(("height", "width"), [(11, 11), (33, 47)])
def test_metrics_agree_with_scikit_image(height: int, width: int, noise: float) -> None:
    x, y = _pair(3, 3, height, width, noise=noise)
    y[2, :, : height // 2] = x[2, :, : height // 2] = 1.0  # a flat, equal region, as in letterboxed clips
    for index, (a, b) in enumerate(zip(x.double().numpy(), y.double().numpy(), strict=True)):
        expected = structural_similarity(
            b, a, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(x, y)[index].item() == pytest.approx(expected, abs=1e-4)
        assert psnr(x, y)[index].item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0), abs=1e-4)


@pytest.mark.parametrize("strip", [1, 47 * 7, 47 * 23, 47 * 24])
def test_ssim_does_not_depend_on_the_strips(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    x, y = _pair(1, 3, 33, 47)
    expected = ssim(x, y)
    monkeypatch.setattr(metrics, "_SSIM_STRIP", strip)
    assert ssim(x, y).item() == pytest.approx(expected.item(), abs=1e-6)


def test_metrics_of_clips_are_those_of_their_frames_in_order() -> None:
    x, y = _pair(6, 3, 16, 16)
    clips = [frames.reshape(2, 3, 3, 16, 16).transpose(1, 2) for frames in (x, y)]
    assert torch.equal(psnr(*clips), psnr(x, y))
    assert torch.equal(ssim(*clips), ssim(x, y))


def test_metrics_take_bfloat16_in_float32() -> None:
    x, y = (frames.bfloat16() for frames in _pair(1, 3, 16, 16))
    assert psnr(x, y).dtype == torch.float32
    assert torch.equal(ssim(x, y), ssim(x.float(), y.float()))


def test_metrics_refuse_other_shapes() -> None:
    x, y = _pair(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(1, 3, 16, 16\)"):
        psnr(x, y[:1])
    with pytest.raises(ValueError, match="one shape"):
        ssim(x[0], y[0])


def test_frame_metrics_accumulates_the_mean_over_frames() -> None:
    x, y = _pair(7, 3, 16, 16)
    parts, whole = FrameMetrics(), FrameMetrics()
    whole.update(x, y)
    parts.update(x[:2], y[:2])
    parts.update(x[2:], y[2:])
    assert parts.num_frames == whole.num_frames == 7
    assert parts.psnr == pytest.approx(psnr(x, y).mean().item(), abs=1e-5)
    assert parts.psnr == pytest.approx(whole.psnr, abs=1e-9)
    assert parts.ssim == pytest.approx(whole.ssim, abs=1e-9)


def test_frame_metrics_are_null_where_not_finite() -> None:
    means = FrameMetrics()
    assert (means.psnr, means.ssim) == (None, None)
    _, y = _pair(1, 3, 16, 16)
    assert math.isinf(psnr(y, y).item())
    means.update(y, y)
    assert means.psnr is None
    assert means.ssim == pytest.approx(1.0)
    means.update(*_pair(1, 3, 8, 20))
    assert means.ssim is None


def test_psnr_of_a_known_error() -> None:
    y = torch.full((1, 3, 12, 12), 0.5)
    assert psnr(y + 0.1, y).item() == pytest.approx(20.0, abs=1e-4)
    assert np.isnan(ssim(y[..., :10], y[..., :10]).item())
