"""Streams of the video autoencoder: equal to the whole for every length and chunking, little lag, flat memory."""

import gc
import itertools
import random

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig

TINY = {"low_channels": 4, "high_channels": 8, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = LeanVAE(LeanVAEConfig(**TINY)).double().eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            if ".thresholds." in name:
                parameter.fill_(1e-5)
    return vae


def noise(*shape):
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def random_cuts(draw, total):
    """Lengths that add up to `total`."""
    lengths = []
    while sum(lengths) < total:
        lengths.append(draw.randint(1, min(9, total - sum(lengths))))
    return lengths


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_frames", range(1, 23))
def test_streams_equal_the_whole_for_every_length_and_random_chunks(vae, num_frames):
    draw = random.Random(num_frames)
    size = (num_frames, draw.randint(1, 40), draw.randint(1, 40))
    clip = noise(draw.randint(1, 2), 3, *size)
    limits = [{}, {"tile": (draw.randint(8, 40), draw.randint(8, 40))}, {"memory_limit": "30MB"}]
    with torch.inference_mode():
        whole = vae.encode(clip)
        decoded = vae.decode(whole.mean)
        for parts in limits:
            posteriors = list(vae.encode_stream(clip.split(random_cuts(draw, num_frames), dim=2), **parts))
            assert_equal(torch.cat([posterior.mean for posterior in posteriors], dim=2), whole.mean)
            assert_equal(torch.cat([posterior.logvar for posterior in posteriors], dim=2), whole.logvar)
            assert sum(posterior.size[0] for posterior in posteriors) == num_frames
            assert all(posterior.size[1:] == size[1:] for posterior in posteriors)
            latents = whole.mean.split(random_cuts(draw, whole.mean.shape[2]), dim=2)
            assert_equal(torch.cat(list(vae.decode_stream(latents, **parts)), dim=2), decoded)


def test_whole_clips_equal_their_chunks_of_every_length(vae):
    clip = noise(1, 3, 11, 16, 24)
    with torch.inference_mode():
        whole = vae.encode(clip)
        decoded = vae.decode(whole.mean, (11, 16, 24))
        for chunk in range(1, 13):
            assert_equal(vae.encode(clip, chunk=chunk).mean, whole.mean)
            assert_equal(vae.decode(whole.mean, (11, 16, 24), chunk=chunk), decoded)


@pytest.mark.parametrize("parts", [{}, {"tile": (16, 16)}])
def test_first_posterior_comes_after_one_frame_and_each_other_after_four_more(vae, parts):
    taken = []

    def frames():
        for index in range(10):
            taken.append(index)
            yield noise(1, 3, 1, 16, 24)

    num_taken = []
    for posterior in vae.encode_stream(frames(), **parts):
        assert posterior.mean.shape[2] == 1
        num_taken.append(len(taken))
    assert num_taken == [1, 5, 9, 10]


def test_frames_come_with_their_latent(vae):
    taken = []

    def latents():
        for index in range(3):
            taken.append(index)
            yield noise(1, 4, 1, 2, 3)

    lengths = [(len(taken), frames.shape[2]) for frames in vae.decode_stream(latents())]
    assert lengths == [(1, 1), (2, 4), (3, 4)]


def test_large_chunks_are_worked_on_in_parts_where_memory_is_limited(vae):
    clip = noise(1, 3, 97, 16, 16)
    with torch.inference_mode():
        parts = [posterior.mean.shape[2] for posterior in vae.encode_stream([clip], memory_limit="1GiB")]
        assert parts == [16, 9]
        whole = vae.encode(clip).mean
        frames = [part.shape[2] for part in vae.decode_stream([whole], memory_limit="1GiB")]
    assert frames == [61, 36]


def tensor_bytes():
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = (value for value in gc.get_objects() if type(value) is torch.Tensor)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("parts", [{}, {"tile": (16, 16)}])
def test_memory_is_flat_over_1025_frames(vae, parts):
    def chunks():
        yield noise(1, 3, 1, 16, 24)
        for _ in range(64):
            yield noise(1, 3, 16, 16, 24)

    held, num_frames = [], 0
    with torch.inference_mode():
        latents = (posterior.mean for posterior in vae.encode_stream(chunks(), **parts))
        for index, frames in enumerate(vae.decode_stream(latents, **parts)):
            num_frames += frames.shape[2]
            if index % 16 == 1:
                held.append(tensor_bytes())
    assert num_frames == 1025
    assert len(set(held)) == 1


def test_nothing_is_kept_on_the_model(vae):
    clip = noise(1, 3, 9, 16, 24)
    before = {name: value for module in vae.modules() for name, value in vars(module).items()}
    with torch.inference_mode():
        first = list(vae.encode_stream([clip]))
        interrupted = vae.encode_stream(iter([clip, clip]), tile=(8, 8))
        next(interrupted)
        again = list(vae.encode_stream([clip]))
    assert before.keys() == {name for module in vae.modules() for name in vars(module)}
    assert_equal(again[0].mean, first[0].mean)


def test_two_streams_do_not_disturb_each_other(vae):
    clips = noise(2, 1, 3, 9, 16, 24)
    with torch.inference_mode():
        streams = [vae.encode_stream(clip.split(4, dim=2), tile=(16, 16)) for clip in clips]
        pairs = list(itertools.zip_longest(*streams))
        for clip, parts in zip(clips, zip(*pairs, strict=True), strict=True):
            assert_equal(torch.cat([part.mean for part in parts], dim=2), vae.encode(clip).mean)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.zeros(1, 3, 4, 16, 8, dtype=torch.float64), "the previous ones have"),
        (torch.zeros(2, 3, 4, 16, 16, dtype=torch.float64), "the previous ones have"),
        (torch.zeros(1, 3, 4, 16, 16), "the previous ones have"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), "chunk has shape"),
    ],
)
def test_chunks_that_do_not_continue_the_clip_are_refused(vae, second, message):
    with pytest.raises(ValueError, match=message):
        list(vae.encode_stream([noise(1, 3, 1, 16, 16), second]))


def test_latents_that_do_not_continue_the_clip_are_refused(vae):
    first = noise(1, 4, 1, 2, 2)
    for second in (noise(1, 4, 1, 2, 3), noise(2, 4, 1, 2, 2), first.float()):
        with pytest.raises(ValueError, match=r"latent has shape .* the previous ones have"):
            list(vae.decode_stream([first, second]))
    with pytest.raises(ValueError, match=r"expected \(B, 4"):
        list(vae.decode_stream([noise(1, 5, 1, 2, 2)]))


def test_an_empty_stream_yields_nothing(vae):
    assert list(vae.encode_stream([])) == []
    assert list(vae.decode_stream([])) == []
