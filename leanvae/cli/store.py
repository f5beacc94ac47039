"""The subcommand `store`, with its actions `verify` and `info`."""

import argparse
import json

from leanvae.cli.flags import add_device, find_device
from litevae.errors import WorkIncomplete

SUMMARY = "Check or describe a latent store."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `store verify` and `store info`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="read everything again, and compare a sample with the sources")
    verify.add_argument("store", metavar="STORE", help="folder or fsspec address")
    verify.add_argument("--checkpoint", help="the checkpoint that it was encoded with; without it, no clip is decoded")
    verify.add_argument("--samples", type=int, default=8, metavar="N", help="clips to decode; default: %(default)s")
    add_device(verify)
    info = actions.add_parser("info", help="describe it as JSON")
    info.add_argument("store", metavar="STORE", help="folder or fsspec address")


def run(args: argparse.Namespace) -> int:
    """Check or describe a store, and print JSON.

    Returns:
        0.

    Raises:
        WorkIncomplete: something is wrong with the store.
    """
    from leanvae.latents.verify import store_info, verify_store

    if args.action == "info":
        print(json.dumps(store_info(args.store), indent=2))
        return 0

    report = verify_store(args.store, args.checkpoint, args.samples, find_device(args.device))
    print(json.dumps(report, indent=2))
    if report["problems"]:
        raise WorkIncomplete(f"{args.store}: {len(report['problems'])} problems, listed above")
    return 0
