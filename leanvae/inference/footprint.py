"""What work costs: the memory that it takes at its peak, and the operations of tiles over those of whole frames."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from leanvae.config import LeanVAEConfig
from leanvae.inference.tiles import CONV_REACH, decoder_halo, encoder_halo, tile_grid
from leanvae.naf import PAST_FRAMES
from leanvae.patchify import COLOURS, stream_widths

# What glibc's heap loses to gaps between tensors, as measured. It keeps tensors of up to 32 MiB, and returns the memory
# of larger ones at once; tiles, above all those with neighbours to the side, differ in shape and leave the most gaps.
_LARGEST_IN_HEAP = 32 * 2**20
_MOST_LOST_OF_CHUNKS = 200e6
# Bytes of the feedforwards' blocks and of what libraries keep.
_CONSTANT = 20e6

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
        is_prepared: whether the model is prepared for inference, which leaves the wavelet transform out.
    """

    name: WorkName
    config: LeanVAEConfig
    batch: int
    latent_frames: int
    height: int
    width: int
    item_size: int
    is_stream: bool = False
    is_prepared: bool = False

    def memory(self, latent_frames: int | None, tile: tuple[int, int] | None) -> int:
        """Bytes at the peak, the input not counted: what inference on CPUs allocates, and what its heap loses.

        Args:
            latent_frames: most that are worked on at once; `None` for all, of which no past is kept.
            tile: most tokens (height, width) of a tile; `None` for whole frames.
        """
        frames = min(self.latent_frames, latent_frames or self.latent_frames)
        in_chunks = latent_frames is not None or self.is_stream
        own, read = self._tile_tokens(tile)
        alive = self._alive_encoding if self.name == "encode" else self._alive_decoding
        work = alive(frames, own, read, in_chunks, tile is not None)
        if tile is not None:
            work += self._borders(frames)
        held = self._kept(tile) + PAST_FRAMES * self._conv_channels * read if in_chunks else 0  # old and new past
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
        """Tokens of (the largest tile of) a latent frame, and those with what a convolution reads besides."""
        if tile is None:
            return self.height * self.width, self.height * self.width
        grid = tile_grid((self.height, self.width), tile, self._halo)
        own, read = (
            math.prod(max(span.extended(steps).size for span in spans) for spans in grid) for steps in (0, CONV_REACH)
        )
        return own, read

    def _pixels(self, frames: int, tokens: int) -> int:
        """Elements of the frames of some latent frames."""
        group, height, width = self.config.patch_size
        is_start = not self.is_stream and frames == self.latent_frames
        return COLOURS * clip_frames(frames, group, is_start) * height * width * tokens

    # What is alive at once, in elements, counted in the code: pixels while they are transformed, and tokens during a
    # convolution, which works on a frame at a time and in chunks copies its past beside it.

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
        """Elements that the tiles of a row leave for those below."""
        rows = CONV_REACH * self._conv_channels
        if self.name == "decode" and self.config.bottleneck == "ista":
            rows += self.config.ista_iterations * 2 * self.config.ista_layers * self.config.hidden_channels
        return rows * self.width * frames

    def __str__(self) -> str:
        frames = "a stream" if self.is_stream else f"{self.latent_frames} latent frames"
        return f"{frames} of {self.batch}x{self.height}x{self.width} tokens"
