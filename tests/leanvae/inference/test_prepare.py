"""A model prepared for inference: same results, whole graphs, and no trace after the weights change."""

import copy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from leanvae.config import LeanVAEConfig as Config
from leanvae.inference.packed import can_pack, pack, packed_linear
from leanvae.inference.prepare import (
    FoldedEmbedding,
    FoldedProjection,
    PackedFeedForward,
    analysis_matrix,
    fold_analysis,
    synthesis_matrix,
)
from leanvae.naf import FeedForward
from leanvae.network import decode_frames, encode_frames
from leanvae.ops import in_blocks
from leanvae.patchify import PatchEmbedding, image_and_video_patches, to_bands, to_patches
from leanvae.surroundings import WHOLE, Chunk
from litevae.errors import InvalidInput

SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
VARIANTS = {
    "published": {},
    "smc": {"decoder_norm": "smc"},
    "patch 4x16x16": {"patch_size": (4, 16, 16)},
    "linear bottleneck": {"bottleneck": "linear"},
    "joint streams": {"streams": "joint"},
    "no wavelet": {"wavelet": "none"},
    "patch norm": {"patch_norm": True},
    "db2": {"wavelet": "db2"},
}
PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-4}


def small_vae(dtype=torch.float64, **fields):
    """A small model whose weights are large enough that every path matters."""
    torch.manual_seed(0)
    vae = LeanVAE(LeanVAEConfig(**{**SMALL, **fields})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "thresholds" in name:
                parameter.abs_()
    return vae


def random_clip(*shape, dtype=torch.float64):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def assert_close(actual, expected, tolerance):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_prepared_model_computes_the_same(variant, dtype):
    plain = small_vae(dtype, **variant)
    prepared = copy.deepcopy(plain).compile()
    for size in [(16, 16), (17, 30), (5, 16, 32), (6, 17, 23), (1, 16, 16), (12, 40, 16)]:
        pixels = random_clip(2, 3, *size, dtype=dtype)
        expected, posterior = plain.encode(pixels), prepared.encode(pixels)
        assert_close(posterior.mean, expected.mean, PRECISIONS[dtype])
        assert_close(posterior.logvar, expected.logvar, PRECISIONS[dtype])
        restored = plain.decode(expected.mean, expected.size)
        assert_close(prepared.decode(expected.mean, expected.size), restored, PRECISIONS[dtype])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1, 4, 4], [3, 2, 5], [9], [1, 1, 1, 7]])
def test_prepared_streams_equal_the_plain_whole(variant, sizes):
    plain = small_vae(torch.float32, **variant)
    prepared = copy.deepcopy(plain).compile()
    clip = random_clip(1, 3, sum(sizes), 16, 24, dtype=torch.float32)
    expected = plain.encode(clip).mean
    posteriors = list(prepared.encode_stream(clip.split(sizes, dim=2)))
    assert_close(torch.cat([posterior.mean for posterior in posteriors], dim=2), expected, 1e-4)
    frames = list(prepared.decode_stream(expected.split([1, expected.shape[2] - 1], dim=2)))
    assert_close(torch.cat(frames, dim=2), plain.decode(expected), 1e-4)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float64_as_without_preparation():
    exact = small_vae()
    clip = random_clip(1, 3, 9, 32, 32)
    expected = exact.decode(exact.encode(clip).mean)

    def error(vae):
        restored = vae.decode(vae.encode(clip.bfloat16()).mean)
        assert restored.dtype == torch.bfloat16
        return (restored.double() - expected).abs().mean()

    plain = copy.deepcopy(exact).bfloat16()
    assert error(copy.deepcopy(plain).compile()) < 1.2 * error(plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_where_onednn_is(dtype):
    feedforward = FeedForward(24).to(dtype)
    packed = PackedFeedForward(feedforward)
    assert can_pack(feedforward.contract.weight) == packed.contract.is_mkldnn
    assert packed.contract.shape == (24, 64)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 31, 512, 513, 2500])
def test_packed_products_of_any_number_of_tokens(num_tokens):
    x, weight, bias = torch.randn(num_tokens, 24), torch.randn(40, 24), torch.randn(40)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(packed_linear(x, pack(weight), bias), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_linear(x, weight, bias), expected, atol=1e-5, rtol=1e-5)


def test_without_onednn_weights_stay_plain(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = small_vae(torch.float32)
    prepared = copy.deepcopy(plain).compile()
    packed = [module for module in prepared.layers.modules() if isinstance(module, PackedFeedForward)]
    assert packed
    assert not any(module.contract.is_mkldnn for module in packed)
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert_close(prepared.encode(clip).mean, plain.encode(clip).mean, 1e-5)


@torch.no_grad()
def test_blocks_of_tokens_do_not_change_the_result():
    x, y = torch.randn(2, 3, 23, 29, 4, dtype=torch.float64), torch.randn(2, 3, 23, 29, 5, dtype=torch.float64)

    def function(a, b):
        return torch.cat((a * 2, b), dim=-1)

    assert torch.equal(in_blocks(function, x, y), function(x, y))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("index", [0, 1])
def test_folded_transform_equals_the_transform(dtype, tolerance, index):
    """Relative to the size of what is summed: tokens of a published embedding of noise are about as large as pixels."""
    config = Config()
    patches = image_and_video_patches(config)[index]
    embedding = PatchEmbedding(config).to(dtype)
    frames = random_clip(1, 3, 1 + 8 * index, 32, 32, dtype=dtype)
    bands = to_bands(frames * config.data_scale)
    with torch.no_grad():
        for name, linear in (embedding.image, embedding.video)[index].items():
            part = dict(zip(patches.channels, patches.of_streams(bands[index]), strict=True))[name]
            expected = linear(to_patches(part, patches.shape))
            pixels = to_patches(frames[:, :, index:], patches.pixels)
            folded = torch.nn.functional.linear(pixels, *fold_analysis(linear, patches, name, config))
            torch.testing.assert_close(folded, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "none"])
@pytest.mark.parametrize("index", [0, 1])
def test_synthesis_matrix_inverts_the_analysis_matrices(wavelet, index):
    patches = image_and_video_patches(Config(wavelet=wavelet))[index]
    analysis = torch.cat([analysis_matrix(patches, name, wavelet) for name in patches.channels])
    identity = torch.eye(len(analysis), dtype=torch.float64)
    torch.testing.assert_close(synthesis_matrix(patches, wavelet) @ analysis, identity, atol=1e-14, rtol=0)


def test_only_transforms_within_a_patch_are_folded():
    for fields, folds in [
        ({}, (True, True)),
        ({"patch_norm": True}, (False, True)),
        ({"wavelet": "db2"}, (False, False)),
    ]:
        layers = LeanVAE(LeanVAEConfig(**SMALL, **fields)).compile().layers
        assert isinstance(layers.encoder.embedding, FoldedEmbedding) == folds[0]
        assert isinstance(layers.decoder.projection, FoldedProjection) == folds[1]


def is_prepared(vae):
    return vae.layers is not vae


def test_train_restores_the_weights():
    plain = small_vae(torch.float32)
    vae = copy.deepcopy(plain).compile()
    assert is_prepared(vae)
    assert is_prepared(vae.eval())
    assert not is_prepared(vae.train())
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    vae(clip)[0].square().mean().backward()
    plain(clip)[0].square().mean().backward()
    for ours, theirs in zip(vae.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_prepared_model_is_not_trained_by_accident():
    vae = small_vae(torch.float32).compile()
    latent = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        vae.decode(latent).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("change", ["load", "cast"])
def test_other_weights_are_not_computed_with_what_was_prepared(change):
    vae = small_vae(torch.float32).compile()
    other = small_vae(torch.float32, ista_layers=1)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    clip = random_clip(1, 3, 5, 16, 16)
    if change == "load":
        vae.load_state_dict(other.state_dict())
        assert torch.equal(vae.encode(clip.float()).mean, other.encode(clip.float()).mean)
    else:
        assert vae.double().encode(clip).mean.dtype == torch.float64
    assert not is_prepared(vae)
    assert is_prepared(vae.compile())


def change_in_place(vae):
    for parameter in vae.parameters():
        parameter.mul_(1.1)


def average_in(vae):
    torch._foreach_lerp_(list(vae.parameters()), [torch.ones_like(weight) for weight in vae.parameters()], 0.1)


def load_a_part(vae):
    state = {name: 1.1 * weight for name, weight in vae.encoder.state_dict().items()}
    vae.encoder.load_state_dict(state)


def assign_a_part(vae):
    state = {name: 1.1 * weight for name, weight in vae.decoder.state_dict().items()}
    vae.decoder.load_state_dict(state, assign=True)


def replace_data(vae):
    vae.bottleneck.phi.data = 1.1 * vae.bottleneck.phi.data


@torch.no_grad()
@pytest.mark.parametrize("change", [change_in_place, average_in, load_a_part, assign_a_part, replace_data])
def test_weights_that_change_unasked_are_prepared_again(change):
    """Such as by copying an average in; the result equals that of an unprepared model with these weights."""
    vae = small_vae(torch.float32).compile()
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    vae.encode(clip)
    change(vae)
    plain = small_vae(torch.float32)
    plain.load_state_dict(vae.state_dict())
    expected = plain.encode(clip)
    assert_close(vae.encode(clip).mean, expected.mean, 1e-4)
    assert_close(vae.decode(expected.mean), plain.decode(expected.mean), 1e-4)
    assert is_prepared(vae)


@torch.inference_mode()
def test_weights_made_in_inference_mode_can_be_prepared():
    plain = small_vae(torch.float32)
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    assert_close(copy.deepcopy(plain).compile().encode(clip).mean, plain.encode(clip).mean, 1e-4)


@torch.no_grad()
def test_options_go_to_torch_compile():
    counter = CompileCounter()
    torch._dynamo.reset()
    plain = small_vae(torch.float32)
    vae = copy.deepcopy(plain).compile(backend=counter)
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    expected = plain.encode(clip).mean
    assert_close(vae.encode(clip).mean, expected, 1e-4)
    assert counter.frame_count == 1
    vae.encode(clip, tile=(8, 8))  # tiles of so many sizes would be compiled anew each time
    assert counter.frame_count == 1
    assert_close(vae.decode(expected), plain.decode(expected), 1e-4)
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_autocast_works_round_any_model(prepared):
    vae = small_vae(torch.float32)
    clip = random_clip(1, 3, 5, 16, 16, dtype=torch.float32)
    expected = vae.encode(clip).mean
    vae = vae.compile() if prepared else vae
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(clip).mean
        restored = vae.decode(latent)
        vae.decode(expected)
    assert_close(latent.float(), expected, 0.1)
    assert restored.isfinite().all()
    assert torch.equal(vae.encode(clip).mean, vae.encode(clip).mean)


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_another_dtype_than_the_weights_is_refused_with_both_names(prepared):
    vae = small_vae(torch.bfloat16)
    vae = vae.compile() if prepared else vae
    message = r"has dtype torch.float32 and the model torch.bfloat16: convert one of them, as in x.to\(torch.bfloat16\)"
    with pytest.raises(InvalidInput, match=f"input {message}"):
        vae.encode(random_clip(1, 3, 5, 16, 16, dtype=torch.float32))
    with pytest.raises(InvalidInput, match=f"latent {message}"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(InvalidInput, match=f"chunk {message}"):
        next(vae.encode_stream([random_clip(1, 3, 5, 16, 16, dtype=torch.float32)]))


def test_state_of_a_prepared_model_is_the_weights(tmp_path):
    plain = small_vae(torch.float32, decoder_norm="smc")
    vae = copy.deepcopy(plain).compile()
    assert list(vae.state_dict()) == list(plain.state_dict())
    vae.save_pretrained(tmp_path)
    for name, weight in load_vae(tmp_path).state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    assert not is_prepared(copy.deepcopy(vae))


def recompilations(function, calls):
    """Runs calls through one whole-graph compilation; returns how often it compiled anew after the first.

    Args:
        function: what is compiled; takes tensors and what lies around them.
        calls: tensors, and a function that makes what lies around them, for each call.
    """
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tensor, make_around in calls:
        around, same = make_around(), make_around()
        for ours, expected in zip(flat(compiled(tensor, around)), flat(function(tensor, same)), strict=True):
            torch.testing.assert_close(ours, expected)
        if isinstance(around, Chunk):
            assert around.next_past
            torch.testing.assert_close(around.next_past, same.next_past)
        counts.append(counter.frame_count)
    return counts[-1] - counts[0]


def flat(outputs):
    return [tensor for tensor in tree_leaves(outputs) if tensor is not None]


def chunk_after_another(widths, batch, height, width):
    """Makes the surroundings of frames that follow others, before convolutions of these widths."""
    past = [torch.randn(batch, 2, height, width, channels) for channels in widths]
    return lambda: Chunk(past)


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_the_way_from_pixels_to_latent_compiles_once_for_all_sizes_without_graph_breaks(prepared, stream):
    vae = small_vae(torch.float32)
    layers = (vae.compile() if prepared else vae).layers
    calls = []
    for frames, height, width in [(13, 72, 56), (21, 48, 40), (29, 40, 88)]:
        clip = random_clip(2, 3, frames, height, width, dtype=torch.float32)
        around = chunk_after_another([8, 16, 24], 2, height // 8, width // 8) if stream else lambda: WHOLE
        calls.append((clip[:, :, int(stream) :], around))
    encode = partial(encode_frames, layers, starts_clip=not stream)
    assert recompilations(lambda pixels, around: encode(pixels, around=around), calls) == 0


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_the_way_from_latent_to_pixels_compiles_once_for_all_sizes_without_graph_breaks(prepared, stream):
    vae = small_vae(torch.float32, decoder_norm="smc")
    layers = (vae.compile() if prepared else vae).layers
    calls = []
    for frames, height, width in [(3, 5, 7), (5, 11, 6), (6, 3, 9)]:
        around = chunk_after_another([24] * 5 + [8, 16], 2, height, width) if stream else lambda: WHOLE
        calls.append((torch.randn(2, 4, frames, height, width), around))
    decode = partial(decode_frames, layers, starts_clip=not stream)
    assert recompilations(lambda latent, around: decode(latent, around=around), calls) == 0
