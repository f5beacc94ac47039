"""Counts of FLOPs against hand counts, published ones, and those of independent runs."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvae.bench.flops import count, count_flops
from leanvae.config import LeanVAEConfig
from leanvae.peers.models import Size
from leanvae.peers.registry import REGISTRY

CLIP = Size(17, 256, 256)


def total(name: str, size: Size) -> float:
    """TFLOP to encode and decode."""
    counted = count(REGISTRY[name], REGISTRY[name].build_on_meta(), size)
    return (counted.encode + counted.decode) / 1e12


def naf_layer(dim: int) -> int:
    """Multiply-adds a token of a NAF layer: depthwise 3x3x3, and a gated feedforward."""
    inner = int(4 * 2 / 3 * dim)
    return 27 * dim + dim * 2 * inner + inner * dim


@pytest.mark.parity
@pytest.mark.parametrize("size", [CLIP, Size(1, 64, 128)])
def test_leanvae_agrees_with_a_count_by_hand(size: Size) -> None:
    config = LeanVAEConfig()
    area = (size.height // 8) * (size.width // 8)
    image, video = area, area * (size.frames - 1) // 4  # tokens
    low, high = config.low_channels, config.high_channels
    fused, latent = low + high, config.latent_channels
    # Patches of 4x4 (image) and 2x4x4 (clip) of the low band, and of 3 and 7 high bands, of three colours.
    maps = image * (48 * low + 3 * 48 * high) + video * (96 * low + 7 * 96 * high)
    layers = (image + video) * (2 * naf_layer(low) + 2 * naf_layer(high) + 4 * naf_layer(fused))
    product = (image + video) * fused * latent
    encode = maps + layers + 2 * product  # mean and log-variance
    # Two iterations of two products with the matrix and of two transforms of two layers.
    recover = product + 2 * (2 * product + (image + video) * 4 * naf_layer(fused))
    counted = count(REGISTRY["leanvae-c4"], REGISTRY["leanvae-c4"].build_on_meta(), size)
    assert counted.encode == 2 * encode
    assert counted.decode == 2 * (recover + layers + maps)
    assert counted.parameters == pytest.approx(39.77e6, rel=1e-3)
    if size == CLIP:
        assert round(counted.encode / 1e12, 3) == 0.116
        assert round(counted.decode / 1e12, 3) == 0.289


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd-vae", "sd-vae-nchw", "autoencoder-kl"])
def test_sd_vae_encoder_has_the_multiply_adds_of_the_litevae_paper(name: str) -> None:
    counted = count(REGISTRY[name], REGISTRY[name].build_on_meta(), Size(1, 256, 256))
    assert counted.encode / 2 == pytest.approx(135.59e9, rel=0.01)  # LiteVAE, Section 1


@pytest.mark.parity
def test_other_models_cost_what_independent_counts_say_and_leanvae_a_tenth_at_most() -> None:
    expected = {"ltx-video": 1.97, "wan-2.1": 15.3, "cogvideox": 30.9, "hunyuanvideo": 39.4}
    ours = total("leanvae-c4", CLIP)
    assert ours == pytest.approx(0.405, abs=5e-4)
    for name, tflops in expected.items():
        assert total(name, CLIP) == pytest.approx(tflops, rel=5e-3)
    assert all(expected[name] > 10 * ours for name in ("wan-2.1", "cogvideox", "hunyuanvideo"))


def test_attention_counts_as_two_matrix_products() -> None:
    q = torch.empty(2, 4, 10, 8, device="meta")
    k = torch.empty(2, 4, 30, 8, device="meta")
    flops, _ = count_flops(lambda: F.scaled_dot_product_attention(q, k, k))
    assert flops == 2 * 2 * (2 * 4 * 10 * 30 * 8)


def test_grouped_convolutions_count_their_own_channels_alone() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=4, device="meta")

    def run() -> Tensor:
        return conv(torch.empty(1, 8, 5, 7, device="meta"))

    assert count_flops(run)[0] == 2 * (5 * 7) * 8 * 2 * 9


@pytest.mark.parametrize("name", ["cogvideox", "mochi"])
def test_convolutions_that_split_large_inputs_are_counted_whole(name: str) -> None:
    model = REGISTRY[name]
    module = model.build_on_meta()
    small, large = (count(model, module, Size(17, side, 2 * side)).decode for side in (512, 2048))
    if name == "cogvideox":  # without attention, so that its cost is that of its area
        assert large == 16 * small
    assert large >= 16 * small


def test_tiled_models_cost_their_tiles() -> None:
    allegro = REGISTRY["allegro"]
    module = allegro.build_on_meta()
    one = count(allegro, module, Size(17, 64, 64))
    six = count(allegro, module, Size(40, 520, 321))  # 2 x 2 x 2 tiles: the width is padded to 560
    assert allegro.num_tiles(allegro.fit(Size(40, 520, 321))) == 8
    assert six.encode == 8 * one.encode > 0
