"""The order of training samples: pure functions of the seed, the epoch and the place.

Samples of one bucket come from an endless row of epochs, in which a step takes the next ones, as many as its batch.
Ranks take slices of it, so the order is the same on any number of them, and resuming is to start at a later place.
The text says clips; images are ordered the same way.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

import numpy as np
from numpy.typing import NDArray

from leanvae.data.buckets import Shape

# Separate the random streams that share a seed.
_SHUFFLE, _PERMUTATION, _SUBSTITUTE, _OFFSETS, _ORDER = 1, 2, 3, 4, 5
BLOCK = 64  # steps whose buckets are shuffled among themselves


@dataclass(frozen=True)
class Phase:
    """A stretch of training with the same buckets.

    Attributes:
        first_step: its first training step.
        steps: how many steps it has; the last phase of a run goes on for ever.
        batches: samples a step, of all ranks together, by bucket.
    """

    first_step: int
    steps: int
    batches: Mapping[Shape, int]


def phases_of(stretches: Iterable[tuple[int, Mapping[Shape, int]]]) -> tuple[Phase, ...]:
    """Lay phases one behind the other.

    Args:
        stretches: steps, and batch sizes by bucket, of each.

    Raises:
        ValueError: no phases, a phase without buckets, or a number of steps or a batch size below 1.
    """
    phases: list[Phase] = []
    step = 0
    for steps, batches in stretches:
        if not batches or min(steps, *batches.values()) < 1:
            listed = {str(bucket): size for bucket, size in batches.items()}
            raise ValueError(
                f"phase {len(phases)}: expected at least one bucket, and steps and batch sizes of at least 1, "
                f"got {steps} steps of {listed}"
            )
        phases.append(Phase(step, steps, batches))
        step += steps
    if not phases:
        raise ValueError("expected at least one phase")
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Find the phase that a step belongs to; steps behind the end of the last one belong to it.

    Raises:
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"steps count from 0, got {step}")
    return phases[bisect_right([phase.first_step for phase in phases], step) - 1]


def even_counts(shares: Sequence[float], offsets: Sequence[float], total: int) -> list[int]:
    """Split the first things of an endless row by shares, each to less than two of what it should get.

    The first share is taken of all; what is left over is split among the others in the same way. So no count falls
    when the total grows, and they always add up.

    Args:
        shares: positive, summing to 1.
        offsets: in [0, 1), by share: where in its period it begins.
        total: how many to split.
    """
    counts, left, rest = [], total, 1.0
    for share, offset in zip(shares[:-1], offsets[:-1], strict=True):
        count = min(left, floor(left * min(1.0, share / rest) + offset))
        counts.append(count)
        left, rest = left - count, rest - share
    return [*counts, left]


def source_counts(sizes: Sequence[int], weights: Sequence[float], epochs: int) -> list[int]:
    """Count the draws of each source in the first epochs, of sum(sizes) draws each, by weight.

    Raises:
        ValueError: a size or weight that is not positive, or lists of different lengths.
    """
    if len(sizes) != len(weights) or not sizes:
        raise ValueError(f"expected one weight a source, got {len(sizes)} sizes and {len(weights)} weights")
    if min(sizes) < 1 or min(weights) <= 0:
        raise ValueError(f"sizes and weights must be positive, got {list(sizes)} and {list(weights)}")
    shares = [weight / sum(weights) for weight in weights]
    # Half a draw at the start rounds to the nearest, so that what is whole stays whole.
    return even_counts(shares, len(sizes) * [0.5], epochs * sum(sizes))


def epoch_order(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int, row: int = 0
) -> NDArray[np.int64]:
    """Order the clips of one epoch.

    Each source deals its clips from an endless row of seeded permutations, which epochs continue: none comes
    again before all its source's clips were drawn. One seeded shuffle then mixes the sources.

    Args:
        sizes: number of clips of each source.
        weights: relative number of draws of each source; ``sizes`` themselves draw each clip once.
        seed, epoch: non-negative integers.
        row: number of the row of epochs; others are in another order.

    Returns:
        (sum(sizes), 2) pairs of source and index within the source.
    """
    drawn = []
    starts, ends = (source_counts(sizes, weights, epochs) for epochs in (epoch, epoch + 1))
    for source, (size, start, end) in enumerate(zip(sizes, starts, ends, strict=True)):
        places = np.arange(start, end)
        rounds = range(start // size, -(-end // size))
        dealt = [_permutation(seed, row, source, turn, size) for turn in rounds]
        indices = np.concatenate([*dealt, np.empty(0, np.int64)])[places - rounds.start * size]
        drawn.append(np.stack([np.full(end - start, source), indices], axis=1))
    order = np.concatenate(drawn)
    return order[np.random.default_rng([_SHUFFLE, seed, row, epoch]).permutation(len(order))]


@lru_cache(maxsize=16)
def _permutation(seed: int, row: int, source: int, turn: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([_PERMUTATION, seed, row, source, turn]).permutation(size)


def substitute(seed: int, position: int, attempt: int, index: int, size: int) -> int:
    """Choose the clip that stands in for an unusable one: another of the same source.

    Args:
        seed: of the run.
        position: number of the sample in the run.
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
    others = np.random.default_rng([_SUBSTITUTE, seed, position]).permutation(size - 1)
    # The permutation runs over the source without `index` itself.
    return int(others[attempt] + (others[attempt] >= index))


@lru_cache(maxsize=64)
def _block(shares: tuple[float, ...], seed: int, number: int) -> tuple[list[int], list[int]]:
    """Order the buckets of a block's steps, and count the steps that each bucket has had before it."""
    offsets = np.random.default_rng([_OFFSETS, seed]).random(len(shares)).tolist()
    before = even_counts(shares, offsets, number * BLOCK)
    after = even_counts(shares, offsets, (number + 1) * BLOCK)
    buckets = np.repeat(np.arange(len(shares)), np.subtract(after, before))
    return np.random.default_rng([_ORDER, seed, number]).permutation(buckets).tolist(), before


def bucket_of_step(shares: tuple[float, ...], seed: int, step: int) -> tuple[int, list[int]]:
    """Find the bucket that a step takes, and count the steps before it that went to each bucket.

    At the end of each block of steps, each bucket has had its share of all steps, to less than two; within a block
    their order is shuffled.

    Args:
        shares: of the steps, by bucket; positive, summing to 1.
        seed: non-negative.
        step: counted from 0.
    """
    number, place = divmod(step, BLOCK)
    buckets, counts = _block(shares, seed, number)
    counts = list(counts)
    for bucket in buckets[:place]:
        counts[bucket] += 1
    return buckets[place], counts
