"""A dry run describes the run: its schedule is the loader's, its memory what a pass really saves."""

import pytest
import torch

from leanvae.config import ConfigError
from leanvae.data.buckets import Shape
from leanvae.model import LeanVAE
from leanvae.training.build import find_items, make_schedule
from leanvae.training.config import TrainVideoConfig
from leanvae.training.dry_run import activation_bytes, run_summary, state_bytes

MODEL = {"low_channels": 8, "high_channels": 24, "num_stream_layers": 1, "num_fusion_layers": 1}


@pytest.fixture
def config(tmp_path, write_clip):
    (tmp_path / "clips").mkdir()
    for number in range(4):
        write_clip(tmp_path / "clips" / f"{number}.mp4", num_frames=12, seed=number)
    data = {"sources": [str(tmp_path / "clips"), {"path": "builtin", "kind": "images"}], "held_out": 0.0}
    data |= {"buckets": ["9x32x48", "5x48x32", "1x64x64"], "cache_dir": str(tmp_path / "cache"), "num_workers": 1}
    return TrainVideoConfig.model_validate(
        {
            "model": MODEL,
            "data": data,
            "training": {"tokens_per_batch": 256, "batch_multiple": 2, "max_steps": 30},
            "gan": {"discriminator": {"base_channels": 8, "num_layers": 2}},
            "deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        }
    )


def test_it_shows_the_configuration_the_schedule_and_the_memory(config):
    text = run_summary(config, 2)
    assert "tokens_per_batch: 256" in text
    assert "bf16:\n    enabled: true" in text
    schedule = make_schedule(config, find_items(config.data)[0])
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(lines) == 20
    for step, line in enumerate(lines):
        draw = schedule.at(step)
        assert f" {draw.bucket} " in line
        assert f"batch {draw.batch_size:>4} = 2 ranks x 1 passes x {draw.batch_size // 2}" in line
    assert "phase 0, 30 steps from step 1: 9x32x48 " in text
    assert "discriminator: 0.0" in text
    with pytest.raises(ConfigError, match="3 ranks cannot share"):
        run_summary(config, 3)


def test_states_are_sharded_as_zero_says():
    """ZeRO, Figure 1: 16 bytes per parameter in mixed precision, of which stages 1, 2 and 3 shard 12, 14 and all."""
    for stage, expected in enumerate((16.0, 4 + 12 / 64, 2 + 14 / 64, 16 / 64)):
        assert sum(state_bytes(1000, stage, True, 64).values()) == pytest.approx(1000 * expected)
    assert state_bytes(10, 0, False, 4) == {"weights": 40, "gradients": 40, "optimizer": 80}


@pytest.mark.parametrize("bucket", [Shape(5, 32, 48), Shape(1, 64, 64)])
def test_activations_are_those_that_a_pass_keeps(config, bucket):
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vae = LeanVAE(config.model)
    frames = () if bucket.is_image else (bucket.frames,)
    pixels = torch.rand(2, 3, *frames, *bucket.resolution)
    noise = torch.randn(2, *vae.latent_shape(pixels.shape[2:]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = vae(pixels, noise)[0]
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.requires_grad
    with torch.device("meta"):
        planned = activation_bytes(LeanVAE(config.model), None, bucket, 2, False)
    assert planned == pytest.approx(real, rel=0.02)
