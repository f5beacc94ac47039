"""The flags of `encode_clips`, `decode_latents` and `store`, and what these do; nothing heavy is imported before."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from litevae.errors import InvalidInput

if TYPE_CHECKING:
    from leanvae.latents.engines import Work
    from leanvae.latents.rule import ClipRule

ENCODE_SUMMARY = "Encode clips into a store of latents; also started by torchrun or deepspeed, or on a Ray cluster."
DECODE_SUMMARY = "Decode a store of latents, or single entries of one, to clips of their sources' size and rate."
STORE_SUMMARY = "Check a store of latents, or say what it holds."
_DTYPES = ("float32", "bfloat16", "float16")


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `encode_clips`."""
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or published .ckpt file")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="folders, globs, videos, lists (.txt), tables (.csv, .parquet) or WebDataset tars; fsspec addresses too",
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
        help="resize to cover this and crop; of several, each file gets what fits it best; default: as they are",
    )
    stored = parser.add_argument_group("latents")
    stored.add_argument(
        "--dtype", choices=("float16", "bfloat16"), default="float16", help="type of the latents; default: %(default)s"
    )
    stored.add_argument("--compute-dtype", choices=_DTYPES, help="type of the weights; default: as stored")
    stored.add_argument("--flips", action="store_true", help="also encode each clip mirrored left to right")
    stored.add_argument("--thumbnails", action="store_true", help="also keep the first frame of each clip as JPEG")
    stored.add_argument(
        "--update-checkpoint",
        action="store_true",
        help="write the latents' mean and standard deviation into the checkpoint's config.json",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    work.add_argument("--batch-size", type=int, default=4, metavar="N", help="clips at once; default: %(default)s")
    work.add_argument("--workers", type=int, default=2, metavar="N", help="decoder processes; default: %(default)s")
    work.add_argument("--nvdec", action="store_true", help="decode by the GPU that the model is on (torchcodec)")
    work.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds that a decoder may be silent")
    work.add_argument("--memory-limit", metavar="SIZE", help="memory of the model's work, such as 6GiB")
    work.add_argument("--shard-size", default="256MiB", metavar="SIZE", help="default: %(default)s")
    work.add_argument("--strict", action="store_true", help="a file that has to be skipped is an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run_encode(args: argparse.Namespace) -> int:
    """Encodes, and prints the summary as JSON.

    Returns:
        0 if all the work was done; 3 if sources were lost, or skipped with `--strict`.
    """
    # Decoder processes share a CPU's cores with torch, whose threads would spin through their share while waiting
    # for each other; it reads this when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from leanvae.latents.encode import encode_clips
    from leanvae.training.ranks import rank
    from litevae.memory import parse_bytes

    summary = encode_clips(
        args.input,
        args.output,
        _work(args),
        _device_of_rank(args.device),
        args.engine,
        parse_bytes(args.shard_size),
        args.update_checkpoint,
    )
    if rank() == 0:
        print(json.dumps(summary))
    return 3 if summary["unfinished"] or (args.strict and summary["skipped"]) else 0


def _work(args: argparse.Namespace) -> "Work":
    import torch

    from leanvae.latents.engines import Work

    for name in ("batch_size", "workers"):
        if getattr(args, name) < 1:
            raise InvalidInput(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not args.timeout > 0:
        raise InvalidInput(f"--timeout: expected seconds above 0, got {args.timeout:g}")
    return Work(
        args.checkpoint,
        _rule(args),
        getattr(torch, args.dtype),
        getattr(torch, args.compute_dtype) if args.compute_dtype else None,
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
    from leanvae.latents.rule import ClipRule

    tree: dict[str, Any] = {"frames": args.frames, "stride": args.stride, "every": args.every}
    return parse_config(ClipRule, {**tree, "resolutions": args.resolution}, "the command line")


def _device_of_rank(name: str) -> str:
    """The device, of several GPUs on a node the one with the number of the rank there."""
    from leanvae.devices import find_device

    device = find_device(name)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `decode_latents`."""
    parser.add_argument("--checkpoint", required=True, help="the checkpoint that the latents were encoded with")
    parser.add_argument(
        "--input", required=True, metavar="STORE", help="store, or a file KEY.safetensors with KEY.json beside it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the clips, KEY.mp4 each")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="entries to decode; default: all")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the weights; default: as stored")


def run_decode(args: argparse.Namespace) -> int:
    """Decodes; returns 0."""
    import torch

    from leanvae.devices import find_device
    from leanvae.latents.decode import decode_latents

    dtype = getattr(torch, args.dtype) if args.dtype else None
    counts = decode_latents(args.checkpoint, args.input, args.output, find_device(args.device), dtype, args.keys)
    print(f"{counts['decoded']} decoded, {counts['present']} were there: {args.output}")
    return 0


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `store verify` and `store info`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="read all of it again, and compare a sample with the sources")
    verify.add_argument("store", metavar="STORE", help="folder or fsspec address")
    verify.add_argument("--checkpoint", help="what it was encoded with; without it, no clip is decoded")
    verify.add_argument("--samples", type=int, default=8, metavar="N", help="clips to decode; default: %(default)s")
    verify.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    info = actions.add_parser("info", help="say what it holds, as JSON")
    info.add_argument("store", metavar="STORE", help="folder or fsspec address")


def run_store(args: argparse.Namespace) -> int:
    """Checks or describes a store, and prints JSON; returns 3 if it found something wrong."""
    from leanvae.latents.verify import describe_store, verify_store

    if args.action == "info":
        print(json.dumps(describe_store(args.store), indent=2))
        return 0

    from leanvae.devices import find_device

    report = verify_store(args.store, args.checkpoint, args.samples, find_device(args.device))
    print(json.dumps(report, indent=2))
    return 3 if report["problems"] else 0
