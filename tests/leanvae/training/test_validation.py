"""Held-out figures and reconstructions during training."""

import io
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from leanvae import LeanVAE
from leanvae.data.samples import Sample
from leanvae.media.item import Item
from leanvae.training.build import load_held_out_lpips
from leanvae.training.comparison import Comparison, animation, picture, write_comparisons
from leanvae.training.config import LossConfig, LossTerm, TrainVideoConfig
from leanvae.training.validation import METRICS, Validation, ValidationResults
from litevae.perceptual import PerceptualDistance

CPU = torch.device("cpu")
CONFIG = TrainVideoConfig.model_validate(
    {"model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1}}
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def samples():
    clip = Sample(Item("a/clip.mp4", "clip", start=2.0), noise(5, 32, 48, 3), np.arange(5) / 10.0)
    return [clip, Sample(Item("b/picture.png", "image"), noise(32, 48, 3))]


class MeanDistance(torch.nn.Module):
    """A substitute for LPIPS, whose weights are not available: mean absolute difference; counts its images."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, a, b):
        self.sizes.append(len(a))
        assert not (a.abs() > 1).any()
        return (a - b).abs().mean(dim=(1, 2, 3))


def test_figures_are_those_of_each_file():
    torch.manual_seed(0)
    vae = LeanVAE(CONFIG.model).eval()
    weights = {name: value.detach() for name, value in vae.named_parameters()}
    lpips = MeanDistance()
    results = Validation(CONFIG, samples(), lpips, CPU).run(weights)
    assert list(results.figures) == list(METRICS)
    names = ["a/clip.mp4 at 2 s", "b/picture.png"]
    for name, sample in zip(names, samples(), strict=True):
        x = torch.from_numpy(sample.frames).double().movedim(-1, 0)[None] / 255
        with torch.no_grad():
            y = (vae(2 * x.float() - 1)[0].double() / 2 + 0.5).clamp(0, 1)
        mean_square = (x - y).square().movedim(2, 1).flatten(2).mean(2) if x.ndim == 5 else (x - y).square().mean()
        assert results.figures["psnr"][name] == pytest.approx((-10 * mean_square.log10()).mean().item(), abs=1e-4)
        assert results.figures["lpips"][name] == pytest.approx(2 * (x - y).abs().mean().item(), abs=1e-5)
        assert 0 < results.figures["ssim"][name] < 1
    assert results.means["psnr"] == pytest.approx(np.mean(list(results.figures["psnr"].values())))
    assert max(lpips.sizes) <= 4
    assert [comparison.frames.shape for comparison in results.comparisons] == [(5, 32, 96, 3), (1, 32, 96, 3)]
    assert np.array_equal(results.comparisons[0].frames[:, :, :48], samples()[0].frames)
    assert results.comparisons[0].rate == pytest.approx(10.0)


def test_lpips_is_measured_where_its_weights_are(tmp_path, monkeypatch):
    from litevae.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from torchvision.models import vgg16

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_held_out_lpips(LossConfig(), {}, CPU) is None
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = vgg16(weights=None).features.state_dict(prefix="features.")
    torch.save(state, tmp_path / "hub/checkpoints/vgg16-397923af.pth")
    lpips = load_held_out_lpips(LossConfig(lpips=LossTerm(weight=0.0)), {}, CPU)
    assert isinstance(lpips, PerceptualDistance)
    assert load_held_out_lpips(LossConfig(), {"lpips": lpips}, CPU) is lpips
    assert load_held_out_lpips(LossConfig(perceptual="none"), {}, CPU) is None


def test_without_held_out_files_there_are_no_results():
    assert Validation(CONFIG, [], None, CPU).run({}) is None


def test_what_is_not_finite_has_no_figure():
    vae = LeanVAE(CONFIG.model)
    weights = {name: value.detach() * torch.nan for name, value in vae.named_parameters()}
    results = Validation(CONFIG, samples(), MeanDistance(), CPU).run(weights)
    assert results.means == dict.fromkeys(METRICS)
    assert [comparison.frames.shape for comparison in results.comparisons] == [(5, 32, 96, 3), (1, 32, 96, 3)]
    assert "NaN" not in json.dumps(results.figures)
    assert "nothing finite (2 files)" in str(results)


def test_means_pass_over_what_has_no_figure():
    results = ValidationResults({"psnr": {"a": 20.0, "b": None, "c": 30.0}}, [])
    assert results.means == {"psnr": 25.0}
    assert str(results) == "PSNR 25.00 dB (3 files)"


def comparisons():
    clip = Comparison("x/a clip.mp4 at 2 s", noise(5, 16, 64, 3), 10.0, noise(16, 288, 3))
    return [clip, Comparison("y/p.png", noise(1, 16, 32, 3), None, noise(16, 48, 3))]


def test_picture_has_a_row_a_file():
    clip, image = comparisons()
    rows = picture([clip, image])
    assert rows.shape == (32, 288, 3)
    assert np.array_equal(rows[:16], clip.row)
    assert np.array_equal(rows[16:, :48], image.row)
    assert not rows[16:, 48:].any()


def test_animation_plays_all_frames_at_their_rate():
    gradient = np.broadcast_to(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (32, 48, 3))
    frames = np.stack([np.roll(gradient, shift, axis=0) for shift in range(5)])
    gif = Image.open(io.BytesIO(animation(Comparison("a", frames, 10.0, frames[0]))))
    assert gif.n_frames == 5
    assert gif.info["loop"] == 0
    for index in range(5):
        gif.seek(index)
        assert gif.info["duration"] == 100
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[index]).mean() < 4


def test_files_hold_the_frames_and_old_ones_go(tmp_path):
    for step in (0, 5, 10, 15):
        files = write_comparisons(tmp_path, step, comparisons())
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "step_00000015/00_a_clip.mp4",
        "step_00000015/01_p.png",
    ]
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 10
    assert np.stack(frames).shape == (5, 16, 64, 3)
    assert np.array_equal(np.asarray(Image.open(files[1])), comparisons()[1].frames[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000010", "step_00000015"]
