"""The subcommand `encode_clips`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from leanvae.cli.flags import (
    add_checkpoint,
    add_device,
    add_dtype,
    add_local_rank,
    add_strict,
    device_of_rank,
    find_dtype,
    keep_threads_from_spinning,
)
from litevae.errors import InvalidInput, WorkIncomplete

if TYPE_CHECKING:
    from leanvae.latents.clips import ClipRule
    from leanvae.latents.encoder import EncodeJob

SUMMARY = "Encode clips into a latent store, also with torchrun, deepspeed or a Ray cluster."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_checkpoint(parser)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="folders, globs, videos, lists (.txt), tables (.csv, .parquet) or WebDataset tars; also fsspec addresses",
    )
    parser.add_argument("--output", required=True, metavar="STORE", help="folder or fsspec address of the store")
    rule = parser.add_argument_group("clips")
    rule.add_argument("--frames", type=int, metavar="N", help="frames of a clip; default: each file is one clip")
    rule.add_argument("--stride", type=int, default=1, metavar="N", help="take every Nth frame; default: %(default)s")
    rule.add_argument(
        "--every", type=int, metavar="N", help="start a clip every N frames of the file; default: clips touch"
    )
    rule.add_argument(
        "--resolution",
        nargs="+",
        default=[],
        metavar="HEIGHTxWIDTH",
        help="resize to cover this size and crop; of several, each file uses the best fit; default: unchanged",
    )
    stored = parser.add_argument_group("latents")
    stored.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="type of the latents; default: %(default)s"
    )
    add_dtype(stored, "--compute-dtype")
    stored.add_argument("--flips", action="store_true", help="also encode each clip mirrored horizontally")
    stored.add_argument("--thumbnails", action="store_true", help="also keep the first frame of each clip as JPEG")
    stored.add_argument(
        "--update-checkpoint",
        action="store_true",
        help="write the latents' mean and standard deviation into the checkpoint's config.json",
    )
    work = parser.add_argument_group("work")
    add_device(work)
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    work.add_argument("--batch-size", type=int, default=4, metavar="N", help="clips at once; default: %(default)s")
    work.add_argument("--workers", type=int, default=2, metavar="N", help="decoder processes; default: %(default)s")
    work.add_argument("--nvdec", action="store_true", help="decode on the model's GPU (torchcodec)")
    work.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds that a decoder may be silent")
    work.add_argument("--memory-limit", metavar="SIZE", help="memory for the model's work, such as 6GiB")
    work.add_argument("--shard-size", default="256MiB", metavar="SIZE", help="default: %(default)s")
    add_strict(work)
    add_local_rank(parser)


def run(args: argparse.Namespace) -> int:
    """Encode and print the summary as JSON; return 0.

    Raises:
        WorkIncomplete: sources were lost, or skipped with `--strict`.
    """
    keep_threads_from_spinning()

    from leanvae.distributed import rank
    from leanvae.latents.encode import encode_clips
    from litevae.memory import parse_bytes

    summary = encode_clips(
        args.input,
        args.output,
        _job(args),
        device_of_rank(args.device),
        args.engine,
        parse_bytes(args.shard_size),
        args.update_checkpoint,
    )
    if rank() == 0:
        print(json.dumps(summary))
    if summary["unfinished"]:
        raise WorkIncomplete(f"{summary['unfinished']} of {summary['sources']} sources were lost: start it again")
    if args.strict and summary["skipped"]:
        raise WorkIncomplete(f"{len(summary['skipped'])} of {summary['sources']} sources were skipped, with --strict")
    return 0


def _job(args: argparse.Namespace) -> "EncodeJob":
    import torch

    from leanvae.latents.encoder import EncodeJob

    for name in ("batch_size", "workers"):
        if getattr(args, name) < 1:
            raise InvalidInput(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not args.timeout > 0:
        raise InvalidInput(f"--timeout: expected seconds above 0, got {args.timeout:g}")
    return EncodeJob(
        args.checkpoint,
        _rule(args),
        getattr(torch, args.dtype),
        find_dtype(args.compute_dtype),
        args.batch_size,
        args.flips,
        args.thumbnails,
        args.workers,
        args.timeout,
        args.memory_limit,
        args.nvdec,
    )


def _rule(args: argparse.Namespace) -> "ClipRule":
    from leanvae.config import parse_config
    from leanvae.latents.clips import ClipRule

    tree: dict[str, Any] = {"frames": args.frames, "stride": args.stride, "every": args.every}
    return parse_config(ClipRule, {**tree, "resolutions": args.resolution}, "the command line")
