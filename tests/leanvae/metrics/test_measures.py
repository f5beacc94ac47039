"""Artefact scores, MS-SSIM, latent statistics and the Fréchet distance, against independent arithmetic."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from leanvae.metrics import frames as metrics
from leanvae.metrics.artefacts import ErrorSteps
from leanvae.metrics.clips import ClipFeatures, LatentStatistics, measure_clip, picture_row
from leanvae.metrics.frames import ms_ssim
from leanvae.metrics.frechet import distance_interval, frechet_distance, mean_interval
from leanvae.metrics.networks import FeatureNetworks


def _clip(frames: int = 9, height: int = 40, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _steps(output: torch.Tensor, reference: torch.Tensor, period: int = 8, batch: int = 4) -> ErrorSteps:
    steps = ErrorSteps(*output.shape[2:], period)
    for a, b in zip(output.split(batch), reference.split(batch), strict=True):
        steps.update(a, b)
    return steps


def test_flicker_is_the_error_of_temporal_differences() -> None:
    x, y = _clip(seed=1).double(), _clip(seed=2).double()
    expected = np.abs(np.diff(y.numpy(), axis=0) - np.diff(x.numpy(), axis=0)).mean()
    for batch in (1, 4, 9):
        assert _steps(y, x, batch=batch).flicker() == pytest.approx(expected, rel=1e-12)


def test_flicker_does_not_see_an_error_that_stays() -> None:
    x = _clip()
    still = 0.1 * torch.rand(1, 3, 40, 48)
    assert _steps(x + still, x).flicker() == pytest.approx(0, abs=1e-7)
    assert _steps(x[:1] + still, x[:1]).flicker() is None
    flashing = torch.tensor([0.0, 0.2] * 4 + [0.0]).reshape(9, 1, 1, 1)
    assert _steps(x + flashing, x).flicker() == pytest.approx(0.2, abs=1e-6)


def test_block_score_sees_patches_of_its_own_grid_alone() -> None:
    x, noise = _clip(), torch.randn(9, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    patches = torch.randn(9, 3, 5, 6, generator=torch.Generator().manual_seed(4))
    blocks = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
    unmoved = _steps(x + 0.05 * blocks + 0.02 * noise, x).block_score()
    moved = _steps(x + 0.05 * blocks.roll((3, 3), (2, 3)) + 0.02 * noise, x).block_score()
    assert unmoved is not None
    assert moved is not None
    assert unmoved > 2
    assert moved < 1
    assert _steps(x + 0.05 * noise, x).block_score() == pytest.approx(1, abs=0.03)
    assert _steps(x, x).block_score() == 1.0
    assert _steps(x[..., :8, :8], x[..., :8, :8]).block_score() is None


def test_block_score_does_not_see_edges_of_the_content() -> None:
    x = (torch.arange(48) // 8 % 2).float().expand(4, 3, 40, 48)
    noise = 0.05 * torch.randn(4, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    assert _steps(x + noise, x).block_score() == pytest.approx(1, abs=0.05)


def test_seams_are_found_where_parts_meet() -> None:
    x, noise = _clip(), 0.02 * torch.randn(9, 3, 40, 48, generator=torch.Generator().manual_seed(3))
    y = x + noise
    y[:, :, 16:] += 0.3
    y[5:] += 0.3
    steps = _steps(y, x)
    tile, chunk = steps.tile_seam({16, 32}, {24}), steps.chunk_seam({5})
    assert tile is not None
    assert chunk is not None
    assert tile > 2
    assert chunk > 3
    for score in (steps.tile_seam({12, 24, 36}, {20, 40}), steps.chunk_seam({4, 8})):
        assert score is not None
        assert score < 1.05
    assert steps.tile_seam(set(), set()) is None
    assert steps.chunk_seam(set()) is None


def test_block_window_is_where_blocks_stand_out() -> None:
    x = torch.full((6, 3, 192, 256), 0.5)
    y = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    patches = 0.2 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    y[4, :, 96:160, 160:224] += patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    blocks = _steps(y, x).blocks
    assert (blocks.frame, blocks.top, blocks.left) == (4, 96, 160)
    assert blocks.output is not None
    assert torch.equal(blocks.output, y[4, :, 96:160, 160:224])


def _ms_ssim_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al., 2003, of one image `(C, H, W)`, over the pixels whose window lies inside."""

    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(image, (0, 1.5, 1.5), truncate=3.5, mode="mirror")

    result = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            x, y = (image.reshape(3, image.shape[1] // 2, 2, image.shape[2] // 2, 2).mean((2, 4)) for image in (x, y))
        mean_x, mean_y = blur(x), blur(y)
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        contrast = (2 * (blur(x * y) - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2)
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        term = luminance * contrast if scale == 4 else contrast
        result *= np.mean(term[:, 5:-5, 5:-5]) ** weight
    return result


@pytest.mark.parity
@pytest.mark.parametrize("strip", [2**18, 176 * 23])
def test_ms_ssim_agrees_with_its_definition(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    monkeypatch.setattr(metrics, "_SSIM_STRIP", strip)
    y = torch.nn.functional.avg_pool2d(_clip(2, 192, 176).double(), 7, 1, 3)
    x = (y + 0.1 * (_clip(2, 192, 176, seed=1).double() - 0.5)).clamp(0, 1)
    expected = [_ms_ssim_by_scipy(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert ms_ssim(x, y).tolist() == pytest.approx(expected, abs=1e-4)
    assert multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none").tolist() == (
        pytest.approx(expected, abs=5e-4)
    )
    assert ms_ssim(y, y).tolist() == pytest.approx([1, 1])
    assert ms_ssim(x[..., :160], y[..., :160]).isnan().all()


@pytest.mark.parity
@pytest.mark.parametrize("samples", [(300, 250), (12, 9), (9, 300)])
def test_frechet_distance_agrees_with_the_root_of_a_matrix(samples: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(20, 20, generator=generator).double()
    x, y = (torch.randn(count, 20, generator=generator).double() for count in samples)
    x, y = x @ mixing + 0.3, y
    covariances = [np.cov(sample.numpy(), rowvar=False) for sample in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [5, 500])
def test_frechet_distance_of_a_sample_to_itself_is_zero(count: int) -> None:
    x = 100 * torch.rand(count, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 1) == pytest.approx(64, rel=1e-5)


def test_frechet_distance_is_of_all_features_together() -> None:
    """An average over batches would differ, because their covariances are narrower."""
    x, y = (torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts = [frechet_distance(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)]
    assert frechet_distance(x, y) < 0.3 * sum(parts) / len(parts)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="y has shape"):
        frechet_distance(torch.rand(4, 3), torch.rand(1, 3))


def test_intervals_cover_what_they_should() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = generator.normal(3.0, 1.0, 40)
        low, high = mean_interval(values.tolist(), [1.0] * 40) or (math.nan, math.nan)
        covered += low <= 3.0 <= high
    assert 180 <= covered <= 198
    assert mean_interval([1.0], [1.0]) is None
    low, high = mean_interval([0.0, 1.0], [1.0, 3.0]) or (math.nan, math.nan)
    assert (low, high) == (0.0, 1.0)


def test_distance_interval_holds_the_distance_and_is_the_same_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [(torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator) + 1) for _ in range(12)]
    interval = distance_interval(clips)
    assert interval is not None
    assert interval == distance_interval(clips)
    value = frechet_distance(torch.cat([a for a, _ in clips]), torch.cat([b for _, b in clips]))
    assert interval[0] < value < interval[1]
    assert distance_interval(clips[:1]) is None


def test_latent_statistics_are_those_of_all_latents() -> None:
    latents = [torch.randn(3, t, 5, 6, generator=torch.Generator().manual_seed(t)) for t in (1, 4, 2)]
    statistics = LatentStatistics("a clip")
    for latent in latents:
        statistics.observe(latent)
    tensors = statistics.tensors()
    everything = torch.cat([latent.flatten(1) for latent in latents], dim=1).double()
    count = int(tensors["latent_count"])
    assert count == everything.shape[1]
    mean = tensors["latent_sums"][0] / count
    assert torch.allclose(mean, everything.mean(1))
    assert torch.allclose((tensors["latent_sums"][1] / count - mean**2).sqrt(), everything.std(1, correction=0))
    rows = {tuple(row) for row in everything.T.float().tolist()}
    assert all(tuple(row) in rows for row in tensors["latent_samples"].tolist())
    assert LatentStatistics("nothing").tensors() == {}


class _Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=tuple(range(2, x.ndim)))


def test_clip_features_are_of_each_frame_and_of_each_16_frames() -> None:
    frames = _clip(37)
    features = ClipFeatures(FeatureNetworks(None, _Means(), _Means(), []))
    for some in frames.split(5):
        features.update(some)
    tensors = features.tensors()
    assert torch.allclose(tensors["image"], frames.mean((2, 3)), atol=1e-6)
    windows = torch.stack([frames[:16], frames[16:32]]).mean((1, 3, 4))
    assert tensors["video"].shape == (2, 3)
    assert torch.allclose(tensors["video"], windows, atol=5e-3)  # a resize to 224 pixels stands between


def test_held_out_clips_get_the_same_measures_and_a_picture() -> None:
    clip = _clip(5, 48, 40).transpose(0, 1)
    noisy = (clip + 0.1).clamp(0, 1)
    row = measure_clip(noisy, clip, period=8)
    assert row["psnr"] == pytest.approx(np.mean(row["frame_psnr"]))
    assert row["ms_ssim"] is None
    assert measure_clip(clip[:, 0], clip[:, 0], period=8)["psnr"] is None
    picture = picture_row(noisy, clip)
    assert picture.shape == (48, 40 * 9, 3)
    assert np.array_equal(picture[:, :40], (255 * clip[:, 0]).round().byte().movedim(0, -1).numpy())
    assert picture_row(noisy[:, 0], clip[:, 0]).shape == (48, 120, 3)
    with pytest.raises(ValueError, match="of one shape"):
        measure_clip(clip, clip[:, :2], period=8)
