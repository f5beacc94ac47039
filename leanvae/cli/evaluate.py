"""The subcommand `evaluate`: its flags and its output. Nothing heavy is imported before it runs."""

import argparse
from typing import Any

from leanvae.cli.flags import (
    add_device,
    add_dtype,
    add_local_rank,
    add_strict,
    device_of_rank,
    find_dtype,
    keep_threads_from_spinning,
)
from litevae.errors import InvalidInput

SUMMARY = "Evaluate autoencoders and baselines on clips and images, with tables and a page to look at."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="checkpoint folders, files or names (docs/weights.md), MODEL=WEIGHTS for a model of diffusers (its class,"
        " or a name of bench_res),"
        " identity, jpeg:QUALITY, h264:CRF, bicubic:FACTOR; several are compared side by side",
    )
    parser.add_argument(
        "--input", required=True, metavar="DIR_OR_LIST", help="folder, clip, image, or .txt with a path on each line"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the results, where an interrupted run resumes"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="most frames of a clip, from its start; default: all")
    parser.add_argument(
        "--resolution",
        metavar="RESOLUTION",
        help="256, 480x640 (height first) or 1080p; frames are resized to cover it and cropped; default: unchanged",
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="most frames that a model gets at a time; default: as memory allows"
    )
    parser.add_argument(
        "--tile", type=int, nargs=2, metavar=("H", "W"), help="largest tile in pixels; default: as memory allows"
    )
    parser.add_argument(
        "--weights", metavar="DIR", help="folder of the weights for LPIPS, rFID and rFVD; default: torch's cache"
    )
    parser.add_argument(
        "--shown",
        type=int,
        default=100,
        metavar="N",
        help="most files with pictures; if there are more, the worst and the best; default: %(default)s",
    )
    add_device(parser)
    add_dtype(parser, what="the models")
    add_strict(parser)
    add_local_rank(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the totals; return the exit status."""
    keep_threads_from_spinning()

    from leanvae.bench.sizes import parse_resolution
    from leanvae.distributed import rank
    from leanvae.evaluation.page import PAGE_FILE
    from leanvae.evaluation.run import EvaluationSettings, evaluate

    for name, least in (("frames", 1), ("chunk", 1), ("shown", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InvalidInput(f"--{name} {value}: expected a whole number from {least}")
    settings = EvaluationSettings(
        args.frames,
        parse_resolution(args.resolution) if args.resolution else None,
        args.chunk,
        tuple(args.tile) if args.tile else None,
        args.shown,
    )
    report = evaluate(
        args.checkpoint,
        args.input,
        args.output,
        device_of_rank(args.device),
        find_dtype(args.dtype),
        settings,
        args.weights,
        strict=args.strict,
    )
    if rank() == 0:
        print(totals_table(report))
        print(f"{report['files']} files evaluated, {len(report['skipped'])} skipped: {args.output}/{PAGE_FILE}")
    return 0


_COLUMNS = (
    ("psnr", "PSNR", 2),
    ("ssim", "SSIM", 4),
    ("ms_ssim", "MS-SSIM", 4),
    ("lpips", "LPIPS", 4),
    ("rfid", "rFID", 3),
    ("rfvd", "rFVD", 3),
    ("flicker", "flicker", 4),
    ("block_score", "blocks", 3),
    ("tile_seam", "tile seam", 3),
    ("chunk_seam", "chunk seam", 3),
)


def totals_table(report: dict[str, Any]) -> str:
    """Return the totals as a table of text, without empty columns."""
    models = report["models"]
    columns = [column for column in _COLUMNS if any(model[column[0]]["value"] is not None for model in models)]
    lines = [["model", *(label for _, label, _ in columns)]]
    for model in models:
        values = [(model[name]["value"], digits) for name, _, digits in columns]
        lines.append([model["name"], *("-" if value is None else f"{value:.{digits}f}" for value, digits in values)])
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
