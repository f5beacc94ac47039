"""The subcommand `analyse`: its flags and its output."""

import argparse
from typing import Any

from leanvae.cli.flags import add_device, add_dtype, add_strict, find_device, find_dtype

SUMMARY = "Compare image autoencoders: latent space, feature maps, and quality against resolution."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="checkpoint folders of image autoencoders, compared side by side",
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--resolutions", type=int, nargs="+", metavar="PIXELS", help="sides to measure at; default: 32 64 128 256 512"
    )
    parser.add_argument(
        "--size", type=int, default=256, help="side for latents, feature maps and pictures; default: %(default)s"
    )
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="images to show; default: %(default)s")
    add_device(parser)
    add_dtype(parser)
    add_strict(parser, "a skipped image")


def run(args: argparse.Namespace) -> int:
    """Analyse and print the tables; return the exit status."""
    from leanvae.evaluation.analysis import ANALYSIS_FILE, analyse
    from leanvae.evaluation.analysis_record import RESOLUTIONS, Study

    study = Study(args.resolutions or RESOLUTIONS, args.size, num_pictures=args.pictures)
    report = analyse(
        args.checkpoint, args.input, args.output, find_device(args.device), find_dtype(args.dtype), study, args.strict
    )
    print(measures_table(report))
    print(f"{report['images']} images analysed, {len(report['skipped'])} skipped: {args.output}/{ANALYSIS_FILE}")
    return 0


def measures_table(report: dict[str, Any]) -> str:
    """Return a report's tables as text: a line for each model and measure."""
    lines = []
    for model in report["models"]:
        lines.append(model["name"])
        for measure, digits in (("psnr", 2), ("ssim", 4), ("lpips", 4)):
            cells = [(row["resolution"], row.get(measure)) for row in model["resolution"]]
            if any(value is not None for _, value in cells):
                line = "  ".join(f"{side}: {'-' if value is None else f'{value:.{digits}f}'}" for side, value in cells)
                lines.append(f"  {measure.upper():<10}{line}")
        values = [f"{row['sigma']:g}: {row['mean']:.3g} ± {row['std']:.1g}" for row in model["mmd"]["values"]]
        if values:
            lines.append(f"  {'MMD^2':<10}{'  '.join(values)}")
        imbalance = model["imbalance"]
        if imbalance is not None:
            peak = "infinite" if imbalance["peak_ratio"] is None else f"{imbalance['peak_ratio']:.2f}"
            lines.append(f"  {'features':<10}peak / median {peak}, top 1% has {imbalance['top_share']:.1%} of energy")
    return "\n".join(lines)
