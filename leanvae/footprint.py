"""What work costs: the memory that it takes at its peak, and the operations of tiles over those of whole frames."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from leanvae.blocks import BLOCK_TOKENS
from leanvae.config import LeanVAEConfig
from leanvae.naf import PAST_FRAMES
from leanvae.patchify import COLOURS, stream_widths
from leanvae.tiling import CONV_REACH, decoder_halo, encoder_halo, tile_grid

# Bytes that a heap loses at most to gaps between tensors, of which it holds those below 32 MiB.
_MOST_LOST = 150e6

WorkName = Literal["encode", "decode"]


def latent_frames(frames: int, group: int, starts_clip: bool = True) -> int:
    """Latent frames of `frames` frames, of which the last group may be incomplete."""
    first = int(starts_clip)
    return first + -(-(frames - first) // group)


def clip_frames(latent_frames: int, group: int, starts_clip: bool = True) -> int:
    """Frames of `latent_frames` latent frames."""
    return group * latent_frames - (group - 1) * int(starts_clip)


def _layers(config: LeanVAEConfig, name: WorkName) -> Iterator[tuple[int, int]]:
    """The NAF layers: how many lie before each on the way to it, and its width."""
    widths, num_streams, num_fusion = stream_widths(config).values(), config.num_stream_layers, config.num_fusion_layers
    num_before = decoder_halo(config) - num_fusion - num_streams  # of the bottleneck
    if name == "encode":
        yield from ((index, width) for width in widths for index in range(num_streams))
        yield from ((num_streams + index, config.hidden_channels) for index in range(num_fusion))
    else:
        yield from ((index, config.hidden_channels) for index in range(num_before + num_fusion))
        yield from ((num_before + num_fusion + index, width) for width in widths for index in range(num_streams))


def relative_cost(config: LeanVAEConfig, name: WorkName, size: tuple[int, int], tile: tuple[int, int]) -> float:
    """Multiply-adds of all NAF layers in tiles over those in whole frames.

    Every token passes every feedforward once; a tile's convolutions also work on the tokens that neighbours left.

    Args:
        config: the model.
        name: of the work.
        size: tokens (height, width) of a latent frame.
        tile: tokens (height, width) of a tile.
    """
    grid = tile_grid(size, tile, encoder_halo(config) if name == "encode" else decoder_halo(config))
    whole = tiled = 0
    for num_before, width in _layers(config, name):
        rows, columns = (
            sum(span.moved(num_before).extended(CONV_REACH).size for span in spans if span.moved(num_before + 1).size)
            for spans in grid
        )
        feedforward, convolution = 3 * width * int(4 * 2 / 3 * width), 27 * width
        whole += math.prod(size) * (feedforward + convolution)
        tiled += math.prod(size) * feedforward + rows * columns * convolution
    return tiled / whole if whole else 1.0


@dataclass(frozen=True)
class Work:
    """A clip to encode or decode.

    Attributes:
        name: which of the two.
        config: the model.
        batch: number of clips.
        latent_frames: of a clip; of a stream, the most that are worked on at once.
        height, width: tokens of a latent frame.
        item_size: bytes of an element.
        is_stream: whether what is returned is not kept.
    """

    name: WorkName
    config: LeanVAEConfig
    batch: int
    latent_frames: int
    height: int
    width: int
    item_size: int
    is_stream: bool = False

    def memory(self, latent_frames: int | None, tile: tuple[int, int] | None) -> int:
        """Bytes at the peak, the input not counted: what inference on CPUs allocates, and what its heap loses.

        Args:
            latent_frames: most that are worked on at once; `None` for all, of which no past is kept.
            tile: most tokens (height, width) of a tile; `None` for whole frames.
        """
        frames = min(self.latent_frames, latent_frames or self.latent_frames)
        own, read = self._tile_tokens(tile)
        work = self._encoding(frames, own, read) if self.name == "encode" else self._decoding(frames, own, read)
        if tile is not None:  # what tiles leave for those below
            work += CONV_REACH * self.width * frames * self._conv_channels
        held = 0
        if latent_frames is not None or self.is_stream:
            # The past before and the one after: of the whole frame, or of a tile beside what all tiles keep.
            held = self._kept(tile) + PAST_FRAMES * self._conv_channels * read
        if self.name == "decode" and (tile is not None or latent_frames is not None or self.is_stream):
            held += self._pixels(frames if self.is_stream else self.latent_frames, self.height * self.width)
        lost = 0.25 * (work + held) if tile is None else 0.1 * self._halo * work
        bytes_each = self.batch * self.item_size
        block = self.item_size * BLOCK_TOKENS["cpu"] * 8 * self.config.hidden_channels  # of a feedforward
        return round(block + bytes_each * (work + held) + min(_MOST_LOST, bytes_each * lost))

    def kept(self, tile: tuple[int, int] | None) -> int:
        """Bytes of the past, which a stream keeps from chunk to chunk."""
        return self.batch * self.item_size * self._kept(tile)

    def _kept(self, tile: tuple[int, int] | None) -> int:
        tokens = self.height * self.width
        if tile is not None:
            grid = tile_grid((self.height, self.width), tile, self._halo)
            tokens = math.prod(sum(span.extended(CONV_REACH).size for span in spans) for spans in grid)
        return PAST_FRAMES * self._conv_channels * tokens

    @property
    def _halo(self) -> int:
        return encoder_halo(self.config) if self.name == "encode" else decoder_halo(self.config)

    @property
    def _conv_channels(self) -> int:
        """Channels of all convolutions together."""
        return sum(width for _, width in _layers(self.config, self.name))

    def _tile_tokens(self, tile: tuple[int, int] | None) -> tuple[int, int]:
        """Tokens of (a tile of) a latent frame, and those with what a convolution reads besides."""
        own, read = 1, 1
        for axis, length in enumerate((self.height, self.width)):
            size = min(length, tile[axis]) if tile is not None else length
            own, read = own * size, read * min(length, size + CONV_REACH)
        return own, read

    def _pixels(self, frames: int, tokens: int) -> int:
        """Elements of the frames of some latent frames."""
        group, height, width = self.config.patch_size
        is_start = not self.is_stream and frames == self.latent_frames
        return COLOURS * clip_frames(frames, group, is_start) * height * width * tokens

    # What is alive at once, counted in the code: pixels (P), tokens of the tile, and those that a convolution reads,
    # with two more frames of its past (`frames + 2`).

    def _encoding(self, frames: int, own: int, read: int) -> float:
        pixels, width = self._pixels(frames, own), self.config.hidden_channels
        transform = 5.6 * pixels
        convolution = 2 * pixels + width * (own * frames * (2 if own != read else 1) + read * (4 * frames + 2))
        return max(transform, convolution)

    def _decoding(self, frames: int, own: int, read: int) -> float:
        pixels, width = self._pixels(frames, own), self.config.hidden_channels
        is_tile = own != read
        transform = 5 * pixels + width * own * frames * (2 if is_tile else 1)
        convolution = width * (own * frames * (3 if is_tile else 2) + read * (4 * frames + 2))
        return max(transform, convolution)

    def __str__(self) -> str:
        frames = "a stream" if self.is_stream else f"{self.latent_frames} latent frames"
        return f"{frames} of {self.batch}x{self.height}x{self.width} tokens"
