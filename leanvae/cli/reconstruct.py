"""The subcommand `reconstruct`."""

import argparse

from leanvae.cli.flags import add_checkpoint, add_device, add_dtype, add_strict, find_device, find_dtype

SUMMARY = "Encode and decode a clip, an image, or a folder of both, and measure PSNR and SSIM."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("file", nargs="?", metavar="FILE_OR_DIR", help="clip, image, or folder of both")
    inputs.add_argument("--input", metavar="FILE_OR_DIR", help="the same")
    add_checkpoint(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    add_device(parser)
    add_dtype(parser)
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 6GiB, for the model's work without its weights; default: the device's free memory",
    )
    add_strict(parser)


def run(args: argparse.Namespace) -> int:
    """Reconstruct and print the totals; return the exit status."""
    from leanvae.reconstruct import METRICS_FILE, reconstruct

    report = reconstruct(
        args.checkpoint,
        args.input or args.file,
        args.output,
        find_device(args.device),
        find_dtype(args.dtype),
        memory_limit=args.memory_limit,
        strict=args.strict,
    )
    total = report["total"]
    measures = [
        "" if total["psnr"] is None else f", PSNR {total['psnr']:.2f} dB",
        "" if total["ssim"] is None else f", SSIM {total['ssim']:.4f}",
    ]
    print(
        f"{total['files']} reconstructed, {total['skipped']} skipped, {total['frames']} frames{''.join(measures)}:"
        f" {args.output}/{METRICS_FILE}"
    )
    return 0
