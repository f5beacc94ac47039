"""Which bucket each step takes: a pure function of the seed and the step, the same on all ranks.

At the end of each block of steps, each bucket has had its share of all steps, to less than two; within a block their
order is shuffled.
"""

from functools import lru_cache

import numpy as np

from leanvae.data.order import even_counts

BLOCK = 64  # steps that are shuffled among themselves
_OFFSETS, _ORDER = 4, 5  # separate the random streams that share a seed


@lru_cache(maxsize=64)
def _block(shares: tuple[float, ...], seed: int, number: int) -> tuple[list[int], list[int]]:
    """The buckets of a block's steps in order, and how many steps each bucket has had before it."""
    offsets = np.random.default_rng([_OFFSETS, seed]).random(len(shares)).tolist()
    before = even_counts(shares, offsets, number * BLOCK)
    after = even_counts(shares, offsets, (number + 1) * BLOCK)
    buckets = np.repeat(np.arange(len(shares)), np.subtract(after, before))
    return np.random.default_rng([_ORDER, seed, number]).permutation(buckets).tolist(), before


def bucket_of_step(shares: tuple[float, ...], seed: int, step: int) -> tuple[int, list[int]]:
    """The bucket that a step takes, and how many of the steps before it went to each bucket.

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
