"""Mean and standard deviation of latents by channel, in sums that merge over shards and ranks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Moments:
    """Sums over the latents that samples of posteriors are: their distribution is the mixture of the posteriors.

    Attributes:
        count: elements of each channel.
        sums: (Z,) float64, of the elements' expected values.
        square_sums: (Z,) float64, of their expected squares, mean^2 + variance.
    """

    count: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    square_sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Adds a posterior, whose parameters are `(Z, T', H', W')`."""
        mean, logvar = mean.flatten(1).double(), logvar.flatten(1).double()
        squares = (mean.square() + logvar.exp()).sum(1)
        self.merge(Moments(mean.shape[1], mean.sum(1).numpy(), squares.numpy()))

    def merge(self, other: "Moments") -> None:
        """Adds what other latents sum up to."""
        if not self.count:
            self.sums, self.square_sums = np.zeros_like(other.sums), np.zeros_like(other.square_sums)
        if other.count:
            self.count += other.count
            self.sums = self.sums + other.sums
            self.square_sums = self.square_sums + other.square_sums

    @property
    def mean(self) -> list[float]:
        """Mean of each channel."""
        return (self.sums / max(1, self.count)).tolist()

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel, sqrt(E[z^2] - E[z]^2)."""
        mean = self.sums / max(1, self.count)
        return np.sqrt(np.maximum(0.0, self.square_sums / max(1, self.count) - mean**2)).tolist()

    def to_json(self) -> dict[str, Any]:
        """The sums as they stand in a shard's index."""
        return {"count": self.count, "sums": self.sums.tolist(), "square_sums": self.square_sums.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Moments":
        """Reads what `to_json` gave."""
        return cls(values["count"], np.asarray(values["sums"]), np.asarray(values["square_sums"]))


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """The sums over all parts."""
    total = Moments()
    for part in parts:
        total.merge(part)
    return total
