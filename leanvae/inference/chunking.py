"""Work in parts: a clip's frames chunk by chunk, each chunk tile by tile, equal to the whole.

The past of a chunk is a value: a function takes it and returns that of the next chunk. `None` stands for a whole clip,
which leaves none behind, and `()` for the start of a clip that comes in chunks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvae.inference.footprint import latent_frames
from leanvae.inference.plan import Plan
from leanvae.inference.tiles import (
    Placed,
    Span,
    Tile,
    decode_tile,
    decoder_halo,
    encode_tile,
    encoder_halo,
    recover_tile,
    run_tiles,
    tile_grid,
)
from leanvae.naf import PAST_FRAMES, NAFLayers, Past
from leanvae.patchify import stream_widths
from litevae.memory import return_freed_memory
from litevae.posterior import DiagonalGaussian
from litevae.tiling import blended_windows, run_in_windows

if TYPE_CHECKING:
    from leanvae.model import LeanVAE

ChunkPast = Any  # of a chunk: by stack, by tile or by window, whatever its plan makes it


def pad_to_patches(clip: Tensor, patch_size: Sequence[int], starts_clip: bool = True) -> Tensor:
    """Replicates the last frame, row and column of `(B, C, T, H, W)` until the patches divide the clip.

    If the clip starts here, its first frame stands outside the groups of `patch_size[0]` frames.
    """
    frames, height, width = clip.shape[2:]
    group, patch_height, patch_width = patch_size
    padding = (-width % patch_width, -height % patch_height, (int(starts_clip) - frames) % group)
    if not any(padding):
        return clip
    right, bottom, after = padding
    return F.pad(clip, (0, right, 0, bottom, 0, after), mode="replicate")


def _start(stacks: Sequence[NAFLayers], like: Tensor, size: Sequence[int]) -> tuple[Past, ...]:
    """The past at the start of a clip: zeros, for tokens of this (height, width)."""
    return tuple(
        tuple(like.new_zeros(len(like), PAST_FRAMES, *size, stack.dim) for _ in stack.convs) for stack in stacks
    )


def encode_chunk(vae: "LeanVAE", chunk: Tensor, past: ChunkPast, plan: Plan) -> tuple[DiagonalGaussian, ChunkPast]:
    """Encodes the next frames of a clip.

    Args:
        vae: the model.
        chunk: `(B, 3, t, H, W)` in [-1, 1].
        past: what the chunk before returned, which is used up; `()` at the start, `None` for a whole clip.
        plan: its tile and whether to blend.

    Returns:
        The posterior, whose `size` is the true `(t, H, W)`, and the past for the frames after these.
    """
    starts_clip = not past
    if plan.tile is None:
        return _encode_frames(vae, chunk, past, starts_clip)
    if plan.blend:
        return _encode_blended(vae, chunk, past, plan.tile)
    return _encode_tiles(vae, chunk, past, starts_clip, plan.tile)


def _encode_frames(
    vae: "LeanVAE", chunk: Tensor, past: ChunkPast, starts_clip: bool
) -> tuple[DiagonalGaussian, ChunkPast]:
    bands = vae.encoder.embedding.analyse(pad_to_patches(chunk, vae.config.patch_size, starts_clip), starts_clip)
    if past == ():
        past = _start(vae.encoder.causal_stacks, chunk, vae.latent_shape(chunk.shape[2:])[2:])
    features, future = vae.encoder(bands, past)
    return vae.posterior(features, tuple(chunk.shape[2:])), future


def _encode_tiles(
    vae: "LeanVAE", chunk: Tensor, pasts: ChunkPast, starts_clip: bool, tile_size: tuple[int, int]
) -> tuple[DiagonalGaussian, ChunkPast]:
    config = vae.config
    group, patch_height, patch_width = config.patch_size
    channels, _, *size = vae.latent_shape(chunk.shape[2:])
    frames = latent_frames(chunk.shape[2], group, starts_clip)
    mean, logvar = (chunk.new_empty(len(chunk), channels, frames, *size) for _ in range(2))

    def run(tile: Tile) -> None:
        return_freed_memory(chunk.device)
        (top, bottom), (left, right) = tile.rows.present, tile.columns.present
        if tile.is_empty:
            shape = (len(chunk), frames, bottom - top, right - left)
            tokens = {name: chunk.new_empty(*shape, width) for name, width in stream_widths(config).items()}
        else:
            part = chunk[..., top * patch_height : bottom * patch_height, left * patch_width : right * patch_width]
            part = pad_to_patches(part, config.patch_size, starts_clip)
            tokens = vae.encoder.embedding(vae.encoder.embedding.analyse(part, starts_clip))
            del part
        features = encode_tile(vae.encoder, tokens, tile)
        if not tile.is_empty:
            place = (..., slice(*tile.rows.present), slice(*tile.columns.present))
            posterior = vae.posterior(features)
            mean[place], logvar[place] = posterior.mean, posterior.logvar

    grid = tile_grid((size[0], size[1]), tile_size, encoder_halo(config))
    future = run_tiles(run, grid, [()] * grid.num_tiles if pasts == () else pasts)
    return DiagonalGaussian(mean, logvar, tuple(chunk.shape[2:])), future


def _encode_blended(
    vae: "LeanVAE", chunk: Tensor, pasts: ChunkPast, tile_size: tuple[int, int]
) -> tuple[DiagonalGaussian, ChunkPast]:
    """Encodes overlapping tiles as if each were the whole, and blends their parameters."""
    future = []

    def run(part: Tensor, number: int) -> Tensor:
        past = pasts if not pasts else pasts[number]
        posterior, after = _encode_frames(vae, part, past, starts_clip=not past)
        future.append(after)
        return torch.cat((posterior.mean, posterior.logvar), dim=1)

    _, _, *size = vae.latent_shape(chunk.shape[2:])
    rows, columns = (blended_windows(*sizes) for sizes in zip(size, tile_size, strict=True))
    mean, logvar = run_in_windows(run, chunk, rows, columns, in_step=vae.config.patch_size[1:]).chunk(2, dim=1)
    return DiagonalGaussian(mean, logvar, tuple(chunk.shape[2:])), future


def decode_chunk(vae: "LeanVAE", latent: Tensor, past: ChunkPast, plan: Plan, out: Tensor) -> ChunkPast:
    """Decodes the next latent frames of a clip.

    Args:
        vae: the model.
        latent: `(B, Z, t', H', W')`.
        past: as in `encode_chunk`.
        plan: its tile and whether to blend.
        out: where the frames go, `(B, 3, t, H, W)`; what padding they have beyond it is left out.

    Returns:
        The past for the latent frames after these.
    """
    starts_clip = not past
    if plan.tile is None:
        frames, future = _decode_frames(vae, latent, past, starts_clip)
        _place(frames, out)
        return future
    if plan.blend:
        return _decode_blended(vae, latent, past, plan.tile, out)
    return _decode_tiles(vae, latent, past, starts_clip, plan.tile, out)


def _place(frames: Tensor, out: Tensor, top: int = 0, left: int = 0) -> None:
    """Writes frames into a larger or smaller tensor, from row `top` and column `left` on."""
    out = out[..., top : top + frames.shape[3], left : left + frames.shape[4]]
    out.copy_(frames[:, :, : out.shape[2], : out.shape[3], : out.shape[4]])


def _decode_frames(vae: "LeanVAE", latent: Tensor, past: ChunkPast, starts_clip: bool) -> tuple[Tensor, ChunkPast]:
    tokens = latent.movedim(1, -1)
    stacks = [*vae.bottleneck.causal_stacks, *vae.decoder.causal_stacks]
    num_bottleneck = len(vae.bottleneck.causal_stacks)
    if past == ():
        past = _start(stacks, tokens, tokens.shape[2:4])
    whole = past is None
    features, bottleneck_past = vae.bottleneck.recover(tokens, None if whole else past[:num_bottleneck])
    bands, decoder_past = vae.decoder(features, None if whole else past[num_bottleneck:], starts_clip)
    return vae.decoder.projection.synthesise(bands), bottleneck_past + decoder_past


def _decode_tiles(
    vae: "LeanVAE", latent: Tensor, pasts: ChunkPast, starts_clip: bool, tile_size: tuple[int, int], out: Tensor
) -> ChunkPast:
    config = vae.config
    _, patch_height, patch_width = config.patch_size
    height, width = latent.shape[3:]
    z = Placed(latent.movedim(1, -1), Span(0, height, height), Span(0, width, width))

    def run(tile: Tile) -> None:
        return_freed_memory(latent.device)
        streams = decode_tile(vae.decoder, recover_tile(vae.bottleneck, z, tile), tile)
        if not tile.is_empty:
            bands = vae.decoder.projection(streams, starts_clip)
            frames = vae.decoder.projection.synthesise(bands)
            _place(frames, out, tile.rows.present[0] * patch_height, tile.columns.present[0] * patch_width)

    grid = tile_grid((height, width), tile_size, decoder_halo(config))
    return run_tiles(run, grid, [()] * grid.num_tiles if pasts == () else pasts)


def _decode_blended(
    vae: "LeanVAE", latent: Tensor, pasts: ChunkPast, tile_size: tuple[int, int], out: Tensor
) -> ChunkPast:
    """Decodes overlapping tiles as if each were the whole, and blends their pixels."""
    future = []

    def run(part: Tensor, number: int) -> Tensor:
        past = pasts if not pasts else pasts[number]
        frames, after = _decode_frames(vae, part, past, starts_clip=not past)
        future.append(after)
        return frames

    rows, columns = (blended_windows(*sizes) for sizes in zip(latent.shape[3:], tile_size, strict=True))
    _place(run_in_windows(run, latent, rows, columns, out_step=vae.config.patch_size[1:]), out)
    return future
