"""A run's results as one dictionary, written as JSON, with a CSV file of its rows."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leanvae.bench.jobs import BenchRow, Result
from leanvae.bench.measure import OUT_OF_MEMORY
from leanvae.bench.run import Benchmark
from leanvae.bench.settings import DEFAULT_FRAMES, HEADLINE, TABLE3_BATCH, TABLE3_SIDE
from leanvae.bench.sizes import resolution_name
from leanvae.peers.models import Size
from litevae.errors import InvalidInput
from litevae.files import write_csv, write_text

NO_TIME, UNCOUNTED = "no time: needs", "its FLOPs cannot be counted"
JSON_FILE, CSV_FILE = "results.json", "results.csv"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TABLE3_BASE = "sd-vae-nchw"

Report = dict[str, Any]


def make_report(bench: Benchmark) -> Report:
    """Collect the results of a run.

    Returns:
        `machine`, `models`, `rows` (one per measurement), `flops` (one per model and size), `table3`, `memory_limits`,
        and `left_out` (`what` and `reason` each).
    """
    rows = [_row(bench, job, result) for job, result in bench.results.by_job.items() if job.model in bench.models]
    left_out = list(bench.left_out)
    for job in sorted(bench.waiting(), key=bench.estimator.estimate):
        seconds = bench.estimator.estimate(job)
        known = f"{NO_TIME} about {seconds / 60:.1f} min"
        left_out.append({"what": str(job), "reason": known if math.isfinite(seconds) else UNCOUNTED})
    models = {
        model.name: {
            "kind": model.kind,
            "source": model.source,
            "config": model.config,
            "note": model.note,
            "is_ours": model.is_ours,
        }
        for model in bench.models.values()
    }
    return {
        "convention": "a multiply-add counts as two FLOPs; memory is the peak minus what was resident before",
        "machine": bench.machine,
        "models": models,
        "rows": rows,
        "flops": [] if bench.settings.table3 else _flops(bench),
        "table3": table3_ratios(rows),
        "memory_limits": memory_limits(rows, bench.machine["hardware"]["memory_bytes"]),
        "left_out": left_out,
    }


def _row(bench: Benchmark, job: BenchRow, result: Result) -> dict[str, Any]:
    """Return a measurement with its FLOPs, its throughput, and its ratio to the machine's limit."""
    model = bench.models[job.model]
    counted = bench.count(model, job.size)
    row: dict[str, Any] = {**asdict(job), "measured_size": str(model.fit(job.size)), **result}
    pixel_bytes = 3 * job.batch * model.fit(job.size).num_pixels * _BYTES[job.dtype]
    rate = bench.machine["matrix_rate"].get(job.dtype)
    for part in ("encode", "decode"):
        if part not in result:
            continue
        flops = job.batch * getattr(counted, part) if counted else None
        seconds = result[part]["median"]
        floor = max(flops / rate if flops and rate else 0.0, pixel_bytes / bench.machine["memory_bandwidth"])
        row[part] = {
            **result[part],
            "flops": flops,
            "frames_per_second": job.batch * job.frames / seconds,
            "floor_seconds": floor,
            "times_floor": seconds / floor,
        }
    return row


def _flops(bench: Benchmark) -> list[dict[str, Any]]:
    """Return the FLOPs of all models at all counted sizes, with the ratio to our first model's."""
    entries = []
    for model in bench.models.values():
        for size in bench.settings.counted_sizes(model):
            counted = bench.count(model, size)
            if counted is None:
                continue
            entry = {"model": model.name, **asdict(size), "measured_size": str(model.fit(size))}
            entries.append({**entry, "encode": counted.encode, "decode": counted.decode})
    ours = {Size.of(entry): _total(entry) for entry in entries if entry["model"] == HEADLINE}
    for entry in entries:
        total = ours.get(Size.of(entry))
        entry["times_ours"] = _total(entry) / total if total else None
    return entries


def _total(entry: dict[str, Any]) -> int:
    return entry["encode"] + entry["decode"]


def table3_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare encoders on batches with the SD-VAE's in its default layout: Table 3 of the LiteVAE paper."""
    side = TABLE3_SIDE
    measured = {
        row["model"]: row["encode"]
        for row in rows
        if row["encode_only"] and row["status"] == "ok" and (row["batch"], row["height"]) == (TABLE3_BATCH, side)
    }
    base = measured.get(_TABLE3_BASE)
    return [
        {
            "model": name,
            "images_per_second": part["frames_per_second"],
            "peak_bytes": part["peak_bytes"],
            "flops_per_image": part["flops"] / TABLE3_BATCH,
            "speed_ratio": part["frames_per_second"] / base["frames_per_second"] if base else None,
            "memory_ratio": part["peak_bytes"] / base["peak_bytes"] if base else None,
            "flops_ratio": part["flops"] / base["flops"] if base else None,
        }
        for name, part in measured.items()
    ]


def memory_limits(rows: Sequence[dict[str, Any]], memory_bytes: int) -> list[dict[str, Any]]:
    """Find where each model run whole in float32 fills the memory, by extrapolation or as observed.

    Activations are assumed to grow with the number of pixels.
    """
    limits = []
    single = [row for row in rows if (row["mode"], row["dtype"], row["batch"]) == ("whole", "float32", 1)]
    for name in dict.fromkeys(row["model"] for row in single):
        of_model = [row for row in single if row["model"] == name and row["status"] in ("ok", OUT_OF_MEMORY)]
        counts = {row["frames"] for row in of_model}
        frames = DEFAULT_FRAMES if DEFAULT_FRAMES in counts else max(counts, default=0)
        of_model = sorted((row for row in of_model if row["frames"] == frames), key=lambda row: Size.of(row).num_pixels)
        ran_out = [row for row in of_model if row["status"] == OUT_OF_MEMORY]
        if ran_out:
            limits.append({"model": name, "frames": frames, "ran_out_at": _name(ran_out[0])})
        elif of_model:
            row = of_model[-1]
            peak = max(row[part]["peak_bytes"] for part in ("encode", "decode") if part in row)
            free = memory_bytes - 4 * row["parameters"]
            side = (free / peak * row["height"] * row["width"]) ** 0.5 if peak and free > 0 else None
            limits.append({"model": name, "frames": frames, "side": side, "from": _name(row)})
    return limits


def _name(row: dict[str, Any]) -> str:
    return resolution_name(row["height"], row["width"])


def write_report(report: Report, folder: Path) -> None:
    """Write `results.json` and `results.csv`."""
    write_text(folder / JSON_FILE, json.dumps(report, indent=1, allow_nan=False) + "\n")
    flat = [_flatten(row) for row in report["rows"]]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    write_csv(folder / CSV_FILE, columns, ([row.get(name) for name in columns] for row in flat))


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if not isinstance(value, dict):
            flat[name] = value
            continue
        for key, inner in value.items():
            if key == "quartiles":
                flat[f"{name}_q1"], flat[f"{name}_q3"] = inner
            else:
                flat[f"{name}_{key}"] = inner
    return flat


def read_report(path: Path) -> Report:
    """Read a report written by `write_report`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path}: not valid JSON: {error}") from error
    if not isinstance(report, dict) or "rows" not in report:
        raise InvalidInput(f"{path}: not a report of this benchmark, which its output folder holds as {JSON_FILE}")
    return report
