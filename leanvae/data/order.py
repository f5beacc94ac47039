"""The order of training samples: pure functions of the seed, the epoch and the position.

A *position* counts samples from the start of training over all ranks; a training step takes the next ones, as many
as its phase's batch. Ranks take slices of it, so the order is the same on any number of them, and resuming is to
start at a later position. The text says clips; images are ordered the same way.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Separate the random streams that share a seed.
_SHUFFLE, _PERMUTATION, _SUBSTITUTE = 1, 2, 3


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch size and one resolution.

    Attributes:
        first_step: its first training step.
        first_position: position of that step's first sample.
        steps: how many steps it has; the last phase of a run goes on for ever.
        batch_size: samples a step, of all ranks together.
        resolution: (height, width) in pixels.
    """

    first_step: int
    first_position: int
    steps: int
    batch_size: int
    resolution: tuple[int, int]

    def position(self, step: int, index: int) -> int:
        """The position of a step's sample ``index``, for steps of this phase."""
        return self.first_position + (step - self.first_step) * self.batch_size + index


def phases_of(stretches: Iterable[tuple[int, int, tuple[int, int]]]) -> tuple[Phase, ...]:
    """Lays phases one behind the other; no position is left out or taken twice between them.

    Args:
        stretches: (steps, batch size, resolution) of each.

    Raises:
        ValueError: no phases, or a number of steps, batch size, height or width below 1.
    """
    phases: list[Phase] = []
    step = position = 0
    for steps, batch_size, resolution in stretches:
        if min(steps, batch_size, *resolution) < 1:
            raise ValueError(
                f"phase {len(phases)}: steps, batch size, height and width must be at least 1, "
                f"got {steps}, {batch_size}, {resolution[0]} and {resolution[1]}"
            )
        phases.append(Phase(step, position, steps, batch_size, resolution))
        step += steps
        position += steps * batch_size
    if not phases:
        raise ValueError("expected at least one phase")
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that a step belongs to: the last one also for the steps behind its end.

    Raises:
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"steps count from 0, got {step}")
    return phases[bisect_right([phase.first_step for phase in phases], step) - 1]


def source_shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Splits an epoch's length, sum(sizes), over the sources by weight, by largest remainder.

    Raises:
        ValueError: a size or weight that is not positive, or lists of different lengths.
    """
    if len(sizes) != len(weights) or not sizes:
        raise ValueError(f"expected one weight a source, got {len(sizes)} sizes and {len(weights)} weights")
    if min(sizes) < 1 or min(weights) <= 0:
        raise ValueError(f"sizes and weights must be positive, got {list(sizes)} and {list(weights)}")
    total = sum(sizes)
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    # Rounding first keeps shares that are whole numbers whole.
    shares = np.floor(np.round(exact, 9)).astype(np.int64)
    by_remainder = np.argsort(-np.round(exact - shares, 9), kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    return shares.tolist()


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> NDArray[np.int64]:
    """The clips of one epoch in order.

    Each source deals its clips from an endless row of seeded permutations, which epochs continue: none comes
    again before all its source's clips were drawn. One seeded shuffle then mixes the sources.

    Args:
        sizes: number of clips of each source.
        weights: relative number of draws of each source; ``sizes`` themselves draw each clip once.
        seed, epoch: non-negative integers.

    Returns:
        (sum(sizes), 2) pairs of source and index within the source.
    """
    drawn = []
    for source, (size, share) in enumerate(zip(sizes, source_shares(sizes, weights), strict=True)):
        places = np.arange(epoch * share, (epoch + 1) * share)
        rounds = range(epoch * share // size, -(-(epoch + 1) * share // size))
        dealt = [_permutation(seed, source, turn, size) for turn in rounds]
        indices = np.concatenate([*dealt, np.empty(0, np.int64)])[places - rounds.start * size]
        drawn.append(np.stack([np.full(share, source), indices], axis=1))
    order = np.concatenate(drawn)
    return order[np.random.default_rng([_SHUFFLE, seed, epoch]).permutation(len(order))]


@lru_cache(maxsize=16)
def _permutation(seed: int, source: int, turn: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([_PERMUTATION, seed, source, turn]).permutation(size)


def locate(position: int, length: int) -> tuple[int, int]:
    """The epoch of a position and the place in it, for epochs of ``length`` clips."""
    return divmod(position, length)


def substitute(seed: int, epoch: int, place: int, attempt: int, index: int, size: int) -> int:
    """The clip that stands in for an unusable one: another of the same source.

    Args:
        seed, epoch, place: where in the order the unusable clip stands.
        attempt: 0 for the first substitute, 1 for the one after that fails too, ...
        index: the unusable clip's index within its source.
        size: number of clips of the source.

    Returns:
        An index within the source; over the attempts each other clip comes once.

    Raises:
        IndexError: no other clip is left.
    """
    if attempt >= size - 1:
        raise IndexError(f"no substitute is left after {attempt} attempts among {size} clips")
    others = np.random.default_rng([_SUBSTITUTE, seed, epoch, place]).permutation(size - 1)
    # The permutation runs over the source without `index` itself.
    return int(others[attempt] + (others[attempt] >= index))
