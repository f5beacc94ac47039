"""Windows on an image: a model with a limited receptive field runs on parts, without loss or blended.

Lengths are in tokens, the elements of the latent. A window reads more tokens than its own. Without loss, it reads as
far around them as an output depends on its input, and drops its results for the others. If the receptive field is
unlimited, windows overlap and their outputs fade into each other linearly.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litevae.errors import InvalidInput

_OVERLAP = 4  # blended windows share at least this part of their length with each neighbour


class Window(NamedTuple):
    """A part of one axis.

    Attributes:
        start, stop: the tokens read.
        weights: weight of each in the output, `(stop - start,)`; over all windows they add up to one.
    """

    start: int
    stop: int
    weights: Tensor


def check_tile(tile: Any, patch: Sequence[int]) -> tuple[int, int]:
    """Return a tile in whole tokens `(h, w)`, not larger than requested.

    Args:
        tile: height and width in pixels.
        patch: height and width of a token in pixels.

    Raises:
        ValueError: `tile` is not two whole numbers, or less than a token.
    """
    try:
        height, width = (operator.index(size) for size in tile)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"tile is {tile!r}: expected two whole numbers, (height, width) in pixels") from error
    if height < patch[0] or width < patch[1]:
        raise InvalidInput(f"tile is {(height, width)}: expected at least one patch of {patch[0]}x{patch[1]} pixels")
    return height // patch[0], width // patch[1]


def split_evenly(length: int, size: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into as few parts of at most `size` as possible, of nearly equal length."""
    number = -(-length // size)
    bounds = [index * length // number for index in range(number + 1)]
    return list(itertools.pairwise(bounds))


def windows_with_halo(length: int, size: int, halo: int) -> list[Window]:
    """Return windows whose own parts tile the axis, each reading `halo` tokens further on either side, up to the ends.

    Args:
        length: tokens of the axis.
        size: most tokens of a window without its halo.
        halo: how far an output depends on the input.
    """
    windows = []
    for start, stop in split_evenly(length, size):
        first, last = max(0, start - halo), min(length, stop + halo)
        weights = torch.zeros(last - first)
        weights[start - first : stop - first] = 1
        windows.append(Window(first, last, weights))
    return windows


def blended_windows(length: int, size: int) -> list[Window]:
    """Return evenly spaced windows of `size` tokens (or all, if fewer) that overlap and fade linearly."""
    size = min(size, length)
    overlap = size // _OVERLAP
    number = -(-(length - overlap) // (size - overlap))
    starts = [round(index * (length - size) / max(1, number - 1)) for index in range(number)]
    weights = torch.zeros(number, length)
    position = torch.arange(size) + 0.5
    for index, start in enumerate(starts):
        fade = torch.ones(size)
        if index > 0:
            fade = fade.minimum(position / (starts[index - 1] + size - start))
        if index < number - 1:
            fade = fade.minimum((size - position) / (start + size - starts[index + 1]))
        weights[index, start : start + size] = fade
    weights /= weights.sum(0)  # more than two may overlap
    return [
        Window(start, start + size, part[start : start + size]) for start, part in zip(starts, weights, strict=True)
    ]


def run_in_windows(
    function: Callable[[Tensor, int], Tensor],
    x: Tensor,
    rows: Sequence[Window],
    columns: Sequence[Window],
    in_step: Sequence[int] = (1, 1),
    out_step: Sequence[int] = (1, 1),
) -> Tensor:
    """Run a function on windows of an image and add its outputs by their weights.

    Args:
        function: maps a part of `x` and its number, in reading order, to a part of the output.
        x: `(..., H, W)`.
        rows, columns: the windows of each axis.
        in_step: elements of `x` per token, in height and width.
        out_step: elements of the output per token, in height and width.

    Returns:
        The output, `(..., H', W')`.
    """
    out = None
    for number, window in enumerate((row, column) for row in rows for column in columns):
        y = function(x[_elements(window, in_step)], number)
        dtype = torch.promote_types(y.dtype, torch.float32)
        down, across = (
            part.weights.repeat_interleave(step).to(y.device, dtype)
            for part, step in zip(window, out_step, strict=True)
        )
        if out is None:
            out = y.new_zeros(*y.shape[:-2], rows[-1].stop * out_step[0], columns[-1].stop * out_step[1])
        out[_elements(window, out_step)] += (y * down.unsqueeze(-1) * across).to(y.dtype)
    assert out is not None
    return out


def _elements(window: tuple[Window, Window], step: Sequence[int]) -> tuple[Any, ...]:
    """Return the index of a window's elements, without those that padding would add at the end."""
    return (..., *(slice(part.start * size, part.stop * size) for part, size in zip(window, step, strict=True)))
