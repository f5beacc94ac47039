"""Plans: how many latent frames at once, and in tiles of what size, so that memory suffices.

The feedforwards always run in blocks of tokens. To save more memory, plans take fewer frames at a time, then tiles. If
tiles are exact, neither changes a result, and both cost almost nothing, so the largest parts that fit are chosen.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from leanvae.config import LeanVAEConfig
from leanvae.inference.tiles import CONV_REACH, decoder_halo, encoder_halo, tile_grid
from leanvae.network import Layers
from leanvae.patchify import COLOURS, clip_frames, latent_frames, stream_widths
from leanvae.surroundings import PAST_FRAMES
from litevae.errors import InvalidInput
from litevae.memory import SHARE_OF_FREE, format_bytes, free_memory, parse_bytes
from litevae.tiling import check_tile

MOST_LATENT_FRAMES = 16  # of a stream at once, if memory is limited
PIXELS_AT_ONCE = 2**21  # of decoded frames to measure and write at a time, but at least one frame
LIMIT_ON_CPU = "6GiB"  # of encoding and decoding if none is given
_SMALLEST_TILE = 8  # tokens of a planned tile in each direction
# Measured share that glibc's heap loses to gaps between tensors. It keeps the memory of tensors of up to 32 MiB, and
# returns that of larger ones at once. Tiles, mostly those with neighbours to the side, differ in shape and leave the
# most gaps.
_LARGEST_IN_HEAP = 32 * 2**20
_MOST_LOST_OF_CHUNKS = 200e6
# Bytes of the feedforwards' blocks and of the libraries' caches.
_CONSTANT = 20e6

LoadName = Literal["encode", "decode"]


def _layers(config: LeanVAEConfig, name: LoadName) -> Iterator[tuple[int, int]]:
    """Yield, for each NAF layer, the number of convolutions before it, and its width."""
    widths, num_streams, num_fusion = stream_widths(config).values(), config.num_stream_layers, config.num_fusion_layers
    num_before = decoder_halo(config) - num_fusion - num_streams  # of the bottleneck
    if name == "encode":
        yield from ((index, width) for width in widths for index in range(num_streams))
        yield from ((num_streams + index, config.hidden_channels) for index in range(num_fusion))
    else:
        yield from ((index, config.hidden_channels) for index in range(num_before + num_fusion))
        yield from ((num_before + num_fusion + index, width) for width in widths for index in range(num_streams))


@dataclass(frozen=True)
class ClipLoad:
    """A clip to encode or decode.

    Attributes:
        name: `encode` or `decode`.
        config: the model's configuration.
        batch: number of clips.
        latent_frames: latent frames of a clip, or the most at once of a stream.
        height, width: tokens of a latent frame.
        item_size: bytes per element.
        is_stream: whether the output is not kept.
        is_prepared: whether the model is prepared for inference, which leaves the wavelet transform out.
    """

    name: LoadName
    config: LeanVAEConfig
    batch: int
    latent_frames: int
    height: int
    width: int
    item_size: int
    is_stream: bool = False
    is_prepared: bool = False

    def memory(self, latent_frames: int | None, tile: tuple[int, int] | None) -> int:
        """Estimate the peak bytes of inference on CPUs, without the input but with the heap's losses.

        Args:
            latent_frames: most latent frames at once; `None` for all, for which no past is kept.
            tile: most tokens (height, width) of a tile; `None` for whole frames.
        """
        frames = min(self.latent_frames, latent_frames or self.latent_frames)
        in_chunks = latent_frames is not None or self.is_stream
        own, read = self._tile_tokens(tile)
        alive = self._alive_encoding if self.name == "encode" else self._alive_decoding
        work = alive(frames, own, read, in_chunks, tile is not None)
        if tile is not None:
            work += self._borders(frames)
        held = self._kept + PAST_FRAMES * self._conv_channels * read if in_chunks else 0  # old and new past
        if self.name == "decode" and (tile is not None or in_chunks):  # the frames that are returned
            held += self._pixels(frames if self.is_stream else self.latent_frames, self.height * self.width)
        bytes_each = self.batch * self.item_size
        if tile is not None:
            is_strip = tile[1] >= self.width
            lost = work * (1.0 if is_strip else 2.6 if self.name == "encode" else 1.9) + 0.08 * held
        elif in_chunks:
            lost = min(_MOST_LOST_OF_CHUNKS / bytes_each, 0.3 * (work + held))
        else:
            is_in_heap = bytes_each * frames * own * self.config.hidden_channels < _LARGEST_IN_HEAP
            lost = 0.6 * work if self.is_prepared and is_in_heap else 0.0
        return round(_CONSTANT + bytes_each * (work + held + lost))

    @property
    def kept(self) -> int:
        """Bytes kept from chunk to chunk: the past of all convolutions."""
        return self.batch * self.item_size * self._kept

    @property
    def _kept(self) -> int:
        return PAST_FRAMES * self._conv_channels * self.height * self.width

    @property
    def _halo(self) -> int:
        return encoder_halo(self.config) if self.name == "encode" else decoder_halo(self.config)

    @property
    def _conv_channels(self) -> int:
        """Total channels of all convolutions."""
        return sum(width for _, width in _layers(self.config, self.name))

    def _tile_tokens(self, tile: tuple[int, int] | None) -> tuple[int, int]:
        """Count the tokens of (the largest tile of) a latent frame, and those that a convolution reads for it."""
        if tile is None:
            return self.height * self.width, self.height * self.width
        grid = tile_grid((self.height, self.width), tile, self._halo)
        own, read = (
            math.prod(max(span.extended(steps).size for span in spans) for spans in grid) for steps in (0, CONV_REACH)
        )
        return own, read

    def _pixels(self, frames: int, tokens: int) -> int:
        """Count the elements of the pixels of some latent frames."""
        group, height, width = self.config.patch_size
        is_start = not self.is_stream and frames == self.latent_frames
        return COLOURS * clip_frames(frames, group, is_start) * height * width * tokens

    # Elements alive at once, counted in the code: pixels while they are transformed, and tokens during a convolution,
    # which works on a frame at a time and, in chunks, copies its past.

    def _alive_encoding(self, frames: int, own: int, read: int, in_chunks: bool, is_tile: bool) -> float:
        pixels, width = self._pixels(frames, own), self.config.hidden_channels
        copies = 2 + 3 * in_chunks
        if is_tile:
            return max(4 * pixels, width * (2 * frames * own + (2 * frames + copies) * read))
        if in_chunks:
            return max(4 * pixels, pixels + width * (3 * frames + copies) * own)
        convolution = width * (3 * frames + copies) * own
        return convolution if self.is_prepared else max(5.3 * pixels, pixels + convolution)

    def _alive_decoding(self, frames: int, own: int, read: int, in_chunks: bool, is_tile: bool) -> float:
        pixels, width = self._pixels(frames, own), self.config.hidden_channels
        copies = 2 + 3 * in_chunks
        transform = 5 * pixels + width * frames * own
        if is_tile:
            return max(transform, width * (2 * frames * own + (3 * frames + copies) * read))
        if in_chunks:
            return max(transform, width * (5 * frames + copies) * own)
        convolution = width * (3 * frames + copies) * own
        return pixels + convolution if self.is_prepared else max(pixels + transform, convolution)

    def _borders(self, frames: int) -> int:
        """Count the elements that the tiles of a row leave for those below."""
        rows = CONV_REACH * self._conv_channels
        if self.name == "decode" and self.config.bottleneck == "ista":
            rows += self.config.ista_iterations * 2 * self.config.ista_layers * self.config.hidden_channels
        return rows * self.width * frames

    def __str__(self) -> str:
        frames = "a stream" if self.is_stream else f"{self.latent_frames} latent frames"
        return f"{frames} of {self.batch}x{self.height}x{self.width} tokens"


@dataclass(frozen=True)
class ClipPlan:
    """A way to cut work.

    Attributes:
        load: what is to be done.
        latent_frames: most latent frames at a time; `None` takes all that are available.
        tile: most tokens (height, width) of a tile; `None` takes whole frames.
        blend: whether tiles overlap, are computed as if each were the whole, and fade into each other.
    """

    load: ClipLoad
    latent_frames: int | None = None
    tile: tuple[int, int] | None = None
    blend: bool = False

    @property
    def memory(self) -> int:
        """Peak memory in bytes, without the input."""
        return self.load.memory(self.latent_frames, self.tile)

    def halved(self) -> "ClipPlan | None":
        """Return the largest plan with half the memory, or else the smallest one; None if this is it.

        Blended tiles keep their size, because each has its own past.
        """
        plans = [*_plans(self.load, False, self.blend, None, self.tile)]
        if not self.blend:
            plans += _plans(self.load, True, self.blend)
        smaller = [plan for plan in plans if plan.memory < self.memory]
        fitting = (plan for plan in smaller if plan.memory <= self.memory / 2)
        return next(fitting, min(smaller, key=lambda plan: plan.memory, default=None))

    def __str__(self) -> str:
        frames = "all" if self.latent_frames is None else str(self.latent_frames)
        tile = "whole frames" if self.tile is None else f"tiles of {self.tile[0]}x{self.tile[1]} tokens"
        return f"{frames} latent frames at a time, {tile}, about {format_bytes(self.memory)}"


class Parts(NamedTuple):
    """A caller's request for parts; `LeanVAE.encode` describes it."""

    tile: Any = None
    chunk: Any = None
    memory_limit: Any = None
    approximate: bool = False

    def are_wanted(self) -> bool:
        """Tell whether anything is requested; if not, work is done whole."""
        return not (self.tile is None and self.chunk is None and self.memory_limit is None)


def make_plan(load: ClipLoad, parts: Parts) -> ClipPlan:
    """Cut work as a caller requests; the default is one part.

    Raises:
        InvalidInput: an argument is wrong, tiles are requested or needed and not exact, or no plan fits the limit.
    """
    tile = None if parts.tile is None else check_tile(parts.tile, load.config.patch_size[1:])
    frames = None if parts.chunk is None else _check_chunk(parts.chunk, load)
    if tile is not None and tile[0] >= load.height and tile[1] >= load.width:
        tile = None
    reason = why_inexact(load.config)
    may_tile = reason is None or parts.approximate
    if tile is not None and not may_tile:
        raise InvalidInput(f"tile is {parts.tile}: not exact, because {reason}; approximate=True blends tiles")
    if parts.memory_limit is None:
        return ClipPlan(load, frames, tile, blend=reason is not None)
    if load.is_stream:
        frames = load.latent_frames  # more frames may arrive at once later
    limit = parse_bytes(parts.memory_limit)
    wanted = ClipPlan(load, frames, tile, blend=reason is not None)
    candidates = [wanted, *_plans(load, may_tile and parts.tile is None, wanted.blend, frames, tile)]
    smallest = min(candidates, key=lambda plan: plan.memory)
    plan = next((plan for plan in candidates if plan.memory <= limit), None)
    if plan is None:
        hint = "" if may_tile else f"; tiles, which would need less, are not exact, because {reason}"
        raise InvalidInput(
            f"memory_limit is {parts.memory_limit!r}: to {load.name} {load} needs at least "
            f"{format_bytes(smallest.memory)}{hint}"
        )
    return plan


def plan_reconstruction(
    vae: Any, width: int, height: int, chunk: int | None = None, memory_limit: int | None = None
) -> tuple[ClipPlan, ClipPlan]:
    """Plan to encode and decode a file's frames as streams, so that memory suffices for both.

    Both streams keep their pasts all the time, but only one of them computes at a time.

    Args:
        vae: a LeanVAE.
        width, height: size of the frames in pixels.
        chunk: most frames at a time.
        memory_limit: bytes; None means 90 % of a device's free memory, or on CPUs 6 GiB if so little suffices.

    Raises:
        InvalidInput: the limit cannot be kept, or the chunk is below 1.
    """
    weight, group = next(vae.parameters()), vae.config.patch_size[0]
    if chunk is not None and chunk < 1:
        raise InvalidInput(f"chunk is {chunk}: expected at least one frame")
    most = MOST_LATENT_FRAMES if chunk is None else max(1, chunk // group)
    _, _, rows, columns = vae.latent_shape((height, width))
    loads = (
        ClipLoad(name, vae.config, 1, most, rows, columns, weight.element_size(), is_stream=True)
        for name in ("encode", "decode")
    )
    may_tile = why_inexact(vae.config) is None
    pairs = list(zip(*(_plans(load, may_tile, not may_tile, most) for load in loads), strict=True))

    def memory(pair: tuple[ClipPlan, ClipPlan]) -> int:
        encoding, decoding = pair
        # Frames in float32 while they are measured; a chunk in bytes, and as the model's input and output.
        pixels = 40 * max(3 * width * height, 3 * PIXELS_AT_ONCE)
        pixels += 3 * width * height * group * (encoding.latent_frames or 1) * (2 + 2 * weight.element_size())
        return pixels + max(encoding.memory + decoding.load.kept, decoding.memory + encoding.load.kept)

    free = free_memory(weight.device)
    limit = memory_limit or (parse_bytes(LIMIT_ON_CPU) if free is None else int(SHARE_OF_FREE * free))
    smallest = min(pairs, key=memory)
    pair = next((pair for pair in pairs if memory(pair) <= limit), smallest)
    if memory_limit is not None and memory(pair) > memory_limit:
        raise InvalidInput(
            f"memory_limit is {format_bytes(memory_limit)}: to reconstruct frames of {width}x{height} needs about "
            f"{format_bytes(memory(pair))}"
        )
    return pair


def encoding_load(layers: Layers, clip: Tensor, is_stream: bool = False) -> ClipLoad:
    """Return the load of encoding a clip `(B, 3, T, H, W)`, or a stream that begins with it."""
    group, patch_height, patch_width = layers.config.patch_size
    batch, _, frames, height, width = clip.shape
    tokens = (latent_frames(frames, group), -(-height // patch_height), -(-width // patch_width))
    return _load("encode", layers, batch, tokens, clip.element_size(), is_stream)


def decoding_load(layers: Layers, latent: Tensor, is_stream: bool = False) -> ClipLoad:
    """Return the load of decoding a latent `(B, Z, T', H', W')`, or a stream that begins with it."""
    batch, _, *tokens = latent.shape
    return _load("decode", layers, batch, tokens, latent.element_size(), is_stream)


def _load(
    name: LoadName, layers: Layers, batch: int, tokens: Sequence[int], item_size: int, is_stream: bool
) -> ClipLoad:
    """Return a load; in a stream, any number of frames may arrive at once."""
    frames, height, width = tokens
    frames = MOST_LATENT_FRAMES if is_stream else frames
    is_prepared = layers.encoder.embedding.is_folded
    return ClipLoad(name, layers.config, batch, frames, height, width, item_size, is_stream, is_prepared)


def why_inexact(config: LeanVAEConfig) -> str | None:
    """Say why tiles give something else than the whole; return None if they are exact."""
    if config.wavelet in ("haar", "none"):
        return None
    return f"the wavelet {config.wavelet!r} is longer than Haar and reads across their borders"


def _check_chunk(chunk: Any, load: ClipLoad) -> int | None:
    """Return the latent frames of a chunk; None for all that are available."""
    try:
        frames = operator.index(chunk)
    except TypeError:
        frames = 0
    if frames < 1 or isinstance(chunk, bool):
        raise InvalidInput(f"chunk is {chunk!r}: expected a whole number of frames, at least 1")
    group = load.config.patch_size[0]
    if not load.is_stream and frames >= clip_frames(load.latent_frames, group):
        return None
    return max(1, frames // group)


def _plans(
    load: ClipLoad,
    may_tile: bool,
    blend: bool,
    frames: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Iterator[ClipPlan]:
    """Yield plans with ever smaller parts; given frames and tiles stay the same."""
    counts: list[int | None] = [frames]
    if frames is None or load.is_stream:
        counts += [2**power for power in reversed(range(16)) if 2**power < load.latent_frames]
    sizes = [tile, *(_tiles(load.height, load.width) if may_tile else ())]
    for size in sizes:
        for count in counts:
            yield ClipPlan(load, count, size, blend)


def _tiles(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield tiles of ever less height over the whole width, then of ever less width."""
    while height > _SMALLEST_TILE:
        height = max(_SMALLEST_TILE, height * 3 // 4)
        yield height, width
    while width > _SMALLEST_TILE:
        width = max(_SMALLEST_TILE, width // 2)
        yield height, width
