"""The start in closed form, against the truncated KLT computed apart, on pixel patches, by numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.training import patch_statistics
from leanvae.training.patch_statistics import ClipStatistics
from leanvae.training.start import LinearStart, linear_start, open_context, start_model

SMALL = {"low_channels": 32, "high_channels": 96, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
KINDS = {"image": slice(0, 1), "video": slice(1, None)}


def smooth_clips(count=16, frames=9, size=32, seed=0):
    """Clips whose neighbouring pixels are alike, as in photographs, with a tint and moving contrast."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3 * count, 1, frames, size, size, generator=generator)
    smooth = F.conv3d(noise, torch.ones(1, 1, 3, 5, 5) / 75, padding=(1, 2, 2)).view(count, 3, frames, size, size)
    return (3 * smooth + torch.linspace(-0.3, 0.3, 3).view(1, 3, 1, 1, 1)).clamp(-1, 1)


def truncated_klt(clips, num_components, patch=(4, 8, 8)):
    """The reconstruction by the leading principal components of pixel patches, image frame and others apart."""
    result = np.empty(clips.shape)
    for kind, part in KINDS.items():
        frames, height, width = patch if kind == "video" else (1, *patch[1:])
        pixels = clips[:, :, part].double().numpy()
        b, c, t, h, w = pixels.shape
        if not t:
            continue
        cut = pixels.reshape(b, c, t // frames, frames, h // height, height, w // width, width)
        vectors = cut.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, c * frames * height * width)
        mean = vectors.mean(0)
        _, directions = np.linalg.eigh(np.cov(vectors.T, bias=True))
        leading = directions[:, ::-1][:, :num_components]
        kept = (vectors - mean) @ leading @ leading.T + mean
        shape = (b, t // frames, h // height, w // width, c, frames, height, width)
        result[:, :, part] = kept.reshape(shape).transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(pixels.shape)
    return torch.from_numpy(result)


def psnr(a, b):
    return float(-10 * torch.log10((a.double() - b.double()).square().mean() / 4))


def started(clips, **fields) -> tuple[LeanVAE, LinearStart]:
    config = LeanVAEConfig(**{**SMALL, **fields})
    statistics = ClipStatistics(config)
    for part in clips.split(5):
        statistics.add(part)
    model, start = LeanVAE(config).eval(), linear_start(statistics)
    start_model(model, start)
    return model, start


@torch.no_grad()
def reconstruct(model, clips):
    posterior = model.encode(clips)
    return model.decode(posterior.mean, posterior.size), posterior.mean


FIELDS = [
    {"decoder_norm": "smc"},
    {"bottleneck": "linear"},
    {"streams": "joint"},
    {"wavelet": "none"},
    {"num_fusion_layers": 0, "num_stream_layers": 0},
]


CASES = [({}, 4), ({}, 16), ({}, 32), *((fields, 16) for fields in FIELDS)]


@pytest.mark.parametrize(("fields", "latent_channels"), CASES, ids=str)
def test_started_models_are_the_truncated_klt(fields, latent_channels):
    clips = smooth_clips()
    model, start = started(clips, latent_channels=latent_channels, **fields)
    output, latent = reconstruct(model, clips)
    expected = truncated_klt(clips, latent_channels)
    for kind, part in KINDS.items():
        assert psnr(output[:, :, part], clips[:, :, part]) == pytest.approx(
            psnr(expected[:, :, part], clips[:, :, part]), abs=0.05
        )
        assert start.psnr[kind] == pytest.approx(psnr(output[:, :, part], clips[:, :, part]), abs=0.05)
        assert abs(start.lost[kind]) < 0.01
    assert psnr(output, expected) > 60  # the residual branches of `smc` are all but closed
    channels = latent.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(latent_channels), atol=0.02, rtol=0)
    torch.testing.assert_close(channels.var(1), torch.ones(latent_channels), atol=0.05, rtol=0)


@pytest.mark.parametrize("patch_size", [(2, 4, 4), (4, 4, 8)], ids=str)
def test_other_patches_start_at_their_klt(patch_size):
    clips = smooth_clips()
    model, _ = started(clips, latent_channels=8, patch_size=patch_size)
    output, _ = reconstruct(model, clips)
    assert psnr(output, clips) == pytest.approx(psnr(truncated_klt(clips, 8, patch_size), clips), abs=0.05)


def test_longer_wavelets_start_at_the_klt_of_their_bands():
    clips = smooth_clips()
    model, start = started(clips, latent_channels=16, wavelet="db2")
    output, latent = reconstruct(model, clips)
    for kind, part in KINDS.items():  # patches of the bands overlap in the pixels, which the borders cut off
        assert start.psnr[kind] == pytest.approx(psnr(output[:, :, part], clips[:, :, part]), abs=0.3)
    torch.testing.assert_close(latent.transpose(0, 1).flatten(1).var(1), torch.ones(16), atol=0.05, rtol=0)


def test_images_alone_start_as_well_as_among_clips():
    clips = smooth_clips()
    alone, _ = started(clips[:, :, :1], latent_channels=16)
    joint, _ = started(clips, latent_channels=16)
    images = smooth_clips(seed=1)[:, :, :1]
    figures = [psnr(reconstruct(model, images)[0], images) for model in (alone, joint)]
    assert figures[1] > figures[0] - 0.3


def test_streams_narrower_than_the_latent_say_what_they_lose():
    clips = smooth_clips()
    model, start = started(clips, latent_channels=16, low_channels=8, high_channels=24)
    output, latent = reconstruct(model, clips)
    for kind, part in KINDS.items():
        assert start.psnr[kind] == pytest.approx(psnr(output[:, :, part], clips[:, :, part]), abs=0.05)
        lost = psnr(truncated_klt(clips, 16)[:, :, part], clips[:, :, part]) - start.psnr[kind]
        assert start.lost[kind] == pytest.approx(lost, abs=0.05)
        assert lost > 0.1
    torch.testing.assert_close(latent.transpose(0, 1).flatten(1).var(1), torch.ones(16), atol=0.05, rtol=0)


def test_long_patch_vectors_are_sampled_and_not_summed(monkeypatch):
    clips = smooth_clips(count=64)
    _, exact = started(clips, latent_channels=8)
    monkeypatch.setattr(patch_statistics, "_LONGEST_COVARIANCE", 100)
    monkeypatch.setattr(patch_statistics, "_MOST_KEPT", 600)
    model, sampled = started(clips, latent_channels=8)
    output, _ = reconstruct(model, clips)
    assert psnr(output, clips) > psnr(truncated_klt(clips, 8), clips) - 0.3
    # What the sample promises of itself is too good, as always; it is not far off.
    assert sampled.psnr["video"] == pytest.approx(exact.psnr["video"], abs=0.6)


def test_neighbours_can_be_used_by_the_projection_alone():
    clips = smooth_clips()
    model, _ = started(clips, latent_channels=4, decoder_norm="layer")
    seen = []
    model.decoder.projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output, latent = reconstruct(model, clips)
    low, high = seen[0]
    slope = (latent[:, 0, :, :, 2:] - latent[:, 0, :, :, :-2]) / 2
    change = latent[:, 0, :-1] - latent[:, 0, 1:]
    for tokens in (low, high):  # after the four channels that the pixels are made of
        torch.testing.assert_close(tokens[:, :, :, 1:-1, 4], slope, atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens[:, 1:, ..., 6], change, atol=1e-5, rtol=0)
    # Least squares on these channels improve on the KLT, which the start leaves as it is.
    inputs = torch.cat(seen[0], dim=-1)[:, 1:].flatten(0, 3).double()
    targets = clips[:, :, 1:].unfold(2, 4, 4).unfold(3, 8, 8).unfold(4, 8, 8).permute(0, 2, 3, 4, 1, 7, 5, 6)
    targets = targets.reshape(len(inputs), -1).double()
    inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), dim=1)
    fitted = inputs @ torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    assert psnr(fitted, targets) > psnr(output[:, :, 1:], clips[:, :, 1:]) + 0.3


@torch.no_grad()
def test_clips_without_content_have_latents_of_0():
    clips = torch.full((2, 3, 5, 16, 16), 0.3) + torch.tensor([0.0, 0.1, -0.2]).view(1, 3, 1, 1, 1)
    model, _ = started(clips, latent_channels=16)
    output, latent = reconstruct(model, clips)
    assert psnr(output, clips) > 80
    assert latent.abs().max() < 0.1  # not what rounding leaves, brought to variance 1


def test_models_without_a_linear_skeleton_are_refused():
    with pytest.raises(ValueError, match="patch_norm"):
        started(smooth_clips(count=2), patch_norm=True)
    with pytest.raises(ValueError, match="statistics"):
        linear_start(ClipStatistics(LeanVAEConfig(**SMALL)))


def test_context_changes_no_reconstruction():
    clips = smooth_clips(count=4)
    model, _ = started(clips, latent_channels=4)
    output, _ = reconstruct(model, clips)
    with torch.no_grad():
        model.decoder.fusion.convs[0].weight.zero_()
    without, _ = reconstruct(model, clips)
    torch.testing.assert_close(output, without, atol=1e-5, rtol=0)
    open_context(model)
    torch.testing.assert_close(reconstruct(model, clips)[0], output, atol=1e-5, rtol=0)
