"""Tiles of the video autoencoder: equal to the whole at any size, with the smallest sufficient halo."""

import logging
import math
import random

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.inference.plan import _layers
from leanvae.inference.tiles import CONV_REACH, Span, StoppedMidway, decoder_halo, encoder_halo, tile_grid

SMALL = {"low_channels": 4, "high_channels": 8, "num_stream_layers": 1, "num_fusion_layers": 2, "ista_layers": 1}
VARIANTS = {
    "published": {},
    "smc": {"decoder_norm": "smc"},
    "oblong patches": {"patch_size": (4, 16, 8)},
    "linear bottleneck": {"bottleneck": "linear"},
    "joint streams": {"streams": "joint"},
    "no wavelet": {"wavelet": "none"},
    "patch norm": {"patch_norm": True},
    "no layers": {"num_stream_layers": 0, "num_fusion_layers": 0, "bottleneck": "linear"},
}


def make(**fields):
    """A small model in which every path matters, whose outputs are about one."""
    torch.manual_seed(0)
    vae = LeanVAE(LeanVAEConfig(**{**SMALL, **fields})).double().eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            if ".thresholds." in name:
                parameter.fill_(1e-5)  # that of the initialisation would stop all that such small weights let through
    return vae


def noise(*shape):
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def assert_equal(actual, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual / scale, expected / scale, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_and_chunks_equal_the_whole_at_random_sizes(variant):
    vae = make(**VARIANTS[variant])
    draw = random.Random(variant)
    _, patch_height, patch_width = vae.config.patch_size
    with torch.inference_mode():
        for _ in range(8):
            size = (draw.randint(1, 14), draw.randint(1, 120), draw.randint(1, 120))
            tile = (draw.randint(patch_height, 100), draw.randint(patch_width, 100))
            cut = {"tile": tile, "chunk": draw.choice([None, 1, 4, 7, 9])}
            x = noise(draw.randint(1, 2), 3, *size)
            whole, posterior = vae.encode(x), vae.encode(x, **cut)
            assert_equal(posterior.mean, whole.mean)
            assert_equal(posterior.logvar, whole.logvar)
            assert posterior.size == size
            assert_equal(vae.decode(whole.mean, size, **cut), vae.decode(whole.mean, size))
            assert_equal(vae.decode(whole.mean, **cut), vae.decode(whole.mean))


@pytest.mark.parametrize("tile", [(8, 8), (8, 200), (200, 8), (24, 40)])
def test_tiles_of_images_equal_the_whole(tile):
    vae = make()
    x = noise(2, 3, 45, 70)
    with torch.inference_mode():
        whole, posterior = vae.encode(x), vae.encode(x, tile=tile)
        assert posterior.size == (45, 70)
        assert_equal(posterior.mean, whole.mean)
        decoded = vae.decode(whole.mean, (45, 70), tile=tile)
        assert decoded.shape == x.shape
        assert_equal(decoded, vae.decode(whole.mean, (45, 70)))


def test_tiles_have_the_gradients_of_the_whole():
    vae = make()
    x = noise(1, 3, 5, 32, 40)
    gradients = []
    for cut in ({}, {"tile": (16, 24), "chunk": 4}):
        vae.zero_grad()
        latent = vae.encode(x, **cut).mean
        vae.decode(latent, (5, 32, 40), **cut).square().mean().backward()
        gradients.append([parameter.grad for parameter in vae.parameters() if parameter.grad is not None])
    for tiled, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, whole, atol=1e-10, rtol=1e-8)


class RunsOut:
    """A substitute for a forward pass that runs out of memory at some calls."""

    def __init__(self, monkeypatch, module, fails_at):
        self._forward, self._fails_at, self.num_calls = module.forward, fails_at, 0
        monkeypatch.setattr(module, "forward", self)

    def __call__(self, *arguments, **options):
        self.num_calls += 1
        if self.num_calls - 1 in self._fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._forward(*arguments, **options)


@pytest.mark.parametrize("fails_at", [[0], [1], [4], [9], [4, 5], [12, 13]])
def test_a_stream_of_tiles_that_runs_out_of_memory_midway_takes_fewer_frames(fails_at, monkeypatch, caplog):
    """Its past belongs to the next frames where tiles are done, so the other tiles have to continue."""
    vae = make()
    x = noise(1, 3, 33, 40, 56)
    with torch.inference_mode():
        whole = vae.encode(x)
        decoded = vae.decode(whole.mean)
        for module, stream, pieces, expected in [
            (vae.encoder, vae.encode_stream, x.split([17, 16], dim=2), whole.mean),
            (vae.decoder, vae.decode_stream, whole.mean.split([5, 4], dim=2), decoded),
        ]:
            forward = RunsOut(monkeypatch, module, fails_at)
            with caplog.at_level(logging.WARNING, logger="leanvae"):
                outputs = list(stream(pieces, tile=(24, 24)))
            assert forward.num_calls > fails_at[-1] + 1
            assert caplog.text.count("out of memory") == len(fails_at)
            caplog.clear()
            tensors = [output if torch.is_tensor(output) else output.mean for output in outputs]
            assert_equal(torch.cat(tensors, dim=2), expected)


def test_a_stream_of_tiles_whose_past_is_lost_says_so(monkeypatch):
    vae = make()
    RunsOut(monkeypatch, vae.encoder, range(3, 100))
    with torch.inference_mode(), pytest.raises(StoppedMidway, match="one latent frame of a tile at a time"):
        list(vae.encode_stream([noise(1, 3, 9, 40, 56)], tile=(24, 24)))


def test_published_halos_are_6_and_14_tokens():
    assert encoder_halo(LeanVAEConfig()) == 6
    assert decoder_halo(LeanVAEConfig()) == 14


@pytest.mark.parametrize(
    "fields",
    [
        {"num_stream_layers": 2, "num_fusion_layers": 4, "ista_layers": 2},  # the published depth
        {},
        {"ista_iterations": 1},
        {"bottleneck": "linear"},
    ],
)
def test_halo_is_as_wide_as_it_must_be_and_no_wider(fields):
    """A pixel at the halo's end changes a latent, and one a token further does not; the same for decoding."""
    vae = make(**fields)
    for halo, length in ((encoder_halo(vae.config), 8), (decoder_halo(vae.config), 1)):
        centre = halo + 2
        num_tokens = 2 * centre + 1
        if length == 8:
            source = noise(1, 3, 1, 16, 8 * num_tokens).requires_grad_()
            seen_from = vae.encode(source).mean[..., centre]
        else:
            source = torch.randn(1, 4, 1, 2, num_tokens, dtype=torch.float64, requires_grad=True)
            seen_from = vae.decode(source)[..., 8 * centre : 8 * centre + 8]
        (gradient,) = torch.autograd.grad(seen_from.square().sum(), source)
        by_token = gradient.abs().amax((0, 1, 2, 3)).view(num_tokens, length).amax(1)
        assert (by_token[[centre - halo, centre + halo]] > 0).all()
        assert (by_token[[centre - halo - 1, centre + halo + 1]] == 0).all()


@pytest.mark.parametrize(("size", "tile", "halo"), [((9, 13), (4, 5), 6), ((3, 40), (1, 7), 14), ((5, 5), (8, 8), 3)])
def test_every_token_passes_every_layer_once(size, tile, halo):
    grid = tile_grid(size, tile, halo)
    for spans, length, most in zip(grid, size, tile, strict=True):
        for steps in range(halo + 1):
            tokens = [token for span in spans for token in range(*span.moved(steps).present)]
            assert tokens == list(range(length))
            assert max(span.moved(steps).size for span in spans) <= most


def test_span_places_itself_within_another():
    span = Span(-2, 3, 10)
    assert span.present == (0, 3)
    assert span.moved(2).size == 1
    assert Span(4, 6, 10).within(Span(4, 6, 10).extended(2)) == slice(2, 4)
    assert span.last(2).within(span) == slice(1, 3)


def relative_cost(config, name, size, tile):
    """Multiply-adds of all NAF layers in tiles over those in whole frames, for tokens (height, width).

    Every token passes every feedforward once; a tile's convolutions also work on the tokens that neighbours left.
    """
    grid = tile_grid(size, tile, encoder_halo(config) if name == "encode" else decoder_halo(config))
    whole = tiled = 0
    for num_before, width in _layers(config, name):
        rows, columns = (
            sum(span.moved(num_before).extended(CONV_REACH).size for span in spans if span.moved(num_before + 1).size)
            for spans in grid
        )
        feedforward, convolution = 3 * width * int(4 * 2 / 3 * width), 27 * width
        whole += math.prod(size) * (feedforward + convolution)
        tiled += math.prod(size) * feedforward + rows * columns * convolution
    return tiled / whole


@pytest.mark.parametrize("name", ["encode", "decode"])
@pytest.mark.parametrize("tile", [(256, 256), (512, 512), (272, 1920)])
def test_tiles_of_1080p_cost_little_more_than_the_whole(name, tile):
    tokens = (tile[0] // 8, tile[1] // 8)
    assert 1 < relative_cost(LeanVAEConfig(), name, (135, 240), tokens) < 1.01


def test_cost_counts_what_convolutions_read_of_their_neighbours():
    """In tiles of one token, the convolution reads both of two tokens for each: twice as many as in the whole."""
    config = LeanVAEConfig(streams="joint", num_stream_layers=0, num_fusion_layers=1)
    feedforward = 3 * int(4 * 2 / 3 * 512)
    exact = (2 * feedforward + 4 * 27) / (2 * feedforward + 2 * 27)
    assert relative_cost(config, "encode", (1, 2), (1, 1)) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"tile": (4, 64)}, r"tile is \(4, 64\): expected at least one patch of 8x8 pixels"),
        ({"tile": 64}, "tile is 64: expected two whole numbers"),
        ({"tile": (64, 64, 64)}, "expected two whole numbers"),
        ({"tile": (64.5, 64)}, "expected two whole numbers"),
        ({"chunk": 0}, "chunk is 0: expected a whole number of frames, at least 1"),
        ({"chunk": 1.5}, "chunk is 1.5: expected a whole number"),
        ({"memory_limit": "lots"}, "memory_limit is 'lots': expected"),
    ],
)
def test_bad_parts_are_refused(cut, message):
    vae = make()
    x = noise(1, 3, 5, 32, 32)
    with pytest.raises(ValueError, match=message):
        vae.encode(x, **cut)
    with pytest.raises(ValueError, match=message):
        vae.decode(noise(1, 4, 2, 4, 4), **cut)


def test_wrong_sizes_are_refused_in_parts_as_they_are_whole():
    for size in [(5, 16, 24), (9, 16, 16), (16, 16), (16,)]:
        with pytest.raises(ValueError, match="does not fit this latent"):
            make().decode(noise(1, 4, 2, 2, 2), size, chunk=1)


def test_longer_wavelets_refuse_tiles_unless_blended():
    vae = make(wavelet="db2")
    x = noise(1, 3, 5, 96, 96)
    with torch.inference_mode():
        whole = vae.encode(x)
        for run in (vae.encode, lambda x, **cut: vae.decode(whole.mean, **cut)):
            with pytest.raises(ValueError, match=r"not exact, because the wavelet 'db2' is longer than Haar"):
                run(x, tile=(64, 64))
        assert_equal(vae.encode(x, tile=(96, 96)).mean, whole.mean)  # one tile is the whole
        assert_equal(vae.encode(x, chunk=4).mean, whole.mean)  # in time it is Haar
        for cut in ({"tile": (64, 64)}, {"tile": (64, 64), "chunk": 4}):
            blended = vae.encode(x, **cut, approximate=True)
            assert blended.mean.shape == whole.mean.shape
            # Tokens of the first tile that are further than the halo from its inner borders.
            torch.testing.assert_close(blended.mean[..., :2, :2], whole.mean[..., :2, :2], atol=1e-6, rtol=0)
            decoded = vae.decode(whole.mean, (5, 96, 96), **cut, approximate=True)
            assert decoded.shape == x.shape
            assert decoded.isfinite().all()
        streamed = torch.cat(
            [part.mean for part in vae.encode_stream(x.split(2, dim=2), tile=(64, 64), approximate=True)], dim=2
        )
        assert_equal(streamed, vae.encode(x, tile=(64, 64), approximate=True).mean)


def test_exact_tiles_stay_exact_where_approximate_ones_are_allowed():
    vae = make()
    x = noise(1, 3, 5, 40, 40)
    with torch.inference_mode():
        assert_equal(vae.encode(x, tile=(16, 16), approximate=True).mean, vae.encode(x).mean)
