"""How long jobs will take, and which of them fit into the time."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from leanvae.bench.jobs import BenchRow, Result

START_SECONDS = 8.0  # until a process has imported torch and built a model
COMPILE_SECONDS = 60.0
_USUAL_EFFICIENCY = 0.5  # of the rate of matrix products, before anything is measured
_MIN_PASSES = 4  # a warm-up and three repeats
_LARGEST_SHARE = 0.25  # of the budget that one job may take


@dataclass
class Estimator:
    """A prediction of jobs' times from their FLOPs, which learns from finished jobs.

    Attributes:
        flops: the encoder's and decoder's operations of a job; infinite if unknown.
        rates: operations per second of matrix products, by dtype.
        seconds: time that a job spends on repeats of each of the two.
    """

    flops: Callable[[BenchRow], tuple[float, float]]
    rates: Mapping[str, float]
    seconds: Callable[[BenchRow], float]
    _seconds_per_flop: dict[tuple[str, str], float] = field(default_factory=dict)

    def learn(self, job: BenchRow, result: Result) -> None:
        """Record how fast a model ran."""
        if result["status"] == "ok":
            passes = [result[part]["median"] for part in ("encode", "decode") if part in result]
            flops = sum(self.flops(job)[: len(passes)])
            if math.isfinite(flops):
                self._seconds_per_flop[job.model, job.dtype] = sum(passes) / flops

    def estimate(self, job: BenchRow) -> float:
        """Return the seconds that a job will take, including its process and its repeats."""
        passes = [flops * self._pace(job) for flops in self.flops(job)[: 1 if job.encode_only else 2]]
        overhead = START_SECONDS + (COMPILE_SECONDS if job.mode == "compiled" else 0)
        return overhead + sum(_with_repeats(seconds, self.seconds(job)) for seconds in passes)

    def _pace(self, job: BenchRow) -> float:
        """Return the seconds per operation of the model or, if unknown, of all models or a guess."""
        known = self._seconds_per_flop
        if (job.model, job.dtype) in known:
            return known[job.model, job.dtype]
        same_dtype = [pace for (_, dtype), pace in known.items() if dtype == job.dtype]
        return statistics.median(same_dtype) if same_dtype else 1 / (_USUAL_EFFICIENCY * self.rates[job.dtype])


def _with_repeats(seconds: float, limit: float) -> float:
    """Return the seconds of all passes if one takes `seconds`, and repeating stops at a limit."""
    if seconds > limit / 2:
        return seconds
    return max(_MIN_PASSES * seconds, min(limit, 10 * seconds))


def plan(
    ranks: Mapping[BenchRow, int], estimate: Callable[[BenchRow], float], time_left: float | None, budget: float | None
) -> list[BenchRow]:
    """Return the jobs that fit into the time, in order: by rank, then the shortest first.

    Args:
        ranks: the remaining jobs.
        estimate: seconds of a job.
        time_left: seconds; None for no limit.
        budget: seconds of the whole run, of which a job may take only a limited share; None for no limit.
    """
    in_order = sorted(ranks, key=lambda job: (ranks[job], estimate(job)))
    if time_left is None or budget is None:
        return in_order
    chosen = []
    for job in in_order:
        seconds = estimate(job)
        if seconds <= min(time_left, _LARGEST_SHARE * budget):
            chosen.append(job)
            time_left -= seconds
    return chosen


def common_side(
    jobs_of_side: Callable[[int], Iterable[BenchRow]],
    sides: Iterable[int],
    estimate: Callable[[BenchRow], float],
    seconds: float | None,
) -> int:
    """Return the largest of `sides` (descending) whose jobs take at most `seconds` together, or else the last."""
    side = 0
    for side in sides:
        jobs = list(jobs_of_side(side))
        if seconds is None or sum(map(estimate, jobs)) <= seconds:
            break
    return side
