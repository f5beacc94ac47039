"""Fixtures of the latent store's tests: a small model, clips of which some cannot be used, and a store of them."""

import shutil

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.latents.clips import ClipRule
from leanvae.latents.encode import encode_clips
from leanvae.latents.encoder import EncodeJob

RULE = ClipRule(frames=5, every=4, resolutions=("32x32",))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a small video model."""
    torch.manual_seed(0)
    config = LeanVAEConfig(low_channels=8, high_channels=16, num_stream_layers=1, num_fusion_layers=1, ista_layers=1)
    folder = tmp_path_factory.mktemp("model")
    LeanVAE(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_clips(write_clip):
    """A function that fills a folder with four clips, one of them broken, one too short for five frames."""

    def make(folder):
        folder.mkdir(exist_ok=True)
        write_clip(folder / "a.mp4", num_frames=14, seed=1)
        write_clip(folder / "b.mp4", num_frames=9, seed=2, height=64, width=48)
        write_clip(folder / "short.mp4", num_frames=3)
        (folder / "broken.mp4").write_text("no video")
        return folder

    return make


@pytest.fixture
def clips(make_clips, tmp_path):
    """Such a folder, only for this test."""
    return make_clips(tmp_path / "clips")


@pytest.fixture(scope="session")
def make_job(checkpoint):
    """A function that returns settings to encode clips of five frames."""

    def make(rule=RULE, **fields):
        return EncodeJob(**{"checkpoint": checkpoint, "rule": rule, "num_workers": 1, **fields})

    return make


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A folder for the clips and the store that the tests copy."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def stored_clips(made_once, make_clips):
    """The clips of `store`, which tests do not change."""
    folder = made_once / "clips"
    return folder if folder.exists() else make_clips(folder)


@pytest.fixture
def store(made_once, stored_clips, make_job, tmp_path):
    """A store of five clips with mirror images, only for this test."""
    if not (made_once / "store").exists():
        encode_clips([str(stored_clips)], made_once / "store", make_job(flips=True))
    return shutil.copytree(made_once / "store", tmp_path / "store")
