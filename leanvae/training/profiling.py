"""The cost of a run's steps: time, memory, and traces for chrome://tracing or Perfetto."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from leanvae.data.buckets import Shape

logger = logging.getLogger("leanvae")


@dataclass(frozen=True)
class StepTimes:
    """Seconds that a step took.

    Attributes:
        wait: waiting for data, of all ranks.
        step: forward and backward passes and updates.
        whole: both, and everything else.
    """

    wait: float
    step: float
    whole: float


class StepTrace:
    """Steps recorded by torch's profiler; a context manager around the loop.

    Args:
        path: the trace, a JSON file.
        steps: first and last step, from 1; None records nothing.
    """

    def __init__(self, path: Path, steps: tuple[int, int] | None) -> None:
        self._path = path
        self._steps = steps
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Start before the first recorded step and end after the last; call this before each step, with its number."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step <= last:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=kinds)
            self._profile.start()
        elif step > last:
            self._finish()

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._profile:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            logger.info("trace written to %s", self._path)
            self._profile = None


def step_costs(bucket: Shape, size: int, times: StepTimes, device: torch.device) -> dict[str, float]:
    """Return a step's times, sizes, rates and memory, by their names in `metrics.jsonl`.

    Args:
        bucket: shape of its samples.
        size: number of samples, over all ranks.
        times: seconds that it took.
        device: this rank's device.
    """
    return {
        "seconds_per_step": times.whole,
        "step_seconds": times.step,
        "data_wait_share": times.wait / times.whole,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "samples_per_second": size / times.whole,
        "frames_per_second": size * bucket.frames / times.whole,
        "memory_mib": memory_in_use(device) / 2**20,
    }


def memory_in_use(device: torch.device) -> int:
    """Return a GPU's peak bytes so far, or this process's present ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
