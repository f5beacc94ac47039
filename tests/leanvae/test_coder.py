"""FrameCoder: clips and images through both models equal the whole at once, in bounded memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae import LeanVAE, LeanVAEConfig
from leanvae import coder as coder_module
from leanvae.coder import VAE, FrameCoder, Seams, to_model
from leanvae.inference.plan import ClipPlan, plan_reconstruction
from leanvae.media.info import Frame
from litevae import LiteVAE, LiteVAEConfig
from litevae.errors import InvalidInput, NotFinite

TINY: dict[str, Any] = {
    "low_channels": 4,
    "high_channels": 8,
    "num_stream_layers": 1,
    "num_fusion_layers": 1,
    "ista_layers": 1,
}
LITE: dict[str, Any] = {
    "extraction_channels": 4,
    "extraction_multipliers": (1,),
    "aggregation_channels": 4,
    "aggregation_multipliers": (1,),
    "decoder_channels": 4,
    "decoder_multipliers": (1, 1, 1, 1),
    "num_res_blocks": 1,
}


@pytest.fixture(scope="module", params=["lean", "lite"])
def vae(request: pytest.FixtureRequest) -> VAE:
    torch.manual_seed(0)
    if request.param == "lean":
        return LeanVAE(LeanVAEConfig(**TINY)).eval()
    return LiteVAE(LiteVAEConfig(**LITE)).eval()


@pytest.fixture
def lean() -> LeanVAE:
    torch.manual_seed(0)
    return LeanVAE(LeanVAEConfig(**TINY)).eval()


def _clip(frames: int, height: int = 20, width: int = 28, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


def _frames(clip: NDArray[np.uint8]) -> list[Frame]:
    return [Frame(image, index, index / 25) for index, image in enumerate(clip)]


@torch.inference_mode()
def _whole(vae: VAE, clip: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Latent `(Z, T', H', W')` and pixels `(T, 3, H, W)` in [0, 1] of a clip at once."""
    x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    if isinstance(vae, LeanVAE):
        latent = vae.encode(x).mode()
        decoded = vae.decode(latent, tuple(clip.shape[:3]))[0].transpose(0, 1)
    else:
        images = vae.encode(x[0].transpose(0, 1)).mode()
        decoded, latent = vae.decode(images, tuple(clip.shape[1:3])), images.transpose(0, 1)[None]
    return latent[0], ((decoded + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 7, 13, 18])
@pytest.mark.parametrize("chunk", [None, 1, 8])
def test_reconstruct_equals_the_whole_at_once(vae: VAE, num_frames: int, chunk: int | None) -> None:
    clip = _clip(num_frames)
    latent, expected = _whole(vae, clip)
    frames = _frames(clip)
    parts = list(FrameCoder(vae, chunk=chunk).reconstruct(iter(frames)))
    given = [frame for part in parts for frame in part.frames]
    assert all(ours is theirs for ours, theirs in zip(given, frames, strict=True))
    assert all(len(part.frames) == len(part.output) for part in parts)
    torch.testing.assert_close(torch.cat([part.output for part in parts]), expected, atol=1e-4, rtol=0)
    latents = [part.latent for part in parts if part.latent is not None]
    torch.testing.assert_close(torch.cat(latents, dim=1), latent, atol=1e-4, rtol=0)
    reference = torch.cat([part.reference for part in parts])
    assert torch.equal(reference, torch.from_numpy(clip).movedim(-1, 1).float() / 255)


def test_reconstruct_of_nothing_is_nothing(vae: VAE) -> None:
    assert list(FrameCoder(vae).reconstruct([])) == []


def test_reconstruct_reads_no_more_than_a_chunk_ahead(vae: VAE) -> None:
    num_read = 0

    def read() -> Iterator[Frame]:
        nonlocal num_read
        for frame in _frames(_clip(50)):
            num_read += 1
            yield frame

    num_given = 0
    for part in FrameCoder(vae, chunk=4).reconstruct(read()):
        assert num_read - num_given <= 5
        num_given += len(part.frames)
    assert num_given == 50


def test_outputs_are_no_larger_than_what_is_measured_at_once(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_module, "PIXELS_AT_ONCE", 3 * 20 * 28)
    parts = list(FrameCoder(vae).reconstruct(_frames(_clip(11))))
    assert max(len(part.output) for part in parts) == 3
    assert sum(len(part.output) for part in parts) == 11
    latent, _ = _whole(vae, _clip(11))
    assert sum(part.latent.shape[1] for part in parts if part.latent is not None) == latent.shape[1]


@pytest.mark.parametrize("pieces", [[18], [1, 17], [5, 1, 1, 1, 10], [3, 3, 3, 3, 3, 3]])
def test_a_clip_that_is_pushed_in_pieces_is_encoded_as_a_whole(vae: VAE, pieces: list[int]) -> None:
    clip = _clip(18)
    coder = FrameCoder(vae)
    whole = coder.encode([clip])
    stream = coder.encoder()
    with torch.inference_mode():
        ends = np.cumsum(pieces)
        pushed = [stream.push(to_model([piece], vae)) for piece in np.split(clip, ends[:-1])]
        found = [posterior for posterior in (*pushed, stream.finish()) if posterior is not None]
    for name in ("mean", "logvar"):
        parts = torch.cat([getattr(posterior, name) for posterior in found], dim=2)
        torch.testing.assert_close(parts, getattr(whole, name), atol=1e-4, rtol=0)


def test_clips_of_one_shape_are_encoded_together(vae: VAE) -> None:
    clips = [_clip(6, seed=seed) for seed in range(3)]
    together = FrameCoder(vae).encode(clips).mode()
    for clip, latent in zip(clips, together, strict=True):
        torch.testing.assert_close(latent, _whole(vae, clip)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_frames", [1, 7, 18])
def test_decode_crops_to_the_true_size(vae: VAE, num_frames: int) -> None:
    clip = _clip(num_frames)
    latent, expected = _whole(vae, clip)
    frames = torch.cat(list(FrameCoder(vae).decode(latent[None].split(2, dim=2), clip.shape[:3])))
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


def test_what_is_not_finite_is_refused(vae: VAE) -> None:
    latent, _ = _whole(vae, _clip(5))
    with pytest.raises(NotFinite, match="the decoder's output is not finite"):
        list(FrameCoder(vae).decode([latent[None] * float("nan")], (5, 20, 28)))


def test_bytes_become_the_models_range_and_type(vae: VAE) -> None:
    clips = [_clip(4, seed=seed) for seed in range(2)]
    x = to_model(clips, vae)
    expected = torch.from_numpy(np.stack(clips)).movedim(-1, 1).double() / 127.5 - 1
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, atol=2e-7, rtol=0)
    assert torch.equal(to_model([list(clip) for clip in clips], vae), x)
    assert to_model(clips, torch.nn.Linear(1, 1).bfloat16()).dtype == torch.bfloat16


def test_a_single_frame_takes_no_stream(lean: LeanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream keeps two frames for each convolution, many gigabytes for a large image, which needs none."""
    monkeypatch.delattr(coder_module, "EncoderStream")
    (part,) = FrameCoder(lean).reconstruct(_frames(_clip(1)))
    assert len(part.output) == 1


def test_seams_are_where_parts_begin(lean: LeanVAE) -> None:
    seams = Seams.between((14, 64, 64), [(16, 24), None, (32, 32)], first=5, chunk=4)
    assert seams == ({16, 32, 48}, {24, 32, 48}, {5, 9, 13})
    assert not any(Seams.between((14, 64, 64)))
    coder = FrameCoder(lean, chunk=8, tile=(16, 32))
    assert coder.seams(20, 48, 48) == ({16, 32}, {32}, {5, 13})
    assert coder.seams(1, 48, 48) == ({16, 32}, {32}, frozenset())
    assert not any(FrameCoder(lean).seams(1, 48, 48))


def test_planned_tiles_leave_the_result_as_it_is(lean: LeanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = _clip(9, 72, 88)
    plans = [ClipPlan(plan.load, 1, (4, 8)) for plan in plan_reconstruction(lean, 88, 72)]
    monkeypatch.setattr(coder_module, "plan_reconstruction", lambda *_: plans)
    coder = FrameCoder(lean)
    assert coder.seams(9, 72, 88) == ({32, 64}, {64}, {1, 5})
    output = torch.cat([part.output for part in coder.reconstruct(_frames(clip))])
    torch.testing.assert_close(output, _whole(lean, clip)[1], atol=1e-4, rtol=0)


def test_a_stream_that_runs_out_of_memory_makes_no_inexact_tiles() -> None:
    """Wavelets longer than Haar read across the borders of tiles; fewer frames at a time are exact."""
    vae = LeanVAE(LeanVAEConfig(**TINY, wavelet="db2"))
    for plan in plan_reconstruction(vae, 640, 480):
        smaller = plan.halved()
        while smaller is not None:
            assert smaller.tile is None
            smaller = smaller.halved()


def test_memory_limits_are_checked(lean: LeanVAE) -> None:
    with pytest.raises(InvalidInput, match="expected a positive number of bytes"):
        FrameCoder(lean, memory_limit="much")
    with pytest.raises(InvalidInput, match="to reconstruct frames of 28x20 needs"):
        list(FrameCoder(lean, memory_limit="1MiB").reconstruct(_frames(_clip(5))))
