"""Weights beside codecs, on clips whose answer is known."""

import csv
import math

import numpy as np
import pytest
import torch

from leanvae.bench.measure_weights import h264, jpeg, main, measure_clip, psnr_at, read_listed_clips
from leanvae.config import LeanVAEConfig
from leanvae.media.errors import MediaError
from leanvae.model import LeanVAE
from litevae.config import LiteVAEConfig
from litevae.errors import InvalidInput
from litevae.model import LiteVAE


@pytest.fixture
def frames():
    """Four frames of a smooth picture that moves to the right."""
    column = np.linspace(0, 4 * np.pi, 64)
    moving = np.stack([np.sin(column[None] + column[:, None] / 2 + shift) for shift in range(4)])
    return (127 + 100 * np.stack([moving, -moving, moving * 0.5], axis=-1)).astype(np.uint8)


def as_clip(frames):
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255


@pytest.mark.parametrize(("codec", "worst", "best"), [(jpeg, 5, 95), (h264, 0, 50)])
def test_codecs_spend_more_bytes_on_better_pictures(codec, worst, best, frames):
    def distance(decoded):
        return np.square(decoded.astype(float) - frames).mean()

    (small, poor), (large, good) = codec(frames, worst), codec(frames, best)
    assert small < large
    assert distance(good) < 2 < distance(poor)
    assert poor.shape == frames.shape


def test_the_best_quality_within_a_size_is_taken(frames):
    sizes = {quality: jpeg(frames, quality)[0] for quality in (20, 60, 96)}
    figures = [psnr_at(size, as_clip(frames), jpeg) for size in (sizes[20], sizes[60], 1e9)]
    assert figures == sorted(figures)
    best = np.square(jpeg(frames, 96)[1].astype(float) - frames).mean(axis=(1, 2, 3))
    assert figures[2] == pytest.approx(np.mean(10 * np.log10(255**2 / best)), abs=1e-3)


def test_rounded_latents_approach_exact_ones():
    torch.manual_seed(0)
    vae = LeanVAE(LeanVAEConfig(low_channels=8, high_channels=16, num_stream_layers=1, num_fusion_layers=1)).eval()
    clip = torch.rand(1, 3, 5, 256, 256)
    exact, coarse, fine = (measure_clip(vae, clip, bits)[0] for bits in (None, 2, 12))
    assert math.isclose(exact, fine, abs_tol=1e-2)
    assert abs(coarse - exact) > abs(fine - exact)


def test_lists_name_files_and_first_frames(tmp_path, write_clip):
    write_clip(tmp_path / "clip.mp4", num_frames=20, height=288, width=320)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "first_frame"), ("clip.mp4", 2), ("clip.mp4", 4)])
    clips = read_listed_clips(tmp_path / "list.csv", tmp_path)
    label, clip = next(clips)
    assert label == "clip.mp4@2"
    assert clip.shape == (1, 3, 17, 256, 256)
    with pytest.raises(MediaError, match=r"clip\.mp4.*21 frames needed"):
        next(clips)


def test_checkpoints_of_image_models_are_refused(tmp_path):
    LiteVAE(LiteVAEConfig.preset("S")).save_pretrained(tmp_path / "lite")
    options = ["--config", "configs/demo_cpu.yaml", "--set", "training.start_samples=1"]
    with pytest.raises(InvalidInput, match="video model"):
        main(["none.csv", *options, "--checkpoint", str(tmp_path / "lite")])
