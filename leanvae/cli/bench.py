"""The subcommand `bench_res`: its flags and its output. Nothing heavy is imported before it runs."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvae.cli.flags import add_device, add_strict, find_device
from litevae.errors import InvalidInput, MissingFile, extra

if TYPE_CHECKING:
    from leanvae.bench.settings import BenchSettings

SUMMARY = "Measure the cost of VAEs at a resolution: FLOPs, time and memory, ours and others."
DEFAULT_OUTPUT = "runs/bench"
_DEFAULT_MINUTES = 10.0
_LIST = "; separated by spaces or commas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"names, checkpoint folders or package.module:factory{_LIST}; default: all names",
    )
    parser.add_argument(
        "--resolutions", nargs="+", metavar="RESOLUTION", help=f"256, 480x640 (height first) or 1080p{_LIST}"
    )
    parser.add_argument("--frames", nargs="+", metavar="N", help=f"numbers of frames of clips{_LIST}; default: 17")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help=f"whole, compiled, chunked, tiled{_LIST}")
    parser.add_argument(
        "--dtype", nargs="+", metavar="DTYPE", help=f"float32, bfloat16, float16{_LIST}; default: float32"
    )
    add_device(parser)
    parser.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="folder of the results, where an interrupted run resumes; default: %(default)s",
    )
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help=f"time for the whole run; default: {_DEFAULT_MINUTES:.0f}"
    )
    parser.add_argument("--full", action="store_true", help="measure everything, without a time limit")
    parser.add_argument(
        "--table3", action="store_true", help="only Table 3 of the LiteVAE paper; with --full also M and L"
    )
    parser.add_argument("--reconstruction", metavar="DIR", help="clips and images that models with weights reconstruct")
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="print the ratios of two results")
    add_strict(parser, "a measurement that fails")


def run(args: argparse.Namespace) -> int:
    """Measure or compare according to the flags; print, write and draw the results.

    Returns:
        0, or 3 with `--strict` if a measurement failed.

    Raises:
        MissingPackage: the extra `bench` is not installed.
        ValueError: a flag is wrong; the message lists the valid values.
    """
    for package in ("rich", "matplotlib", "psutil", "tqdm"):
        with extra("bench"):
            importlib.import_module(package)
    if args.compare:
        return _compare(*map(Path, args.compare))
    settings = _settings(args)

    from leanvae.bench.plots import write_plots
    from leanvae.bench.report import make_report, write_report
    from leanvae.bench.run import Benchmark
    from leanvae.bench.tables import print_report

    if args.reconstruction and not Path(args.reconstruction).exists():
        raise MissingFile(f"--reconstruction {args.reconstruction}: no such file or folder")
    bench = Benchmark(settings)
    report: dict[str, Any] = {}
    try:
        bench.run()
    finally:  # even if interrupted
        report = make_report(bench)
        write_report(report, settings.output)
    if args.reconstruction:
        report["reconstruction"] = _judge_all(bench, Path(args.reconstruction))
        write_report(report, settings.output)
    print_report(report)
    plots = write_plots(report, settings.output)
    print(f"{settings.output}: results.json, results.csv, {', '.join(path.name for path in plots)}")
    failed = [row for row in report["rows"] if row["status"] != "ok"]
    return 3 if args.strict and failed else 0


def _settings(args: argparse.Namespace) -> "BenchSettings":
    """Check the flags and return the settings."""
    from leanvae.bench.jobs import DTYPES
    from leanvae.bench.modes import MODES
    from leanvae.bench.settings import BenchSettings, table3_models
    from leanvae.bench.sizes import parse_frames, parse_resolution
    from leanvae.peers.registry import REGISTRY, choose, find_model

    models = table3_models(args.full) if args.table3 else _split(args.models) or tuple(REGISTRY)
    for name in models:
        find_model(name)
    resolutions, frames, modes = _split(args.resolutions), _split(args.frames), _split(args.modes)
    if args.budget is not None and (args.full or args.budget <= 0):
        raise InvalidInput("--budget: expected minutes above 0, and not together with --full")
    dtypes = _split(args.dtype) or (("float32", "bfloat16") if args.full and not args.table3 else ("float32",))
    return BenchSettings(
        models=models,
        resolutions=tuple(map(parse_resolution, resolutions)) if resolutions else None,
        frames=tuple(map(parse_frames, frames)) if frames else None,
        modes=tuple(choose("mode", mode, MODES) for mode in modes) if modes else None,
        dtypes=tuple(choose("dtype", dtype, DTYPES) for dtype in dtypes),
        device=find_device(args.device),
        output=Path(args.output),
        budget=None if args.full else 60 * (args.budget or _DEFAULT_MINUTES),
        table3=args.table3,
    )


def _split(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return values separated by spaces or commas, each once; None if there are none."""
    parts = [part for value in values or () for part in value.split(",") if part]
    return tuple(dict.fromkeys(parts)) or None


def _judge_all(bench: Any, folder: Path) -> list[dict[str, Any]]:
    import torch

    from leanvae.bench.quality import judge

    models = [model for model in bench.models.values() if model.has_weights]
    if not models:
        raise InvalidInput("--reconstruction: none of the models has weights; name a checkpoint folder with --models")
    dtype = getattr(torch, bench.settings.dtypes[0])
    return [judge(model, folder, bench.settings.device, dtype) for model in models]


def _compare(before: Path, after: Path) -> int:
    from leanvae.bench.compare import compare_reports, print_comparison
    from leanvae.bench.report import read_report

    entries = compare_reports(read_report(before), read_report(after))
    if not entries:
        raise InvalidInput(f"{before} and {after} have no measurement in common")
    print_comparison(entries, (str(before), str(after)))
    return 0
