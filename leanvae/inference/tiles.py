"""Tiles without loss and without recomputation: with each layer a tile moves one token up and to the left.

Only the 3x3x3 convolutions read beyond a token, one token to each side. Tiles run in reading order. The tiles above and
to the left leave what a convolution reads of them: their last rows and columns at this layer. The tokens below and to
the right do not exist yet, so a convolution's output ends one token earlier than its input, and the next tile begins
there. Every token thus passes every layer once. Beyond the lower and right edge, additional tiles finish the rest.
After all layers a tile has moved by the receptive field: 6 tokens to encode and 14 to decode with the published depth.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanvae.config import LeanVAEConfig
from leanvae.network import Layers, parameters_of
from leanvae.patchify import clip_frames, latent_frames, pad_to_patches
from leanvae.surroundings import PAST_FRAMES, Past, Whole, last_frames
from litevae.memory import empty_cache, is_out_of_memory, return_freed_memory
from litevae.tiling import split_evenly

logger = logging.getLogger("leanvae")

CONV_REACH = 2  # tokens read before an input; the output begins and ends one token before it


def encoder_halo(config: LeanVAEConfig) -> int:
    """Count the tokens that a latent depends on beyond its own to each side: the convolutions on its longest path."""
    return config.num_stream_layers + config.num_fusion_layers


def decoder_halo(config: LeanVAEConfig) -> int:
    """Count the tokens that a decoded patch depends on beyond its own to each side, as `encoder_halo`."""
    transforms = 2 * config.ista_iterations * config.ista_layers if config.bottleneck == "ista" else 0
    return transforms + config.num_fusion_layers + config.num_stream_layers


class Span(NamedTuple):
    """Tokens `start` to `stop` of an axis of `length`; those outside the axis do not exist."""

    start: int
    stop: int
    length: int

    def moved(self, steps: int) -> "Span":
        """Return the span `steps` tokens earlier."""
        return Span(self.start - steps, self.stop - steps, self.length)

    def extended(self, steps: int) -> "Span":
        """Return the span with `steps` tokens more at its start."""
        return Span(self.start - steps, self.stop, self.length)

    def last(self, steps: int) -> "Span":
        """Return the last `steps` tokens up to the span's end, its own or those before it."""
        return Span(self.stop - steps, self.stop, self.length)

    @property
    def present(self) -> tuple[int, int]:
        """Start and stop of the part that lies on the axis."""
        return min(max(self.start, 0), self.length), min(max(self.stop, 0), self.length)

    @property
    def size(self) -> int:
        """Number of tokens that lie on the axis."""
        start, stop = self.present
        return stop - start

    def within(self, outer: "Span") -> slice:
        """Return this span's index within a tensor that holds `outer`."""
        (start, stop), (origin, _) = self.present, outer.present
        return slice(start - origin, stop - origin)


class TileGrid(NamedTuple):
    """The tiles' places at the first layer; tiles run in reading order."""

    rows: list[Span]
    columns: list[Span]


def tile_grid(size: tuple[int, int], tile: tuple[int, int], halo: int) -> TileGrid:
    """Lay tiles that have covered all tokens once they have moved by `halo`.

    Args:
        size: tokens (height, width) of a latent frame.
        tile: most tokens (height, width) of a tile.
        halo: `encoder_halo` or `decoder_halo`.
    """

    def spans(length: int, most: int) -> list[Span]:
        parts = [(0, length + halo)] if most >= length else split_evenly(length + halo, most)
        return [Span(start, stop, length) for start, stop in parts]

    return TileGrid(spans(size[0], tile[0]), spans(size[1], tile[1]))


class Placed(NamedTuple):
    """Tokens `(B, T, H, W, D)` and their place in the frame."""

    tokens: Tensor
    rows: Span
    columns: Span


class Tile(Whole):
    """A tile on its way through the layers: its place, its neighbours' borders, and the borders it leaves for others.

    Args:
        rows, columns: its place at the first layer.
        above, left: `below` of the tile above and `right` of the one to the left; empty at the edge.
        past: that of the whole frame, by number of the convolution, without those that start at zero; None if the
            clip is whole.
        before: `next_past` of this tile's previous frames, if there are any.

    Attributes:
        rows, columns: its current place.
        below, right: borders for the tile below and the one to the right, in the order in which layers read them.
        next_past: what each convolution leaves for the next frames at the tile's place; None if that is off the frame.
    """

    def __init__(
        self,
        rows: Span,
        columns: Span,
        above: Sequence[Tensor] = (),
        left: Sequence[Tensor] = (),
        past: Mapping[int, Tensor] | None = None,
        before: "Sequence[Placed | None]" = (),
    ) -> None:
        self.rows, self.columns = rows, columns
        self.below: list[Tensor] = []
        self.right: list[Tensor] = []
        self.next_past: list[Placed | None] = []
        self._above, self._left = iter(above), iter(left)
        self._past, self._before = past, before

    @property
    def is_empty(self) -> bool:
        """Whether the tile lies entirely outside the frame."""
        return not (self.rows.size and self.columns.size)

    @property
    def place(self) -> tuple[Any, ...]:
        """Index of its tokens in the last two axes of a frame."""
        return (..., slice(*self.rows.present), slice(*self.columns.present))

    def convolve(self, conv: Any, x: Tensor, residual: bool) -> Tensor:
        """Convolve the tile's tokens, which moves it by one token."""
        held = self.hold(x, CONV_REACH)
        self.rows, self.columns = self.rows.moved(1), self.columns.moved(1)
        if self.is_empty:
            self.next_past.append(None)
            return self.here(held)
        past = self._past_of(held)
        if past is not None:
            self.next_past.append(held._replace(tokens=last_frames(past, held.tokens)))
        y = conv(held.tokens, past, residual)
        # Outputs beyond the tile's new place lack a neighbour.
        return self.here(held._replace(tokens=y)).contiguous()

    def _past_of(self, held: Placed) -> Tensor | None:
        number, x = len(self.next_past), held.tokens
        if self._before:
            before = self._before[number]
            assert before is not None, "it was here"
            return before.tokens
        if self._past is None:
            return None
        if number not in self._past:
            return x.new_zeros(len(x), PAST_FRAMES, *x.shape[2:])
        return self._past[number][:, :, slice(*held.rows.present), slice(*held.columns.present)]

    def leave_past(self, past: dict[int, Tensor]) -> None:
        """Write its past for the next frames, except where a later tile still reads the old one."""
        for number, held in enumerate(self.next_past):
            if held is not None:
                x, spans = held.tokens, (held.rows, held.columns)
                if number not in past:
                    past[number] = x.new_zeros(*x.shape[:2], *(span.length for span in spans), x.shape[-1])
                rows, columns = (
                    span if span.stop > span.length else span._replace(stop=span.stop - CONV_REACH) for span in spans
                )
                place = (slice(None), slice(None), slice(*rows.present), slice(*columns.present))
                past[number][place] = x[:, :, rows.within(held.rows), columns.within(held.columns)]

    def side_by_side(self, stacks: Iterable[Any], tokens: list[Tensor]) -> list[Tensor]:
        """Run each stack on its tokens, all from the tile's current place."""
        place = (self.rows, self.columns)
        for index, stack in enumerate(stacks):
            self.rows, self.columns = place
            tokens[index] = stack(tokens[index], around=self)
        return tokens

    def hold(self, x: Tensor, num_convs: int) -> Placed:
        """Join the tile's tokens with the rows above and the columns to the left of them, if there are any.

        The same number of its own is left for the neighbours.
        """
        left, above = next(self._left, None), next(self._above, None)
        rows, columns = self.rows.extended(num_convs), self.columns.extended(num_convs)
        if left is not None:
            x = torch.cat((left, x), dim=3)
        self.right.append(x[:, :, :, self.columns.last(num_convs).within(columns)].clone())
        if above is not None:
            x = torch.cat((above, x), dim=2)
        self.below.append(x[:, :, self.rows.last(num_convs).within(rows)].clone())
        return Placed(x, rows, columns)

    def here(self, held: Placed) -> Tensor:
        """Cut out the part where the tile is now."""
        return held.tokens[:, :, self.rows.within(held.rows), self.columns.within(held.columns)]


class StoppedMidway(RuntimeError):
    """Memory ran out within a frame, with one latent frame at a time, so the past is partly that of the next frames."""


def run_tiles(
    run: Callable[[Tile, int, int], None], grid: TileGrid, past: dict[int, Tensor] | None, num_frames: int
) -> int:
    """Run all tiles of some latent frames through the layers, in reading order.

    If memory runs out, it continues with fewer latent frames at a time.

    Args:
        run: takes a tile and the first and last of its latent frames.
        grid: the tiles' places.
        past: that of the whole frame by convolution, overwritten with that of the next frames; None if the clip is
            whole.
        num_frames: number of latent frames.

    Returns:
        Latent frames that were possible at a time.

    Raises:
        StoppedMidway: memory ran out again, and the past is lost.
    """
    at_once, is_first = num_frames, True
    above: list[Sequence[Tensor]] = [()] * len(grid.columns)
    for rows in grid.rows:
        left: Sequence[Tensor] = ()
        for index, columns in enumerate(grid.columns):
            done: list[Tile] = []
            start = 0
            while start < num_frames:
                stop = min(num_frames, start + at_once)
                borders = [[x[:, start:stop] for x in side] for side in (above[index], left)]
                tile = Tile(rows, columns, borders[0], borders[1], past, done[-1].next_past if done else ())
                error = _error_of(lambda tile=tile, start=start, stop=stop: run(tile, start, stop))
                if error is None:
                    done.append(tile)
                    start = stop
                elif past is not None and stop - start > 1:
                    at_once = (stop - start) // 2
                    logger.warning("out of memory; continuing with %d latent frames at a time", at_once)
                    empty_cache()
                elif past is not None and not is_first:
                    raise StoppedMidway(f"out of memory with one latent frame of a tile at a time: {error}")
                else:
                    raise error
            above[index], left = (_in_turn([getattr(tile, side) for tile in done]) for side in ("below", "right"))
            if past is not None:
                done[-1].leave_past(past)
            is_first = False
    return at_once


def _error_of(work: Callable[[], None]) -> Exception | None:
    """Do work; return the error if memory ran out, without the tensors of its frames."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)
    return None


def _in_turn(borders: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Join the borders of consecutive frames."""
    return borders[0] if len(borders) == 1 else [torch.cat(parts, dim=1) for parts in zip(*borders, strict=True)]


def encode_tiles(
    layers: Layers, frames: Tensor, past: Past | None, tile_size: tuple[int, int], starts_clip: bool
) -> tuple[Tensor, Tensor, Past, int]:
    """Encode frames in tiles.

    Args:
        layers: the model's layers.
        frames: `(B, 3, t, H, W)` in [-1, 1], not padded.
        past: left by the previous frames, and overwritten; empty at the start of a clip; None if the clip is whole.
        tile_size: most tokens (height, width) of a tile.
        starts_clip: whether the first frame is the first of the clip.

    Returns:
        Mean and log-variance `(B, Z, t', H', W')`, the past of the next frames, and the latent frames that were
        possible at a time.
    """
    config = layers.config
    group, patch_height, patch_width = config.patch_size
    batch, _, count, height, width = frames.shape
    num_latent = latent_frames(count, group, starts_clip)
    size = (-(-height // patch_height), -(-width // patch_width))
    shape = (batch, config.latent_channels, num_latent, *size)
    mean, logvar = frames.new_empty(shape), frames.new_empty(shape)

    def run(tile: Tile, start: int, stop: int) -> None:
        return_freed_memory(frames.device)
        begins = starts_clip and not start
        first, last = (clip_frames(number, group, starts_clip) if number else 0 for number in (start, stop))
        (top, bottom), (left, right) = tile.rows.present, tile.columns.present
        if tile.is_empty:
            area = ((bottom - top) * patch_height, (right - left) * patch_width)
            pixels = frames.new_empty(batch, 3, last - first, *area)
        else:
            place = (slice(top * patch_height, bottom * patch_height), slice(left * patch_width, right * patch_width))
            pixels = pad_to_patches(frames[:, :, first:last, *place], config.patch_size, begins)
        # Not called as a module, which may be compiled: each tile's size and path would compile anew.
        features = layers.encoder.forward(pixels, around=tile, starts_clip=begins)
        if not tile.is_empty:
            mean[:, :, start:stop][tile.place], logvar[:, :, start:stop][tile.place] = parameters_of(layers, features)

    kept = None if past is None else dict(enumerate(past))
    at_once = run_tiles(run, tile_grid(size, tile_size, encoder_halo(config)), kept, num_latent)
    return mean, logvar, _as_past(kept), at_once


def decode_tiles(
    layers: Layers, latent: Tensor, past: Past | None, tile_size: tuple[int, int], starts_clip: bool, out: Tensor
) -> tuple[Past, int]:
    """Decode a latent `(B, Z, t', H', W')` in tiles into `out` `(B, 3, t, H, W)`, which may be smaller by the padding.

    The other arguments are those of `encode_tiles`.

    Returns:
        The past of the next frames, and the latent frames that were possible at a time.
    """
    group, patch_height, patch_width = layers.config.patch_size
    frames, height, width = latent.shape[2:]

    def run(tile: Tile, start: int, stop: int) -> None:
        return_freed_memory(latent.device)
        z = Placed(latent[:, :, start:stop].movedim(1, -1), Span(0, height, height), Span(0, width, width))
        features = layers.bottleneck.recover(z, around=tile)
        pixels = layers.decoder.forward(features, around=tile, starts_clip=starts_clip and not start)
        if not tile.is_empty:
            first = clip_frames(start, group, starts_clip) if start else 0
            part = out[:, :, first : first + pixels.shape[2]]
            write_frames(pixels, part, tile.rows.present[0] * patch_height, tile.columns.present[0] * patch_width)

    kept = None if past is None else dict(enumerate(past))
    at_once = run_tiles(run, tile_grid((height, width), tile_size, decoder_halo(layers.config)), kept, frames)
    return _as_past(kept), at_once


def _as_past(kept: dict[int, Tensor] | None) -> Past:
    return () if kept is None else tuple(kept[number] for number in sorted(kept))


def write_frames(frames: Tensor, out: Tensor, top: int = 0, left: int = 0) -> None:
    """Write frames into a larger or smaller tensor, from row `top` and column `left` on."""
    out = out[..., top : top + frames.shape[3], left : left + frames.shape[4]]
    out.copy_(frames[:, :, : out.shape[2], : out.shape[3], : out.shape[4]])
