"""One measurement in a separate process: `python -m leanvae.bench.measure JOB` prints its result as JSON.

The parent process holds this one's standard input open. If that closes, this process ends.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leanvae.bench.floor import synchronize
from leanvae.bench.jobs import BenchRow, Result
from leanvae.bench.memory import PeakMemory, limit_memory
from leanvae.bench.modes import runners
from leanvae.peers.registry import find_model
from litevae.memory import is_out_of_memory

RESULT_PREFIX = "RESULT "
OUT_OF_MEMORY = "out of memory"
_SMALL_SPREAD = 0.05  # interquartile range over median at which repeating ends
_MIN_REPEATS, _MAX_REPEATS = 3, 50


def repeat(function: Callable[[], Tensor], device: torch.device, seconds: float) -> tuple[Result, Tensor]:
    """Time a function after a first call, until the spread is small or the time is spent.

    If the first call takes more than half of the time, it is the only measurement, without a warm-up.

    Returns:
        `median`, `quartiles` and `repeats` of a call's seconds, `warm_up`, and the `peak_bytes` of the first call; and
        the function's result.
    """
    with PeakMemory(device) as memory:
        first, result = _timed(function, device)
    times = []
    if first <= seconds / 2:
        start = time.perf_counter()
        while len(times) < _MAX_REPEATS:
            del result
            elapsed, result = _timed(function, device)
            times.append(elapsed)
            if len(times) >= _MIN_REPEATS and (
                _spread(times) <= _SMALL_SPREAD or time.perf_counter() - start > seconds
            ):
                break
    warm_up = bool(times)
    times = times or [first]
    summary = {"median": statistics.median(times), "quartiles": _quartiles(times), "repeats": len(times)}
    return {**summary, "warm_up": warm_up, "peak_bytes": memory.peak_bytes}, result


def _timed(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = function()
        end.record()
        synchronize(device)
        return start.elapsed_time(end) / 1000, result
    began = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - began, result


def _quartiles(times: list[float]) -> list[float]:
    if len(times) == 1:
        return [times[0], times[0]]
    lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
    return [lower, upper]


def _spread(times: list[float]) -> float:
    lower, upper = _quartiles(times)
    return (upper - lower) / statistics.median(times)


def measure(job: BenchRow, seconds: float) -> Result:
    """Build a model and measure its encoder and decoder.

    Args:
        job: what to measure.
        seconds: time for the encoder, and again for the decoder.

    Returns:
        `encode` and `decode`, each as from `repeat`, `parameters`, and `latent_elements` of the batch.
    """
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    model = find_model(job.model)
    size = model.fit(job.size)
    torch.manual_seed(0)
    with torch.inference_mode():
        vae = model.build().to(device, dtype).eval().requires_grad_(False)
        x = (2 * torch.rand(model.pixels_shape(size, job.batch)) - 1).to(device, dtype)
        run_encoder, run_decoder = runners(model, vae, job.mode, size)
        encoded, latent = repeat(lambda: run_encoder(x), device, seconds)
        result: Result = {
            "encode": encoded,
            "parameters": sum(parameter.numel() for parameter in vae.parameters()),
            "latent_elements": latent.numel(),
        }
        if not job.encode_only:
            del x
            result["decode"], _ = repeat(lambda: run_decoder(latent), device, seconds)
    return result


def failure_result(error: BaseException) -> Result:
    """Return a failure as a result: its status and first line."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_out_of_memory(error):
        return {"status": OUT_OF_MEMORY, "reason": reason}
    return {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Measure the job in the first argument, with the seconds and the memory limit (0 for none) in the next two."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job_fields: dict[str, Any] = json.loads(arguments[0])
    seconds, limit_bytes = float(arguments[1]), int(arguments[2])
    if limit_bytes:
        limit_memory(limit_bytes)
    try:
        result = {"status": "ok", **measure(BenchRow(**job_fields), seconds)}
    except Exception as error:
        result = failure_result(error)
    print(RESULT_PREFIX + json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
