"""A benchmark run: what is measured in which order, stored in a folder, and resumable after any interruption."""

import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from leanvae.bench.child import run_child
from leanvae.bench.floor import matrix_rate, memory_bandwidth
from leanvae.bench.flops import Count, count
from leanvae.bench.jobs import BenchRow, Result, Results
from leanvae.bench.machine import machine_facts
from leanvae.bench.modes import lacks_mode
from leanvae.bench.plan import Estimator, common_side, plan
from leanvae.bench.settings import COMMON_SHARE, COMMON_SIDES, DEFAULT_FRAMES, BenchSettings
from leanvae.peers.models import Model, Size
from leanvae.peers.registry import find_model
from litevae.errors import InvalidInput
from litevae.files import write_text

logger = logging.getLogger("leanvae")

_SECONDS_WITH_BUDGET, _SECONDS_IN_FULL = 6.0, 30.0  # on repeats of an encoder or a decoder
_SECONDS_OF_TABLE3 = 90.0  # long enough for a warm-up of the slowest
_LONGEST_JOB = 3600.0
_PATIENCE = 6  # multiple of its estimate that a job may take
_GRACE = 20.0  # seconds beyond the budget for the job that is running


class Benchmark:
    """A run and its folder.

    Attributes:
        settings: what to measure.
        models: the models that can be built here, by name.
        left_out: models and modes that cannot be run, with the reason.
        machine: hardware, software, and the floors.
        results: the measurements.
        ranks: all jobs of the run, with their ranks.
    """

    def __init__(self, settings: BenchSettings) -> None:
        """Read the models, the machine and the folder's existing results.

        Raises:
            ValueError: a model is unknown, or the folder holds results of another machine or other software.
        """
        self._began = time.monotonic()
        self.settings = settings
        self.left_out: list[dict[str, str]] = []
        self._modules: dict[str, nn.Module] = {}
        entries = [find_model(name) for name in settings.models]
        settings.output.mkdir(parents=True, exist_ok=True)
        self.results = Results(settings.output / "measurements.jsonl")
        self.machine = self._load_machine()
        self._save_machine()
        self._counts = _Counts(settings.output / "flops.json")
        self.models = {model.name: model for model in entries if self._build(model)}
        self.estimator = Estimator(self._flops_of, self.machine["matrix_rate"], self.seconds_of)
        self.ranks = self._rank_jobs()

    def seconds_of(self, job: BenchRow) -> float:
        """Return the time that a job spends on repeats of the encoder, and again on those of the decoder."""
        if job.encode_only:
            return _SECONDS_OF_TABLE3
        return _SECONDS_IN_FULL if self.settings.budget is None else _SECONDS_WITH_BUDGET

    def count_all(self) -> None:
        """Count FLOPs at the run's resolutions, including those too large to measure."""
        if self.settings.table3:
            return
        wanted = [(model, size) for model in self.models.values() for size in self.settings.counted_sizes(model)]
        for model, size in tqdm(wanted, desc="counting FLOPs", unit="size", disable=None, leave=False):
            self.count(model, size)
        self._counts.save()

    def count(self, model: Model, size: Size) -> Count | None:
        """Return the FLOPs of a model at a size, counted once; None if the model fails at it."""
        return self._counts.get(model, self._modules[model.name], size)

    def run(self) -> None:
        """Make all measurements that fit into the time and do not exist yet."""
        self.count_all()
        for job, result in self.results.by_job.items():
            if job.model in self.models:
                self.estimator.learn(job, result)
        ahead = self._plan()
        left = len(self.waiting()) - len(ahead)
        logger.info(
            "%d measurements exist, %d to make%s",
            len(self.results.by_job),
            len(ahead),
            f", {left} left out as too long (--full makes them too)" if left else "",
        )
        number = 0
        with tqdm(total=len(ahead), unit="row", disable=None, leave=False) as bar:
            while ahead:
                job, number = ahead[0], number + 1
                bar.set_description(str(job))
                result = run_child(job, self.seconds_of(job), self._timeout(job))
                self.results.add(job, result)
                self.estimator.learn(job, result)
                ahead = self._plan()
                bar.total = number + len(ahead)
                bar.update()
                seconds = sum(map(self.estimator.estimate, ahead))
                logger.info("[%d/%d, %s left] %s: %s", number, bar.total, _minutes(seconds), job, _summary_line(result))
        if number:
            self._measure_floors_again()

    def waiting(self) -> dict[BenchRow, int]:
        """Return the jobs without a result, with their ranks."""
        return {job: rank for job, rank in self.ranks.items() if job not in self.results.by_job}

    def _plan(self) -> list[BenchRow]:
        return plan(self.waiting(), self.estimator.estimate, self._time_left(), self.settings.budget)

    def _time_left(self) -> float | None:
        """Return the seconds of the budget not yet spent by this process or an interrupted one before it."""
        if self.settings.budget is None:
            return None
        return self.settings.budget - self._spent_before - (time.monotonic() - self._began)

    def _timeout(self, job: BenchRow) -> float:
        time_left = self._time_left()
        if time_left is None:
            return _LONGEST_JOB
        return min(time_left + _GRACE, max(120.0, _PATIENCE * self.estimator.estimate(job)))

    def _load_machine(self) -> dict[str, Any]:
        """Return the folder's record, checked against this machine, or a new one with freshly measured floors."""
        path, device = self.settings.output / "machine.json", torch.device(self.settings.device)
        here = machine_facts(self.settings.device)
        machine = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if machine is None:
            date = datetime.now(UTC).date().isoformat()
            machine = {**here, "date": date, "matrix_rate": {}, "memory_bandwidth": memory_bandwidth(device)}
        for part in ("hardware", "software"):
            if machine[part] != here[part]:
                raise InvalidInput(
                    f"{path.parent} holds results of another machine or other software "
                    f"({part}: {_difference(machine[part], here[part])}): choose another --output"
                )
        for dtype in {*self.settings.dtypes, "float32"} - set(machine["matrix_rate"]):
            machine["matrix_rate"][dtype] = matrix_rate(getattr(torch, dtype), device)
        return machine

    def _measure_floors_again(self) -> None:
        """Keep the better of the floors before and after, because other processes may have used the machine."""
        device, rates = torch.device(self.settings.device), self.machine["matrix_rate"]
        for dtype in rates:
            rates[dtype] = max(rates[dtype], matrix_rate(getattr(torch, dtype), device))
        self.machine["memory_bandwidth"] = max(self.machine["memory_bandwidth"], memory_bandwidth(device))
        self._save_machine()

    def _save_machine(self) -> None:
        write_text(self.settings.output / "machine.json", json.dumps(self.machine, indent=2) + "\n")

    def _build(self, model: Model) -> bool:
        """Build a model on the meta device; leave it out if its class is not installed."""
        try:
            self._modules[model.name] = model.build_on_meta()
        except ImportError as error:
            self.left_out.append({"what": model.name, "reason": str(error)})
            return False
        return True

    def _rank_jobs(self) -> dict[BenchRow, int]:
        """Return all jobs except those in modes that a model lacks."""
        lacking = {
            (name, mode): reason
            for name, module in self._modules.items()
            for mode in self.settings.modes or ("compiled", "chunked", "tiled")
            if (reason := lacks_mode(module, mode)) is not None
        }
        everything = self.settings.jobs(self.models.values(), self._common_side())
        self._spent_before = self.results.seconds_spent(everything)
        wanted = {(job.model, job.mode) for job in everything}
        for model, mode in sorted(wanted & set(lacking)):
            self.left_out.append({"what": f"{model}, {mode}", "reason": lacking[model, mode]})
        return {
            job: rank
            for job, rank in everything.items()
            if job.model in self.models and (job.model, job.mode) not in lacking
        }

    def _common_side(self) -> int | None:
        """Return the side of the clips that all video models are measured on, chosen once for a folder."""
        if self.settings.is_selection or self.settings.table3:
            return None
        if "common_side" not in self.machine:
            budget = self.settings.budget
            self.machine["common_side"] = common_side(
                self._common_jobs, COMMON_SIDES, self.estimator.estimate, budget and COMMON_SHARE * budget
            )
            self._save_machine()
        return self.machine["common_side"]

    def _common_jobs(self, side: int) -> Iterable[BenchRow]:
        for model in self.models.values():
            if model.kind == "video" and not model.tiled_only:
                yield BenchRow(model.name, DEFAULT_FRAMES, side, side, "whole", self.settings.dtypes[0])

    def _flops_of(self, job: BenchRow) -> tuple[float, float]:
        """Return a job's FLOPs; if they were not counted, in proportion to its pixels, which suffices for a plan."""
        model, size = self.models[job.model], job.size
        if not self._counts.has(model, size):
            size = self.settings.counted_sizes(model)[0]
        counted = self.count(model, size)
        if counted is None:
            return math.inf, math.inf
        scale = job.batch * model.fit(job.size).num_pixels / model.fit(size).num_pixels
        return scale * counted.encode, scale * counted.decode


class _Counts:
    """Counts of FLOPs, stored in a file; None for models that cannot be counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._counts: dict[str, Count | None] = {key: Count(**value) for key, value in stored.items()}

    def has(self, model: Model, size: Size) -> bool:
        """Tell whether a size was counted."""
        return f"{model.name} {model.fit(size)}" in self._counts

    def get(self, model: Model, module: nn.Module, size: Size) -> Count | None:
        """Return a model's count at a size; sizes padded to the same one share it."""
        key = f"{model.name} {model.fit(size)}"
        if key not in self._counts:
            try:
                self._counts[key] = count(model, module, size)
            except Exception as error:  # models raise anything for sizes that they do not support
                self._counts[key] = None
                logger.warning("%s cannot be counted: %s", key, str(error).splitlines()[0])
        return self._counts[key]

    def save(self) -> None:
        """Write the file."""
        counts = {key: asdict(value) for key, value in self._counts.items() if value is not None}
        write_text(self._path, json.dumps(counts, indent=1) + "\n")


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _summary_line(result: Result) -> str:
    """Describe a result in one line."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    parts = [
        f"{part} {result[part]['median']:.3g} s, {result[part]['peak_bytes'] / 2**30:.2f} GiB"
        for part in ("encode", "decode")
        if part in result
    ]
    return "; ".join(parts)
