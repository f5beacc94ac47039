"""Tiles without loss and without recomputation: layer by layer a tile moves one token up and to the left.

Only the 3x3x3 convolutions look beyond a token, one token to each side. Tiles run in reading order. What a convolution
reads of the tiles above and to the left, these hand on: the last rows and columns that they read at this layer. What it
would need from below and from the right is not there yet, so its output ends one token earlier than its input, and the
next tile begins there. Every token thus passes every layer once, and behind the lower and right edge follow tiles
that only finish what is left. After all layers a tile has moved by the receptive field: 6 tokens to encode and 14 to
decode with the published depth. In time each tile has a past of its own, at each layer where the tile is by then.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck
from leanvae.config import LeanVAEConfig
from leanvae.naf import PAST_FRAMES, NAFLayers
from leanvae.ops import gradient_step, soft_threshold
from litevae.tiling import split_evenly

if TYPE_CHECKING:
    from leanvae.model import Decoder, Encoder

CONV_REACH = 2  # a convolution's output begins, as it ends, one token before its input: it reads two tokens before that

TilePast = tuple[Tensor | None, ...]  # of a tile, one a convolution; empty at the start of a clip


def encoder_halo(config: LeanVAEConfig) -> int:
    """Tokens that a latent looks beyond its own to each side: the convolutions on the longest path to it."""
    return config.num_stream_layers + config.num_fusion_layers


def decoder_halo(config: LeanVAEConfig) -> int:
    """Tokens that a decoded patch looks beyond its own to each side: the convolutions on the longest path to it."""
    transforms = 2 * config.ista_iterations * config.ista_layers if config.bottleneck == "ista" else 0
    return transforms + config.num_fusion_layers + config.num_stream_layers


class Span(NamedTuple):
    """Tokens `start` to `stop` of an axis of `length`; those outside the axis are not there."""

    start: int
    stop: int
    length: int

    def moved(self, steps: int) -> "Span":
        """The span `steps` tokens earlier."""
        return Span(self.start - steps, self.stop - steps, self.length)

    def extended(self, steps: int) -> "Span":
        """The span with `steps` tokens more at its start."""
        return Span(self.start - steps, self.stop, self.length)

    def last(self, steps: int) -> "Span":
        """The last `steps` tokens up to the span's end, be they its own or before it."""
        return Span(self.stop - steps, self.stop, self.length)

    @property
    def present(self) -> tuple[int, int]:
        """Start and stop of what lies on the axis."""
        return min(max(self.start, 0), self.length), min(max(self.stop, 0), self.length)

    @property
    def size(self) -> int:
        """How many tokens lie on the axis."""
        start, stop = self.present
        return stop - start

    def within(self, outer: "Span") -> slice:
        """Where this span lies in what holds `outer`."""
        (start, stop), (origin, _) = self.present, outer.present
        return slice(start - origin, stop - origin)


class Grid(NamedTuple):
    """Where tiles lie at the first layer; they run in reading order."""

    rows: list[Span]
    columns: list[Span]

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return len(self.rows) * len(self.columns)


def tile_grid(size: tuple[int, int], tile: tuple[int, int], halo: int) -> Grid:
    """Tiles that will have covered all tokens when they have moved by `halo`.

    Args:
        size: tokens (height, width) of a latent frame.
        tile: most tokens (height, width) of a tile.
        halo: `encoder_halo` or `decoder_halo`.
    """

    def spans(length: int, most: int) -> list[Span]:
        parts = [(0, length + halo)] if most >= length else split_evenly(length + halo, most)
        return [Span(start, stop, length) for start, stop in parts]

    return Grid(spans(size[0], tile[0]), spans(size[1], tile[1]))


class Placed(NamedTuple):
    """Tokens `(B, T, H, W, D)` and where on the frame they lie."""

    tokens: Tensor
    rows: Span
    columns: Span


class Tile:
    """A tile on its way through the layers: where it is, what its neighbours left for it, what it leaves for others.

    Attributes:
        rows, columns: where it is by now.
        below, right: what the tile below and the one to the right will read, in the order in which layers ask.
        future: the past of its next frames.
    """

    def __init__(
        self,
        rows: Span,
        columns: Span,
        above: Sequence[Tensor] = (),
        left: Sequence[Tensor] = (),
        past: TilePast | None = None,
    ) -> None:
        """Places a tile.

        Args:
            rows, columns: where it is at the first layer.
            above, left: `below` of the tile above and `right` of the one to the left; empty at the edge.
            past: `future` of its frames before, empty at the start of a clip; `None` if the clip is whole.
        """
        self.rows, self.columns = rows, columns
        self.below: list[Tensor] = []
        self.right: list[Tensor] = []
        self.future: list[Tensor | None] = []
        self._above, self._left = iter(above), iter(left)
        self._is_chunk = past is not None
        self._past = iter(past or ())

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it lies on the frame."""
        return not (self.rows.size and self.columns.size)

    def move(self, steps: int) -> None:
        """Goes up and to the left."""
        self.rows, self.columns = self.rows.moved(steps), self.columns.moved(steps)

    def cut(self, whole: Placed) -> Tensor:
        """What lies where the tile is."""
        return whole.tokens[:, :, self.rows.within(whole.rows), self.columns.within(whole.columns)]

    def join(self, x: Tensor, reach: int) -> Placed:
        """The tile's tokens `x` and the `reach` rows above and columns to the left of them, as far as there are any.

        As many of its own are left for the neighbours.
        """
        left, above = next(self._left, None), next(self._above, None)
        rows, columns = self.rows.extended(reach), self.columns.extended(reach)
        if left is not None:
            x = torch.cat((left, x), dim=3)
        self.right.append(x[:, :, :, self.columns.last(reach).within(columns)].clone())
        if above is not None:
            x = torch.cat((above, x), dim=2)
        self.below.append(x[:, :, self.rows.last(reach).within(rows)].clone())
        return Placed(x, rows, columns)

    def convolve(self, conv: nn.Module, residual: bool, x: Tensor) -> Tensor:
        """A convolution of the tile's tokens, by which it moves on one token."""
        joined = self.join(x, CONV_REACH)
        self.move(1)
        past = next(self._past, None)
        if self.is_empty:
            self.future.append(None)
            return self.cut(joined)
        if self._is_chunk and past is None:
            past = joined.tokens.new_zeros(len(joined.tokens), PAST_FRAMES, *joined.tokens.shape[2:])
        y, last_frames = conv(joined.tokens, past, residual)
        self.future.append(last_frames)
        # Outputs beyond where the tile is now lack a neighbour.
        return self.cut(joined._replace(tokens=y)).contiguous()


def run_tiles(run: Callable[[Tile], None], grid: Grid, pasts: list[TilePast] | None) -> list[TilePast]:
    """Takes all tiles of a chunk of frames through the layers, in reading order.

    Args:
        run: does so with one of them.
        grid: where they lie.
        pasts: of each tile, empty ones at the start of a clip; `None` if the clip is whole. The list is emptied on
            the way, so that memory never holds the old and the new past of more than one tile.

    Returns:
        The pasts for the next chunk.
    """
    future = []
    above: list[Sequence[Tensor]] = [()] * len(grid.columns)
    for rows in grid.rows:
        left: Sequence[Tensor] = ()
        for index, columns in enumerate(grid.columns):
            tile = Tile(rows, columns, above[index], left, None if pasts is None else pasts.pop(0))
            run(tile)
            above[index], left = tile.below, tile.right
            future.append(tuple(tile.future))
    return future


def run_layers(stack: NAFLayers, x: Tensor, tile: Tile) -> Tensor:
    """`NAFLayers` on the tokens `(B, T, h, w, D)` of a tile, which moves by the number of layers."""
    for conv, feedforward in zip(stack.convs, stack.feedforwards, strict=True):
        x = tile.convolve(conv, stack.residual, x)
        x = x if tile.is_empty else feedforward(x, stack.residual)
    return x


def _run_streams(streams: nn.ModuleDict, tokens: dict[str, Tensor], tile: Tile) -> dict[str, Tensor]:
    """The streams side by side, all from where the tile is."""
    place, outputs = (tile.rows, tile.columns), {}
    for name, x in tokens.items():
        tile.rows, tile.columns = place
        outputs[name] = run_layers(streams[name], x, tile)  # pyright: ignore[reportArgumentType]
    return outputs


def encode_tile(encoder: "Encoder", tokens: dict[str, Tensor], tile: Tile) -> Tensor:
    """`Encoder` after the embedding: tokens by stream of a tile, which moves, to features."""
    return run_layers(encoder.fusion, torch.cat(list(_run_streams(encoder.streams, tokens, tile).values()), -1), tile)


def recover_tile(bottleneck: nn.Module, z: Placed, tile: Tile) -> Tensor:
    """`recover` of either bottleneck: the latent of the whole frame to features of a tile, which moves."""
    if not isinstance(bottleneck, ISTABottleneck):
        return bottleneck.recover(tile.cut(z))[0]  # pyright: ignore[reportCallIssue]
    x = tile.cut(z) @ bottleneck.initial.T
    stacks = iter(bottleneck.causal_stacks)
    for step, threshold in zip(bottleneck.steps, bottleneck.thresholds, strict=True):
        forward, backward = next(stacks), next(stacks)
        x = gradient_step(x, tile.cut(z), bottleneck.phi, step)
        joined = tile.join(x, len(forward.convs) + len(backward.convs))  # where the tile will be, x is added again
        x = soft_threshold(run_layers(forward, x, tile), threshold)
        x = run_layers(backward, x, tile)
        x = tile.cut(joined) + x
    return x


def decode_tile(decoder: "Decoder", features: Tensor, tile: Tile) -> dict[str, Tensor]:
    """`Decoder` up to the projection: features of a tile, which moves, to tokens by stream."""
    features = run_layers(decoder.fusion, features, tile)
    parts = features.split(list(decoder.widths.values()), dim=-1)
    return _run_streams(decoder.streams, dict(zip(decoder.widths, parts, strict=True)), tile)
