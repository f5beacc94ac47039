"""Measurements to make, and their results in the output folder."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanvae.peers.models import Size
from litevae.files import flush_to_disk

DTYPES = ("float32", "bfloat16", "float16")

Result = dict[str, Any]


@dataclass(frozen=True)
class BenchRow:
    """A row of the benchmark: a model at a size, in a mode and a dtype, in a separate process.

    Attributes:
        model: a name that `find_model` knows.
        frames, height, width: the requested size, which the model may pad.
        mode: one of `MODES`.
        dtype: one of `DTYPES`.
        device: `cpu`, `cuda`, ...
        batch: images or clips at once.
        encode_only: whether decoding is left out.
    """

    model: str
    frames: int
    height: int
    width: int
    mode: str = "whole"
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    encode_only: bool = False

    @property
    def size(self) -> Size:
        """Frames, height and width."""
        return Size(self.frames, self.height, self.width)

    def __str__(self) -> str:
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{self.model} {batch}{self.size} {self.mode} {self.dtype}"


class Results:
    """Results in a file of one JSON line each, which survives a kill at any moment.

    Attributes:
        by_job: the results so far, in the order of measurement.
    """

    def __init__(self, path: Path) -> None:
        """Read the existing results, without a last line that a kill cut short."""
        self._path = path
        self.by_job: dict[BenchRow, Result] = {}
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(sum(len(line) for line in lines[:-1]))
            lines.pop()
        for line in lines:
            entry = json.loads(line)
            self.by_job[BenchRow(**entry["job"])] = entry["result"]

    def add(self, job: BenchRow, result: Result) -> None:
        """Store a result; it is on disk before this returns."""
        line = json.dumps({"job": asdict(job), "result": result}, allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        flush_to_disk(self._path.parent)
        self.by_job[job] = result

    def seconds_spent(self, jobs: Iterable[BenchRow]) -> float:
        """Return the wall-clock time that the results of some jobs took."""
        return sum(self.by_job[job]["wall_seconds"] for job in jobs if job in self.by_job)
