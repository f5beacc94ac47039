"""Properties of the video autoencoder: sizes, causality, images as clips of one frame, streams."""

import itertools

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.patchify import from_patches, to_patches

SMALL = {
    "low_channels": 8,
    "high_channels": 16,
    "num_stream_layers": 1,
    "num_fusion_layers": 1,
    "ista_layers": 1,
}
VARIANTS = {
    "published": {},
    "smc": {"decoder_norm": "smc"},
    "patch 4x16x16": {"patch_size": (4, 16, 16)},
    "16 channels": {"latent_channels": 16},
    "linear bottleneck": {"bottleneck": "linear"},
    "joint streams": {"streams": "joint"},
    "no wavelet": {"wavelet": "none"},
    "patch norm": {"patch_norm": True},
    "db2": {"wavelet": "db2"},
    "one ista iteration": {"ista_iterations": 1},
}


def small_vae(**fields):
    """A small model whose weights are large enough that every path matters."""
    torch.manual_seed(0)
    vae = LeanVAE(LeanVAEConfig(**{**SMALL, **fields})).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return vae


def random_clip(*shape):
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def vae(request):
    return small_vae(**request.param)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_count():
    with torch.device("meta"):
        vae = LeanVAE()
    assert count(vae) == 39_767_496
    assert round(count(vae.encoder) / 1e6, 2) == 11.43
    assert round(count(vae.decoder) / 1e6, 2) == 11.43


@pytest.mark.parametrize("size", [(5, 16, 32), (1, 16, 16), (6, 17, 23), (8, 33, 16), (2, 9, 40)])
def test_clips_of_any_size_come_back_in_their_size(vae, size):
    posterior = vae.encode(random_clip(1, 3, *size))
    assert tuple(posterior.mean.shape[1:]) == vae.latent_shape(size)
    assert posterior.logvar.shape == posterior.mean.shape
    assert posterior.size == size
    assert vae.decode(posterior.mode(), size).shape == (1, 3, *size)


@pytest.mark.parametrize("size", [(16, 16), (17, 30)])
def test_images_of_any_size_come_back_in_their_size(vae, size):
    posterior = vae.encode(random_clip(2, 3, *size))
    assert tuple(posterior.mean.shape) == (2, *vae.latent_shape(size))
    assert posterior.mean.shape[2] == 1
    assert vae.decode(posterior.mode(), posterior.size).shape == (2, 3, *size)


def test_padding_replicates_the_last_frame_row_and_column():
    vae = small_vae()
    clip = random_clip(1, 3, 7, 13, 21)
    padded = torch.cat((clip, clip[:, :, -1:].expand(-1, -1, 2, -1, -1)), dim=2)
    padded = torch.cat((padded, padded[..., -1:, :].expand(-1, -1, -1, 3, -1)), dim=3)
    padded = torch.cat((padded, padded[..., -1:].expand(-1, -1, -1, -1, 3)), dim=4)
    torch.testing.assert_close(vae.encode(clip).mean, vae.encode(padded).mean, atol=0, rtol=0)
    latent = vae.encode(clip).mode()
    torch.testing.assert_close(vae.decode(latent, (7, 13, 21)), vae.decode(latent)[:, :, :7, :13, :21])


def test_first_latent_frame_is_that_of_the_first_frame_as_an_image(vae):
    clip = random_clip(1, 3, 9, 16, 16)
    of_clip, of_image = vae.encode(clip), vae.encode(clip[:, :, 0])
    torch.testing.assert_close(of_clip.mean[:, :, :1], of_image.mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(of_clip.logvar[:, :, :1], of_image.logvar, atol=1e-12, rtol=0)
    decoded = vae.decode(of_clip.mode())[:, :, 0]
    torch.testing.assert_close(decoded, vae.decode(of_image.mode(), (16, 16)), atol=1e-12, rtol=0)


def test_no_latent_sees_a_later_frame(vae):
    clip = random_clip(1, 3, 13, 16, 16).requires_grad_()
    latent = vae.encode(clip).mean
    for index in range(latent.shape[2]):
        (gradient,) = torch.autograd.grad(latent[:, :, index].sum(), clip, retain_graph=True)
        seen = gradient.abs().amax(dim=(0, 1, 3, 4))
        last = 4 * index
        assert (seen[last + 1 :] == 0).all(), f"latent frame {index} sees a frame after {last}"
        assert (seen[max(0, last - 3) : last + 1] > 0).all(), f"latent frame {index} misses a frame of its own"


def test_no_decoded_frame_sees_a_later_latent(vae):
    latent = torch.randn(1, *vae.latent_shape((13, 16, 16)), dtype=torch.float64, requires_grad=True)
    clip = vae.decode(latent)
    for frame in (0, 1, 4, 5, 12):
        (gradient,) = torch.autograd.grad(clip[:, :, frame].sum(), latent, retain_graph=True)
        seen = gradient.abs().amax(dim=(0, 1, 3, 4))
        own = -(-frame // 4)
        assert (seen[own + 1 :] == 0).all()
        assert seen[own] > 0


def test_gradients_reach_every_parameter(vae):
    clip = random_clip(1, 3, 5, 16, 16)
    noise = torch.randn(1, *vae.latent_shape((5, 16, 16)), dtype=torch.float64)
    reconstruction, posterior = vae(clip, noise)
    ((reconstruction - clip).abs().mean() + 1e-3 * posterior.kl().mean()).backward()
    missing = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    vae.zero_grad(set_to_none=True)
    assert not missing


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 9, 12])
def test_streams_equal_the_whole_clip(vae, num_frames):
    clip = random_clip(2, 3, num_frames, 17, 16)
    whole = vae.encode(clip)
    for sizes in ([1] * num_frames, [num_frames], [3] * (num_frames // 3) + [num_frames % 3 or 3] * 2):
        bounds = [min(stop, num_frames) for stop in itertools.accumulate(sizes, initial=0)]
        chunks = [clip[:, :, a:b] for a, b in itertools.pairwise(bounds) if b > a]
        posteriors = list(vae.encode_stream(iter(chunks)))
        latent = torch.cat([posterior.mean for posterior in posteriors], dim=2)
        torch.testing.assert_close(latent, whole.mean, atol=1e-10, rtol=0)
        assert sum(posterior.size[0] for posterior in posteriors) == num_frames
    decoded = vae.decode(whole.mean)
    for size in (1, 2, 5):
        frames = torch.cat(list(vae.decode_stream(iter(whole.mean.split(size, dim=2)))), dim=2)
        torch.testing.assert_close(frames, decoded, atol=1e-10, rtol=0)


def test_first_posterior_comes_after_the_first_frame():
    taken = []

    def frames():
        for index in range(9):
            taken.append(index)
            yield random_clip(1, 3, 1, 16, 16)

    stream = small_vae().encode_stream(frames())
    assert next(stream).mean.shape[2] == 1
    assert taken == [0]
    next(stream)
    assert taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_lower_precision_is_close_to_float64(dtype, tolerance):
    vae = small_vae()
    clip = random_clip(1, 3, 5, 16, 16)
    exact = vae.decode(vae.encode(clip).mode())
    vae = vae.to(dtype)
    posterior = vae.encode(clip.to(dtype))
    assert posterior.mean.dtype == dtype
    decoded = vae.decode(posterior.mode())
    assert decoded.dtype == dtype
    assert (decoded.double() - exact).abs().mean() < tolerance * exact.abs().mean()


def test_patches_go_back_to_where_they_came_from():
    x = random_clip(2, 6, 4, 8, 12)
    patches = to_patches(x, (2, 4, 4))
    assert patches.shape == (2, 2, 2, 3, 6 * 32)
    torch.testing.assert_close(from_patches(patches, (2, 4, 4)), x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 4, 16, 16), "expected"),
        (torch.zeros(3, 16, 16), "expected"),
        (torch.zeros(1, 3, 0, 16, 16), "expected"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating point"),
        (torch.full((1, 3, 16, 16), float("nan")), "not finite"),
        (torch.tensor([0.0, 255]).expand(1, 3, 2, 16, 2), r"from 0 to 255: .* pass x / 127\.5 - 1"),
    ],
)
def test_bad_pixels_are_refused(x, message):
    vae = small_vae()
    for call in (vae.encode, vae):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_bad_latents_and_sizes_are_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match=r"expected \(B, 4"):
        vae.decode(torch.zeros(1, 5, 1, 2, 2))
    latent = torch.zeros(1, 4, 2, 2, 2, dtype=torch.float64)
    for size in [(5, 16, 24), (9, 16, 16), (1, 16, 16), (16, 16), (5, 8, 16), (16,)]:
        with pytest.raises(ValueError, match="does not fit this latent"):
            vae.decode(latent, size)


def test_chunks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="the previous ones"):
        list(small_vae().encode_stream([random_clip(1, 3, 1, 16, 16), random_clip(1, 3, 4, 16, 8)]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_channels": 0}, "latent_channels"),
        ({"wavelet": "dbx"}, "pywt"),
        ({"wavelet": "none", "streams": "separate"}, "joint"),
        ({"patch_size": (3, 8, 8)}, "even"),
        ({"bottleneck": "vq"}, "ista"),
        ({"widths": 3}, "widths"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LeanVAEConfig(**fields)
