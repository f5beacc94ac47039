"""Clips in parts, in time: streams of any length, and whole clips that are worked on chunk by chunk."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from leanvae.inference.chunking import ChunkPast, decode_chunk, encode_chunk
from leanvae.inference.footprint import Work, clip_frames, latent_frames
from leanvae.inference.plan import MOST_LATENT_FRAMES, Parts, Plan, make_plan
from litevae.errors import InvalidInput
from litevae.memory import is_out_of_memory, retry_smaller
from litevae.pixels import check_pixels, crop
from litevae.posterior import DiagonalGaussian

if TYPE_CHECKING:
    from leanvae.model import LeanVAE

logger = logging.getLogger("leanvae")

OutputT = TypeVar("OutputT")


def encode_in_parts(vae: "LeanVAE", x: Tensor, parts: Parts) -> DiagonalGaussian:
    """`LeanVAE.encode` of an image or a clip in parts."""
    clip = x if x.ndim == 5 else x.unsqueeze(2)
    group = vae.config.patch_size[0]

    def run(plan: Plan) -> list[DiagonalGaussian]:
        past: ChunkPast = None if plan.latent_frames is None else ()
        posteriors, rest = [], clip
        while rest.shape[2]:
            part, rest = _split(rest, plan.latent_frames, group, starts_clip=not past)
            posterior, past = encode_chunk(vae, part, past, plan)
            posteriors.append(posterior)
        return posteriors

    plan = plan_encoding(vae, clip, parts)
    posteriors = retry_smaller(run, plan, Plan.halved, "encode")
    mean, logvar = (torch.cat([getattr(part, name) for part in posteriors], dim=2) for name in ("mean", "logvar"))
    return DiagonalGaussian(mean, logvar, tuple(x.shape[2:]))


def decode_in_parts(vae: "LeanVAE", latent: Tensor, size: Sequence[int] | None, parts: Parts) -> Tensor:
    """`LeanVAE.decode` in parts."""
    group, patch_height, patch_width = vae.config.patch_size
    _, _, frames, height, width = latent.shape
    padded = torch.empty(1, 1, clip_frames(frames, group), height * patch_height, width * patch_width, device="meta")
    true_size = padded.shape[2:] if size is None else (1, *size) if len(size) == 2 else tuple(size)
    crop(padded, true_size, vae.config.patch_size)  # refuses a wrong size

    def run(plan: Plan) -> Tensor:
        clip = latent.new_empty(len(latent), 3, *true_size)
        past: ChunkPast = None if plan.latent_frames is None else ()
        done = 0
        for part in latent.split(plan.latent_frames or frames, dim=2):
            count = clip_frames(part.shape[2], group, starts_clip=not past)
            past = decode_chunk(vae, part, past, plan, clip[:, :, done : done + count])
            done += count
        return clip

    plan = plan_decoding(vae, latent, parts)
    clip = retry_smaller(run, plan, Plan.halved, "decode")
    return clip[:, :, 0] if size is not None and len(size) == 2 else clip


def encode_stream(vae: "LeanVAE", chunks: Iterable[Tensor], parts: Parts) -> Iterator[DiagonalGaussian]:
    """`LeanVAE.encode_stream`."""
    group = vae.config.patch_size[0]

    def plan_for(clip: Tensor) -> Plan:
        return plan_encoding(vae, clip, parts, is_stream=True)

    def step(frames: Tensor, past: ChunkPast, plan: Plan) -> tuple[DiagonalGaussian, ChunkPast]:
        return encode_chunk(vae, frames, past, plan)

    return _run_stream(_whole_groups(chunks, group), group, step, plan_for, "encode_stream")


def decode_stream(vae: "LeanVAE", latents: Iterable[Tensor], parts: Parts) -> Iterator[Tensor]:
    """`LeanVAE.decode_stream`."""
    group, patch_height, patch_width = vae.config.patch_size

    def plan_for(latent: Tensor) -> Plan:
        return plan_decoding(vae, latent, parts, is_stream=True)

    def step(latent: Tensor, past: ChunkPast, plan: Plan) -> tuple[Tensor, ChunkPast]:
        batch, _, frames, height, width = latent.shape
        frames = clip_frames(frames, group, starts_clip=not past)
        out = latent.new_empty(batch, 3, frames, height * patch_height, width * patch_width)
        return out, decode_chunk(vae, latent, past, plan, out)

    return _run_stream(_alike(latents, vae.config.latent_channels), 1, step, plan_for, "decode_stream")


def plan_encoding(vae: "LeanVAE", clip: Tensor, parts: Parts, is_stream: bool = False) -> Plan:
    """The plan for encoding a clip `(B, 3, T, H, W)`, or a stream that begins with it."""
    _, frames, height, width = vae.latent_shape(clip.shape[2:])
    is_prepared = vae.encoder.embedding.prepared is not None
    work = Work("encode", vae.config, len(clip), frames, height, width, clip.element_size(), is_prepared=is_prepared)
    return make_plan(_as_stream(work) if is_stream else work, parts, clip.device)


def plan_decoding(vae: "LeanVAE", latent: Tensor, parts: Parts, is_stream: bool = False) -> Plan:
    """The plan for decoding a latent `(B, Z, T', H', W')`, or a stream that begins with it."""
    batch, _, frames, height, width = latent.shape
    is_prepared = vae.decoder.projection.prepared is not None
    work = Work("decode", vae.config, batch, frames, height, width, latent.element_size(), is_prepared=is_prepared)
    return make_plan(_as_stream(work) if is_stream else work, parts, latent.device)


def _as_stream(work: Work) -> Work:
    """Such work in a stream, of which any number of frames may arrive at once."""
    return replace(work, latent_frames=MOST_LATENT_FRAMES, is_stream=True)


def _run_stream(
    pieces: Iterable[Tensor],
    group: int,
    step: Callable[[Tensor, ChunkPast, Plan], tuple[OutputT, ChunkPast]],
    plan_for: Callable[[Tensor], Plan],
    name: str,
) -> Iterator[OutputT]:
    """Takes the pieces of a clip through the model as they come, by at most the plan's latent frames at a time.

    Args:
        pieces: parts `(B, C, t, H, W)` of the clip.
        group: of how many along `t` each latent frame but the first consists.
        step: works on a part; takes and returns the past.
        plan_for: makes the plan from the first piece.
        name: of the work, for the log.
    """
    past: ChunkPast = ()
    plan, was_halved = None, False
    for rest in pieces:
        plan = plan or plan_for(rest)
        while rest.shape[2]:
            part, after = _split(rest, plan.latent_frames, group, starts_clip=not past)
            try:
                output, past = step(part, past, plan)
            except (RuntimeError, MemoryError) as error:
                smaller = _halved_midway(plan, past, latent_frames(part.shape[2], group, starts_clip=not past))
                if was_halved or smaller is None or not is_out_of_memory(error):
                    raise
                logger.warning("%s: out of memory (%s); goes on with %s", name, str(error).splitlines()[0], smaller)
                plan, was_halved = smaller, True
                continue
            rest = after
            yield output
            del output


def _halved_midway(plan: Plan, past: ChunkPast, num_frames: int) -> Plan | None:
    """A smaller plan with which a stream can go on from its past.

    Args:
        plan: the one for which memory did not suffice.
        past: what there was before; if it is of tiles, it is used up.
        num_frames: latent frames of the part that failed.
    """
    if not past:
        return plan.halved()
    return replace(plan, latent_frames=num_frames // 2) if plan.tile is None and num_frames > 1 else None


def _split(piece: Tensor, count: int | None, group: int, starts_clip: bool) -> tuple[Tensor, Tensor]:
    """Cuts `(B, C, t, H, W)` after `count` latent frames, or at its end if there are fewer or it is `None`."""
    frames = piece.shape[2] if count is None else clip_frames(count, group, starts_clip)
    return piece[:, :, :frames], piece[:, :, frames:]


def _whole_groups(chunks: Iterable[Tensor], group: int) -> Iterator[Tensor]:
    """Passes frames on as soon as they fill groups of one latent frame each, and at the end what is left."""
    waiting: Tensor | None = None
    num_first = 1
    for chunk in chunks:
        _check_chunk(chunk, waiting)
        waiting = chunk if waiting is None else torch.cat((waiting, chunk), dim=2)
        ready = num_first + (waiting.shape[2] - num_first) // group * group
        if ready:
            yield waiting[:, :, :ready]
            waiting, num_first = waiting[:, :, ready:].clone(), 0
    if waiting is not None and waiting.shape[2]:
        yield waiting


def _check_chunk(chunk: Tensor, before: Tensor | None) -> None:
    """Raises `ValueError` unless `chunk` is a clip that continues the one before."""
    check_pixels(chunk)
    if chunk.ndim != 5:
        raise InvalidInput(f"chunk has shape {tuple(chunk.shape)}: expected (B, 3, t, H, W)")
    _check_alike("chunk", chunk, before)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raises `ValueError` unless this is a latent of so many channels."""
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise InvalidInput(f"latent has shape {tuple(latent.shape)}: expected (B, {channels}, T', H', W')")


def _alike(latents: Iterable[Tensor], channels: int) -> Iterator[Tensor]:
    """Passes latents on; raises `ValueError` if one does not continue those before."""
    before = None
    for latent in latents:
        check_latent(latent, channels)
        _check_alike("latent", latent, before)
        before = latent
        yield latent


def _check_alike(name: str, part: Tensor, before: Tensor | None) -> None:
    if before is None:
        return
    if part.dtype != before.dtype or any(part.shape[axis] != before.shape[axis] for axis in (0, 1, 3, 4)):
        batch, channels, _, height, width = before.shape
        raise InvalidInput(
            f"{name} has shape {tuple(part.shape)} and dtype {part.dtype}: the ones before have "
            f"({batch}, {channels}, any, {height}, {width}) and {before.dtype}"
        )
