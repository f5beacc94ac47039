"""The process that measures a job, and a result for every way in which it may end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import psutil

from leanvae.bench.jobs import BenchRow, Result
from leanvae.bench.measure import OUT_OF_MEMORY, RESULT_PREFIX

_SHARE_OF_MEMORY = 0.95  # of the free memory that a measurement on a CPU may take
_ERROR_LINES = 3


def run_child(job: BenchRow, seconds: float, timeout: float | None) -> Result:
    """Measure a job in a separate process.

    Args:
        job: what to measure.
        seconds: time for the repeats of the encoder, and again for those of the decoder.
        timeout: seconds after which the process is killed; None means never.

    Returns:
        The result of `measure`, with `wall_seconds` and a `status`: `ok`, or with a `reason` `out of memory`, `failed`,
        `crashed` or `timed out`.
    """
    limit = int(_SHARE_OF_MEMORY * psutil.virtual_memory().available) if job.device == "cpu" else 0
    command = [sys.executable, "-m", "leanvae.bench.measure", json.dumps(asdict(job)), str(seconds), str(limit)]
    began = time.monotonic()
    held_open, their_end = _pipe()  # closes however this process ends, which ends the child
    try:
        done = subprocess.run(
            command, stdin=their_end, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
        result = _result_of(done.stdout, done.stderr, done.returncode)
    except subprocess.TimeoutExpired:
        result = {"status": "timed out", "reason": f"stopped after {timeout:.0f} s"}
    finally:
        os.close(their_end)
        os.close(held_open)
    return {**result, "wall_seconds": time.monotonic() - began}


def _pipe() -> tuple[int, int]:
    """Return the writing and the reading end of a pipe."""
    reading, writing = os.pipe()
    return writing, reading


def _result_of(output: str, errors: str, code: int) -> Result:
    for line in reversed(output.splitlines()):
        if line.startswith(RESULT_PREFIX):
            return json.loads(line.removeprefix(RESULT_PREFIX))
    if code == -signal.SIGKILL:
        return {"status": OUT_OF_MEMORY, "reason": "killed by the system, probably because memory ran out"}
    last = " ".join(errors.strip().splitlines()[-_ERROR_LINES:]) or "it printed nothing"
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return {"status": "crashed", "reason": f"ended {how}: {last}"}
