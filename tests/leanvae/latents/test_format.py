"""The store's format: one that an earlier version wrote is read, gives the same items, is continued and verified.

`store_before/` holds that store and its clips, a.mp4, b.mp4, c.mp4 and broken.mp4, of which c.mp4 is not encoded yet.
"""

import shutil
from pathlib import Path

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.latents import LatentClips, ShapeBatches
from leanvae.latents.clips import ClipRule
from leanvae.latents.encode import encode_clips
from leanvae.latents.verify import store_info, verify_store

BEFORE = Path(__file__).with_name("store_before")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """The folder with that store and the model it was made with; the clips' addresses are relative to it."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    config = LeanVAEConfig(low_channels=8, high_channels=16, num_stream_layers=1, num_fusion_layers=1, ista_layers=1)
    vae = LeanVAE(config)
    with torch.no_grad():
        for number, value in enumerate(vae.state_dict().values()):
            steps = torch.arange(value.numel()) * 37 + number * 11
            value.copy_((((steps % 101) - 50) / 512).view_as(value))
    vae.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_items_are_the_same(before):
    clips = LatentClips(before / "store", flip=True, normalize=True, seed=3)
    items = [clips[epoch, index] for epoch in (0, 2) for index in range(4)]
    sums = [item["latent"].double().sum().item() for item in items]
    assert sums == pytest.approx([7.379, 4.453, 0.403, 2.872, 10.085, 1.623, -6.095, -0.459], abs=2e-3)
    assert [item["flipped"] for item in items] == [False, True, False, False, True, True, False, False]
    assert list(ShapeBatches(clips, 2)) == [[(0, 2), (0, 1)], [(0, 0), (0, 3)]]
    starts = [[item["source"][6] + item["key"][-1] for item in clips] for _ in range(2)]
    assert starts == [["a0", "b4", "b0", "a4"], ["b4", "b0", "a0", "a4"]]


def test_store_is_verified_and_continued(before, make_job):
    report = verify_store("store", "model")
    assert (report["problems"], report["clips"], len(report["samples"])) == ([], 4, 4)
    shard = Path("store/shards/00000-000000.tar").read_bytes()
    job = make_job(ClipRule(frames=5, every=4, resolutions=("16x16",)), checkpoint="model", flips=True)
    inputs = [f"zip://{name}.mp4::clips.zip" for name in ("a", "broken", "b", "c")]
    summary = encode_clips(inputs, "store", job)
    assert (summary["clips"], summary["run"]["clips"], len(summary["skipped"])) == (5, 1, 1)
    assert Path("store/shards/00000-000000.tar").read_bytes() == shard
    assert verify_store("store", "model")["problems"] == []
    assert store_info("store")["clips"] == 5
