"""Saving and loading of weights, ours and published ones."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig, load_vae

PUBLISHED = Path(__file__).parent / "golden" / "official_small.ckpt"
SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1}


def published():
    return torch.load(PUBLISHED, weights_only=True)


@pytest.mark.parametrize("fields", [{}, {"decoder_norm": "smc"}, {"bottleneck": "linear", "streams": "joint"}])
def test_saved_model_loads_equal(tmp_path, fields):
    vae = LeanVAE(LeanVAEConfig(**SMALL, **fields))
    vae.save_pretrained(tmp_path / "model")
    loaded = load_vae(tmp_path / "model")
    assert loaded.config == vae.config
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)


def test_load_casts_to_the_asked_dtype(tmp_path):
    LeanVAE(LeanVAEConfig(**SMALL)).save_pretrained(tmp_path)
    assert {p.dtype for p in load_vae(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_training_checkpoint_of_the_published_code_loads(tmp_path):
    checkpoint = published()
    state = {f"autoencoder.{name}": value for name, value in checkpoint["state_dict"].items()}
    state["discriminator.weight"] = torch.zeros(3)
    namespace = argparse.Namespace(**checkpoint["args"])
    torch.save({"hyper_parameters": {"args": namespace}, "state_dict": state}, tmp_path / "last.ckpt")
    expected = load_vae(PUBLISHED).state_dict()
    for name, value in load_vae(tmp_path / "last.ckpt").state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


def test_published_checkpoint_without_arguments_loads(tmp_path):
    torch.save({"state_dict": published()["state_dict"]}, tmp_path / "bare.ckpt")
    assert load_vae(tmp_path / "bare.ckpt").config == load_vae(PUBLISHED).config


def test_architecture_of_a_published_checkpoint_is_read_off_its_tensors():
    assert load_vae(PUBLISHED).config == LeanVAEConfig(low_channels=8, high_channels=24, num_fusion_layers=2)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_load_strictly(tmp_path, change):
    checkpoint = published()
    state = checkpoint["state_dict"]
    if change == "missing":
        del state["std_layer.bias"]
    elif change == "unknown":
        state["encoder.extra.weight"] = torch.zeros(2)
    else:
        state["latent_bottleneck.Q"] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt.*do not fit"):
        load_vae(tmp_path / "bad.ckpt")


def test_pickled_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_vae(tmp_path / "evil.ckpt")


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        load_vae(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"image_low_proj.*missing"):
        load_vae(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_vae(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    LeanVAE(LeanVAEConfig(**SMALL)).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: no valid"):
        load_vae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": 1}))
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="colour: unknown key"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "Other"}))
    with pytest.raises(ValueError, match="'model'"):
        load_vae(tmp_path)
