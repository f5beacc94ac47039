"""The Fréchet distance of two sets of features, and confidence intervals."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000  # for means
FRECHET_RESAMPLES = 50
_COVERED = (2.5, 97.5)  # percentiles of the resamples, for an interval of 95%
_SEED = 0


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Compute the squared Fréchet distance of the normal distributions with two samples' means and covariances.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) (Heusel et al., "GANs trained by a two time-scale update rule",
    2017, Equation 6), with the unbiased covariances S = R^T R. The last trace is the sum of the singular values of
    R_x R_y^T, which needs no root of a matrix and is exact even with fewer samples than features.

    Args:
        x: `(N, D)`, at least two samples.
        y: `(M, D)`, at least two samples.

    Returns:
        The distance, at least 0; computed in float64.

    Raises:
        ValueError: a shape is wrong.
    """
    for name, sample in (("x", x), ("y", y)):
        if sample.ndim != 2 or len(sample) < 2 or sample.shape[1] != x.shape[1]:
            raise ValueError(f"{name} has shape {tuple(sample.shape)}: expected two or more samples (N, D) of one D")
    x, y = x.double(), y.double()
    roots = [_root_of_covariance(sample) for sample in (x, y)]
    traces = sum(root.square().sum() for root in roots)
    between = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * between
    return max(0.0, distance.item())


def _root_of_covariance(sample: Tensor) -> Tensor:
    """Return R with R^T R = covariance of `(N, D)`, with no more rows than needed."""
    centred = (sample - sample.mean(0)) / (len(sample) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(sample) > sample.shape[1] else centred


def mean_interval(values: Sequence[float], weights: Sequence[float]) -> list[float] | None:
    """Compute the 95% bootstrap interval (Efron, 1979; percentiles) of a weighted mean.

    Args:
        values: value of each clip.
        weights: weight of each clip, drawn together with its value.

    Returns:
        The two ends; `None` for fewer than two values.
    """
    if len(values) < 2:
        return None
    value, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    counts = _draws(len(values), RESAMPLES)
    means = (counts @ (value * weight)) / (counts @ weight)
    return _percentiles(means)


def distance_interval(clips: Sequence[tuple[Tensor, Tensor]]) -> list[float] | None:
    """Compute the 95% bootstrap interval of the Fréchet distance; a clip is drawn with all its features of both kinds.

    Args:
        clips: features `(n, D)` of reference and reconstruction of each clip.

    Returns:
        The two ends; `None` for fewer than two clips.
    """
    if len(clips) < 2:
        return None

    distances = []
    for counts in _draws(len(clips), FRECHET_RESAMPLES):
        chosen = [clip for clip, count in zip(clips, counts, strict=True) for _ in range(count)]
        distances.append(frechet_distance(*(torch.cat(features) for features in zip(*chosen, strict=True))))
    return _percentiles(np.asarray(distances))


def _draws(count: int, resamples: int) -> NDArray[np.int64]:
    """Count how often each of `count` clips is in each resample, `(resamples, count)`."""
    return np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=resamples)


def _percentiles(values: NDArray[np.float64]) -> list[float]:
    low, high = np.percentile(values, _COVERED)
    return [float(low), float(high)]
