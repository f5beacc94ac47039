"""Agreement with the published LeanVAE, to 1e-5: bands, features, log-variance, latents, reconstructions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leanvae import load_vae
from leanvae.patchify import to_bands

SHIPPED = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOLDERS = [SHIPPED, *([SHARED] if SHARED.is_dir() else [])]

pytestmark = pytest.mark.parity


def assert_agrees(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=FOLDERS, ids=["shipped", "shared"][: len(FOLDERS)])
def golden(request):
    """The model, and the published implementation's inputs and outputs with pixels rescaled to [-1, 1]."""
    tensors = load_file(request.param / "official_small_io.safetensors")
    pixels = {"image", "video", "image_recon", "video_recon"}
    tensors = {name: value * 2 if name in pixels else value for name, value in tensors.items()}
    return load_vae(request.param / "official_small.ckpt"), tensors


@torch.inference_mode()
def test_encoder_agrees_with_the_published_one(golden):
    vae, expected = golden
    bands = to_bands(expected["video"] * vae.config.data_scale)
    assert_agrees(bands.image, expected["video_dwt_image"])
    assert_agrees(bands.video, expected["video_dwt_video"])
    features = vae.encoder(expected["video"])
    assert_agrees(features, expected["video_features"])
    posterior = vae.encode(expected["video"])
    assert_agrees(posterior.mean, expected["video_latent"])
    assert_agrees(posterior.logvar.movedim(1, -1), expected["video_log_var"])


@torch.inference_mode()
def test_decoder_agrees_with_the_published_one(golden):
    vae, expected = golden
    assert_agrees(vae.decode(expected["video_latent"]), expected["video_recon"])


@torch.inference_mode()
def test_image_path_agrees_with_the_published_one(golden):
    vae, expected = golden
    posterior = vae.encode(expected["image"])
    assert_agrees(posterior.mean, expected["image_latent"])
    assert_agrees(vae.decode(posterior.mode(), posterior.size), expected["image_recon"])


@torch.inference_mode()
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared golden outputs")
@pytest.mark.parametrize(("frames", "latents"), [(9, 3), (5, 3), (1, 1), (4, 2)])
def test_streams_agree_with_the_published_chunks(frames, latents):
    vae = load_vae(SHARED / "official_small.ckpt")
    expected = load_file(SHARED / "official_small_io.safetensors")
    posteriors = vae.encode_stream((expected["video"] * 2).split(frames, dim=2))
    latent = torch.cat([posterior.mean for posterior in posteriors], dim=2)
    assert_agrees(latent, expected["tiled_latent_9"])
    clip = torch.cat(list(vae.decode_stream(latent.split(latents, dim=2))), dim=2)
    assert_agrees(clip / 2, expected["tiled_recon_9_3"])
