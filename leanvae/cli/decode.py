"""The subcommand `decode_latents`."""

import argparse

from leanvae.cli.flags import add_checkpoint, add_device, add_dtype, find_device, find_dtype

SUMMARY = "Decode a latent store, or single entries, to clips of their sources' size and rate."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_checkpoint(parser, "what the latents were encoded with: ")
    parser.add_argument(
        "--input", required=True, metavar="STORE", help="store, or a file KEY.safetensors with KEY.json beside it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the clips, KEY.mp4 each")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="entries to decode; default: all")
    add_device(parser)
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Decode; return 0."""
    from leanvae.latents.decode import decode_latents

    counts = decode_latents(
        args.checkpoint, args.input, args.output, find_device(args.device), find_dtype(args.dtype), args.keys
    )
    print(f"{counts['decoded']} decoded, {counts['present']} already existed: {args.output}")
    return 0
