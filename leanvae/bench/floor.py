"""The machine's limits: rate of matrix products, and memory bandwidth."""

import time
from collections.abc import Callable

import torch

_LONG_ENOUGH = 0.05  # seconds that a product must take for a reliable rate
_LARGEST_SIDE = 8192
_REPEATS = 5
_COPY_BYTES = 2**28


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the floating-point operations per second of a square matrix product, the best of several.

    The matrices grow until one product takes long enough, so that types that the processor only emulates do not take
    minutes.
    """
    side = 128
    while True:
        best = _product_seconds(side, dtype, device)
        if best >= _LONG_ENOUGH or side == _LARGEST_SIDE:
            return 2 * side**3 / best
        side *= 2


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.rand(side, side, device=device).to(dtype)
    b = torch.rand(side, side, device=device).to(dtype)
    return min(_seconds(lambda: a @ b, device) for _ in range(_REPEATS))


def memory_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a copy reads and writes, the best of several."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    return 2 * _COPY_BYTES / best


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
