"""Saving and loading of weights, ours and published ones."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from litevae import LiteVAE, LiteVAEConfig
from litevae.torchvision_compat import prepare_torchvision

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
        "README.md",
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


LITE = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}


def test_image_models_come_back_from_their_folder(tmp_path):
    vae = LiteVAE(LiteVAEConfig(latent_channels=12, decoder_norm="smc", levels=(2, 3), **LITE)).eval()
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert isinstance(loaded, LiteVAE)
    assert loaded.config == vae.config
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in vae.state_dict().items())


def test_folders_of_diffusers_load_as_the_sd_vae(tmp_path):
    prepare_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    reference = AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, **kinds).eval()
    reference.save_pretrained(tmp_path / "sd")
    vae = load_vae(tmp_path / "sd")
    assert vae.config.encoder == "sd"
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(vae(x)[0], reference(x).sample, rtol=1e-5, atol=1e-5)
    weights = tmp_path / "sd" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: no valid safetensors file"):
        load_vae(tmp_path / "sd")


def test_folders_of_other_models_are_refused(tmp_path):
    LiteVAE(LiteVAEConfig(**LITE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "OtherVAE"}))
    with pytest.raises(ValueError, match="the field 'model' must be one of LeanVAE, LiteVAE"):
        load_vae(tmp_path)
