"""Mean and standard deviation of latents by channel, in sums that merge over shards and ranks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Moments:
    """Sums over latents, which are samples of posteriors and thus distributed as their mixture.

    Attributes:
        count: number of elements per channel.
        sums: (Z,) float64, of the elements' expected values.
        square_sums: (Z,) float64, of their expected squares, mean^2 + variance.
    """

    count: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    square_sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        """Add a posterior, whose parameters are `(Z, T', H', W')`."""
        mean, logvar = mean.flatten(1).double(), logvar.flatten(1).double()
        squares = (mean.square() + logvar.exp()).sum(1)
        self.merge(Moments(mean.shape[1], mean.sum(1).numpy(), squares.numpy()))

    def merge(self, other: "Moments") -> None:
        """Add the sums over other latents."""
        if not self.count:
            self.sums, self.square_sums = np.zeros_like(other.sums), np.zeros_like(other.square_sums)
        if other.count:
            self.count += other.count
            self.sums = self.sums + other.sums
            self.square_sums = self.square_sums + other.square_sums

    @property
    def mean(self) -> list[float]:
        """The mean of each channel."""
        return (self.sums / max(1, self.count)).tolist()

    @property
    def std(self) -> list[float]:
        """The standard deviation of each channel, sqrt(E[z^2] - E[z]^2)."""
        mean = self.sums / max(1, self.count)
        return np.sqrt(np.maximum(0.0, self.square_sums / max(1, self.count) - mean**2)).tolist()

    def to_json(self) -> dict[str, Any]:
        """Return the sums in the form of a shard's index."""
        return {"count": self.count, "sums": self.sums.tolist(), "square_sums": self.square_sums.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Moments":
        """Read the output of `to_json`."""
        return cls(values["count"], np.asarray(values["sums"]), np.asarray(values["square_sums"]))


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Add the sums of all parts."""
    total = Moments()
    for part in parts:
        total.merge(part)
    return total
