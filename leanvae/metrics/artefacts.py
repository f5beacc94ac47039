"""Artefacts in time and space, measured by steps of the error e = reconstruction - reference between neighbours.

Steps of the picture would count edges of the content as artefacts.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 64  # side in pixels of the crop that shows block artefacts


@dataclass(frozen=True)
class Profile:
    """Sums of absolute steps of the error along one axis.

    Attributes:
        sums: sum of each step over pixels, colours and, in space, frames; step i lies between i and i + 1.
        count: values in each sum.
    """

    sums: Sequence[float]
    count: int


def border_score(profiles: Iterable[tuple[Profile, Collection[int]]]) -> float | None:
    """Return the error's mean absolute step at borders over that elsewhere: 1 if borders are invisible.

    Args:
        profiles: profile of each axis, with the indices where parts begin.

    Returns:
        The ratio; 1 if the error has no steps; None without borders, without anything else, or if all steps are at
        borders.
    """
    sums, counts = [0.0, 0.0], [0, 0]
    for profile, begins in profiles:
        for index, value in enumerate(profile.sums):
            at_border = index + 1 in begins
            sums[at_border] += value
            counts[at_border] += profile.count
    if not all(counts):
        return None
    elsewhere, at_borders = (total / count for total, count in zip(sums, counts, strict=True))
    if elsewhere == 0:
        return 1.0 if at_borders == 0 else None
    return at_borders / elsewhere


def grid_lines(size: int, period: int) -> set[int]:
    """Return the first index of each patch, except the first patch's."""
    return set(range(period, size, period))


@dataclass
class BlockWindow:
    """The part of a clip where blocks are most visible.

    Attributes:
        excess: mean absolute step of the error across the patch grid minus that elsewhere, within the window.
        frame: index of its frame.
        top, left: its corner in pixels.
        reference, output: `(3, h, w)` in [0, 1].
    """

    excess: float = -math.inf
    frame: int = 0
    top: int = 0
    left: int = 0
    reference: Tensor | None = None
    output: Tensor | None = None


class ErrorSteps:
    """Steps of a clip's error, summed frame by frame in constant memory.

    Args:
        height, width: size of the frames.
        period: side in pixels of the patches whose grid may be visible.
    """

    def __init__(self, height: int, width: int, period: int) -> None:
        self._size, self._period = (height, width), period
        self._rows, self._columns = (torch.zeros(max(0, size - 1), dtype=torch.float64) for size in (height, width))
        self._frames: list[float] = []
        self._last: Tensor | None = None
        self._num_frames = 0
        self.blocks = BlockWindow()

    def update(self, output: Tensor, reference: Tensor) -> None:
        """Add the next frames of the clip.

        Args:
            output: `(N, 3, H, W)` in [0, 1].
            reference: the same shape.
        """
        error = output - reference
        down, across = error.diff(dim=2).abs(), error.diff(dim=3).abs()
        self._rows += down.double().sum(dim=(0, 1, 3)).cpu()
        self._columns += across.double().sum(dim=(0, 1, 2)).cpu()
        in_time = error if self._last is None else torch.cat((self._last, error))
        self._frames += in_time.diff(dim=0).abs().double().sum(dim=(1, 2, 3)).tolist()
        self._last = error[-1:].clone()
        self._find_blocks(down.mean(1), across.mean(1), output, reference)
        self._num_frames += len(error)

    def _find_blocks(self, down: Tensor, across: Tensor, output: Tensor, reference: Tensor) -> None:
        """Keep the window where the grid is most visible, if it lies in these frames."""
        height, width = self._size
        sides = (min(WINDOW, height), min(WINDOW, width))
        if min(height, width) <= self._period:
            return
        excess = _pooled_excess(down, 1, self._period, sides) + _pooled_excess(across, 2, self._period, sides)
        best = int(excess.argmax())
        value = excess.flatten()[best].item()
        if value > self.blocks.excess:
            frame, row, column = (int(index) for index in torch.unravel_index(torch.tensor(best), excess.shape))
            top, left = row * _stride(sides[0]), column * _stride(sides[1])
            crop = (frame, slice(None), slice(top, top + sides[0]), slice(left, left + sides[1]))
            crops = (reference[crop].clone(), output[crop].clone())
            self.blocks = BlockWindow(value, self._num_frames + frame, top, left, *crops)

    def flicker(self) -> float | None:
        """Return the mean absolute difference of the temporal differences; None for a single frame.

        It is the mean over time, pixels and colours of |(y_t - y_(t-1)) - (x_t - x_(t-1))|, in units of [0, 1].
        """
        height, width = self._size
        return sum(self._frames) / (len(self._frames) * 3 * height * width) if self._frames else None

    def block_score(self) -> float | None:
        """Return the `border_score` of the patch grid."""
        height, width = self._size
        lines = [grid_lines(size, self._period) for size in (height, width)]
        return border_score(zip(self._in_space(), lines, strict=True))

    def tile_seam(self, rows: Collection[int], columns: Collection[int]) -> float | None:
        """Return the `border_score` of tiles, given the rows and columns where they begin."""
        return border_score(zip(self._in_space(), [rows, columns], strict=True))

    def chunk_seam(self, frames: Collection[int]) -> float | None:
        """Return the `border_score` of chunks in time, given the frames where they begin."""
        height, width = self._size
        return border_score([(Profile(self._frames, 3 * height * width), frames)])

    def _in_space(self) -> list[Profile]:
        height, width = self._size
        per_pixel = 3 * self._num_frames
        return [Profile(self._rows.tolist(), per_pixel * width), Profile(self._columns.tolist(), per_pixel * height)]


def _stride(side: int) -> int:
    return max(1, side // 2)


def _pooled_excess(steps: Tensor, axis: int, period: int, sides: tuple[int, int]) -> Tensor:
    """Return the mean step across the grid's lines minus that elsewhere, in half-overlapping windows.

    Args:
        steps: `(N, h, w)`, a row or a column shorter than the frame along `axis`, 1 or 2.
    """
    index = torch.arange(1, steps.shape[axis] + 1, device=steps.device)
    at_border = (index % period == 0).to(steps).reshape((-1, 1) if axis == 1 else (1, -1)).expand(steps.shape[1:])
    window = [side - (number + 1 == axis) for number, side in enumerate(sides)]

    def mean(mask: Tensor) -> Tensor:
        sums, counts = (
            F.avg_pool2d(values[:, None], window, [_stride(side) for side in sides])[:, 0]
            for values in (steps * mask, mask[None])
        )
        return sums / counts.clamp_min(torch.finfo(counts.dtype).tiny)

    return mean(at_border) - mean(1 - at_border)
