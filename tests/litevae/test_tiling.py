"""Tiles of the image autoencoder, the windows that they read, and the forms of memory limits."""

import logging
import random

import pytest
import torch

from litevae import LiteVAE, LiteVAEConfig
from litevae import memory as memory_module
from litevae.memory import format_bytes, is_out_of_memory, parse_bytes, retry_smaller
from litevae.planner import ImageLoad, ImagePlan, make_plan
from litevae.receptive import decoder_halo, encoder_halo, why_decoder_inexact, why_encoder_inexact
from litevae.tiling import blended_windows, check_tile, run_in_windows, split_evenly, windows_with_halo

SMALL = {
    "extraction_channels": 4,
    "extraction_multipliers": (1, 2),
    "aggregation_channels": 4,
    "aggregation_multipliers": (1,),
    "decoder_channels": 4,
    "num_res_blocks": 1,
}
CONVOLUTIONAL = {"encoder_norm": "smc", "decoder_norm": "smc", "decoder_attention": False}
EXACT = {
    "convolutional": {},
    "two levels": {"levels": (1, 2)},
    "finest level": {"levels": (1,), "extraction_multipliers": (1,)},
    "shared": {"shared_extraction": True},
    "bands": {"output_type": "wavelet"},
    "latent_conv": {"latent_conv": True},
    "dwt": {"encoder": "dwt", "latent_channels": 12},
    "dwt2": {"encoder": "dwt2", "latent_channels": 48},
}
INEXACT_ENCODERS = {
    "GroupNorm": {},
    "sd encoder's GroupNorm and attention": {"encoder": "sd", "encoder_channels": 8},
    "NAFNet's channel attention": {"extraction": "naf"},
    "transformer's attention": {"aggregation": "vit", "vit_grid": (8, 8)},
}
INEXACT_DECODERS = {"GroupNorm": {}, "attention in the decoder's middle": {"decoder_norm": "smc"}}


def make(**fields):
    torch.manual_seed(0)
    return LiteVAE(LiteVAEConfig(**SMALL | fields)).double().eval()


def images(*shape):
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def assert_equal(actual, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual / scale, expected / scale, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", EXACT)
def test_tiles_equal_the_whole_at_random_sizes(variant):
    vae = make(**CONVOLUTIONAL | EXACT[variant])
    draw = random.Random(variant)
    with torch.inference_mode():
        for _ in range(2):
            size = draw.randint(1, 300), draw.randint(1, 300)
            tile = draw.randint(60, 200), draw.randint(60, 200)
            x = images(draw.randint(1, 2), 3, *size)
            whole, posterior = vae.encode(x), vae.encode(x, tile=tile)
            assert_equal(posterior.mean, whole.mean)
            assert_equal(posterior.logvar, whole.logvar)
            assert posterior.size == size
            assert_equal(vae.decode(whole.mean, size, tile=tile), vae.decode(whole.mean, size))


def test_default_halos_are_60_and_18_elements():
    assert encoder_halo(LiteVAEConfig()) == 60
    assert decoder_halo(LiteVAEConfig()) == 18


@pytest.mark.parametrize("variant", EXACT)
def test_halo_is_as_wide_as_it_must_be_and_no_wider(variant):
    """A pixel at the halo's end changes an element of the latent, and one further does not; the same for decoding."""
    vae = make(**CONVOLUTIONAL | EXACT[variant])
    for name, halo in (("encode", encoder_halo(vae.config)), ("decode", decoder_halo(vae.config))):
        centre = halo + 2
        length = 2 * centre + 1
        if name == "encode":
            source = images(1, 3, 8, 8 * length).requires_grad_()
            seen_from = vae.encode(source).mean[..., centre]
        else:
            source = torch.randn(1, vae.config.latent_channels, 1, length, dtype=torch.float64, requires_grad=True)
            seen_from = vae.decode(source)[..., 8 * centre : 8 * centre + 8]
        (gradient,) = torch.autograd.grad(seen_from.abs().sum(), source)
        reached = gradient.abs().amax((0, 1, 2)).view(length, -1).amax(1)
        assert (reached[[centre - halo, centre + halo]] > 0).all(), name
        assert (reached[[centre - halo - 1, centre + halo + 1]] == 0).all(), name


@pytest.mark.parametrize("reason", INEXACT_ENCODERS)
def test_encoders_that_read_the_whole_image_refuse_tiles_unless_blended(reason):
    vae = make(**INEXACT_ENCODERS[reason])
    assert reason in (why_encoder_inexact(vae.config) or "")
    x = images(1, 3, 64, 96)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=rf"tile is \(64, 64\): not exact, because .*{reason}"):
            vae.encode(x, tile=(64, 64))
        blended = vae.encode(x, tile=(64, 64), approximate=True).mean
        assert blended.shape == (1, 4, 8, 12)
        # The windows are columns 0 to 8 and 4 to 12: those that one alone reads are its own.
        assert_equal(blended[..., 8:], vae.encode(x[..., 32:]).mean[..., 4:])
        assert_equal(vae.encode(x[..., :64], tile=(64, 64)).mean, vae.encode(x[..., :64]).mean)  # one is the whole


@pytest.mark.parametrize("reason", INEXACT_DECODERS)
def test_decoders_that_read_the_whole_image_refuse_tiles_unless_blended(reason):
    vae = make(**INEXACT_DECODERS[reason])
    assert reason in (why_decoder_inexact(vae.config) or "")
    latent = torch.randn(1, 4, 8, 12, dtype=torch.float64)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=rf"not exact, because .*{reason}"):
            vae.decode(latent, tile=(64, 64))
        blended = vae.decode(latent, (63, 95), tile=(64, 64), approximate=True)
        assert blended.shape == (1, 3, 63, 95)
        assert_equal(blended[..., :32], vae.decode(latent[..., :8])[..., :63, :32])


def test_blended_windows_fade_linearly_and_add_up_to_one():
    first, second = blended_windows(12, 8)
    torch.testing.assert_close(first.weights, torch.tensor([1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(second.weights, first.weights.flip(0))
    for length in range(1, 40):
        for size in range(1, 20):
            total = torch.zeros(length)
            for window in blended_windows(length, size):
                assert window.stop - window.start == len(window.weights) == min(size, length)
                total[window.start : window.stop] += window.weights
            torch.testing.assert_close(total, torch.ones(length))


def test_tiles_of_one_element_equal_the_whole():
    vae = make(**CONVOLUTIONAL)
    x = images(1, 3, 30, 20)
    with torch.inference_mode():
        whole = vae.encode(x)
        assert_equal(vae.encode(x, tile=(8, 8)).mean, whole.mean)
        assert_equal(vae.decode(whole.mean, tile=(8, 8)), vae.decode(whole.mean))


def test_windows_with_halo_keep_every_element_once():
    for length, size, halo in [(1, 1, 0), (20, 6, 3), (7, 9, 2), (30, 1, 40)]:
        total = torch.zeros(length)
        for window in windows_with_halo(length, size, halo):
            assert 1 <= window.weights.sum() <= size
            total[window.start : window.stop] += window.weights
        assert (total == 1).all()
    assert split_evenly(10, 4) == [(0, 3), (3, 6), (6, 10)]


def test_windows_put_together_what_a_local_function_computes():
    x = torch.randn(2, 3, 5, 22, 31, dtype=torch.float64)
    for windows in (blended_windows, lambda length, size: windows_with_halo(length, size, 2)):
        numbers = []

        def double(part, number, numbers=numbers):
            numbers.append(number)
            return 2 * part

        torch.testing.assert_close(run_in_windows(double, x, windows(22, 8), windows(31, 9)), 2 * x, atol=1e-6, rtol=0)
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((7, 8), r"tile is \(7, 8\): expected at least one patch of 8x8 pixels"),
        ((8,), r"tile is \(8,\): expected two whole numbers"),
        (8, "tile is 8: expected two whole numbers"),
        ("ab", "tile is 'ab': expected two whole numbers"),
        ((8.0, 8), "expected two whole numbers"),
    ],
)
def test_bad_tiles_are_refused(tile, message):
    with pytest.raises(ValueError, match=message):
        make(**CONVOLUTIONAL).encode(images(1, 3, 32, 32), tile=tile)


def test_tiles_are_rounded_down_to_whole_elements():
    assert check_tile((23, 40), (8, 16)) == (2, 2)


def work(name="decode", batch=1, height=135, width=240, **fields):
    return ImageLoad(name, LiteVAEConfig(**CONVOLUTIONAL | fields), batch, height, width, 4)


def limited(work, limit, approximate=False):
    return make_plan(work, None, limit, approximate, torch.device("cpu"))


def test_plans_take_fewer_images_and_then_tiles():
    eight = work(batch=8)
    assert limited(eight, "100GiB") == ImagePlan(eight, 8)
    assert limited(eight, "20GiB").images < 8
    assert limited(eight, "20GiB").tile is None
    small = limited(eight, "5GiB")
    assert small.images == 1
    assert small.tile is not None
    assert small.tile[1] == 240
    assert small.memory <= 5 * 2**30


def test_decoding_1080p_within_6_gib_costs_at_most_a_third_more():
    plan = limited(work(), "6GiB")
    assert plan.tile is not None
    rows, columns = (sum(window.stop - window.start for window in part) for part in plan.load.windows(plan.tile))
    assert 1 < rows * columns / (plan.load.height * plan.load.width) <= 1.3
    assert limited(work("encode"), "6GiB").tile is None


def test_results_do_not_depend_on_the_limit():
    vae = make(**CONVOLUTIONAL)
    x = images(3, 3, 800, 120)
    with torch.inference_mode():
        latent = vae.encode(x).mean
        for run, whole in ((vae.encode, x), (vae.decode, latent)):
            name = "encode" if whole is x else "decode"
            memory = ImagePlan(ImageLoad(name, vae.config, 3, 100, 15, 8), 1).memory
            results = [run(whole, memory_limit=limit) for limit in (2**40, 2 * memory, int(0.8 * memory))]
            first, *others = (result if isinstance(result, torch.Tensor) else result.mean for result in results)
            for other in others:
                assert_equal(other, first)


def test_limits_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="memory_limit is '1MiB': to encode images of 135x240 latent elements needs"):
        limited(work("encode"), "1MiB")
    with pytest.raises(ValueError, match="tiles, which would need less, are not exact, because GroupNorm"):
        limited(work(decoder_norm="group"), "1GiB")
    assert limited(work(decoder_norm="group"), "1GiB", approximate=True).tile is not None


def test_running_out_of_memory_is_logged_and_tried_once_more(monkeypatch, caplog):
    vae = make(**CONVOLUTIONAL)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        whole = vae.encode(x).mean
        encode, sizes = vae._encode, []

        def fail_first(part):
            sizes.append(len(part))
            if len(sizes) == 1:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
            return encode(part)

        monkeypatch.setattr(vae, "_encode", fail_first)
        with caplog.at_level(logging.WARNING, logger="leanvae"):
            assert_equal(vae.encode(x, memory_limit="1GiB").mean, whole)
    assert sizes[0] == 2
    assert set(sizes[1:]) == {1}
    assert "encode: out of memory" in caplog.text


def test_retry_gives_up_where_nothing_is_smaller():
    def fail(plan):
        raise torch.OutOfMemoryError(f"CUDA out of memory with {plan}")

    with pytest.raises(torch.OutOfMemoryError, match="with 3"):
        retry_smaller(fail, 3, lambda plan: None, "work")
    with pytest.raises(torch.OutOfMemoryError, match="with 2"):
        retry_smaller(fail, 3, lambda plan: plan - 1, "work")
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6GiB", 6 * 2**30),
        ("512MiB", 2**29),
        ("6GB", 6 * 10**9),
        ("1.5 kB", 1500),
        (" 2 tib ", 2**41),
        ("123", 123),
        ("7B", 7),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "6 apples", "-1GiB", "1e9", 0, -5, 1.5, None, True, "0", "6GiBs"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"memory_limit is .*: expected a positive number of bytes"):
        parse_bytes(text)


def test_sizes_are_written():
    assert format_bytes(6 * 2**30) == "6.00 GiB"
    assert format_bytes(300 * 2**20) == "300 MiB"


def test_free_memory_is_known_of_devices_alone():
    assert memory_module.free_memory(torch.device("cpu")) is None
