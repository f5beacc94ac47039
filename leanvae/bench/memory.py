"""Peak memory during some work: from the allocator on GPUs, from the resident set on CPUs."""

import gc
import threading
from pathlib import Path

import torch

from litevae.memory import return_freed_memory

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN_LOOKS = 0.005


class PeakMemory:
    """A context manager that sets `peak_bytes` to the peak inside it minus the memory in use before.

    On Linux the kernel records the peak of the resident set; elsewhere a thread samples it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        return_freed_memory(self._device)  # or the work that follows would reuse it unseen
        self._sampler = None
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")  # resets the peak
            self._before = _peak_resident_bytes()
        except OSError:
            self._sampler = _Sampler()
            self._before = self._sampler.peak_bytes
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:
            peak = _peak_resident_bytes()
        self.peak_bytes = max(0, peak - self._before)


class _Sampler(threading.Thread):
    """A thread that samples the resident set until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import psutil

        self._process = psutil.Process()
        self._stopped = threading.Event()
        self.peak_bytes = self._process.memory_info().rss

    def run(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def stop(self) -> int:
        """Stop sampling and return the largest size."""
        self._stopped.set()
        self.join()
        return max(self.peak_bytes, self._process.memory_info().rss)


def _peak_resident_bytes() -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no VmHWM")


def limit_memory(limit_bytes: int) -> None:
    """Make allocations beyond a limit fail, so that a CPU's lack of memory raises an error instead of a kill."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    except (ImportError, AttributeError, OSError, ValueError):
        return
