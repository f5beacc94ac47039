"""Flags shared by several commands, and their values."""

import argparse
import os
from typing import TYPE_CHECKING

from litevae.errors import InvalidInput

if TYPE_CHECKING:
    import torch

DEFAULT_CHECKPOINT = "lean-small-c16"
DTYPES = ("float32", "bfloat16", "float16")


def add_checkpoint(parser: "argparse._ActionsContainer", what: str = "") -> None:
    """Add `--checkpoint`, with weights of the package as the default."""
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="WEIGHTS",
        help=f"{what}checkpoint folder, published .ckpt file, weights in the package, or OWNER/NAME[/FILE.ckpt]"
        "[@REVISION] on the Hugging Face hub; default: %(default)s",
    )


def add_device(parser: "argparse._ActionsContainer") -> None:
    """Add `--device`; `find_device` reads it."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")


def find_device(name: str) -> str:
    """Find the device that a command line names.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, ...; `auto` for a GPU if there is one.

    Raises:
        InvalidInput: the device does not exist or cannot be used.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def device_of_rank(name: str) -> str:
    """Find the device of this rank: `cuda` is the GPU with the rank's number on its node."""
    device = find_device(name)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def add_dtype(parser: "argparse._ActionsContainer", flag: str = "--dtype", what: str = "the weights") -> None:
    """Add a flag for a type, that of the checkpoint by default; `find_dtype` reads it."""
    parser.add_argument(flag, choices=DTYPES, help=f"type of {what}; default: as stored, or float32 for float16")


def find_dtype(name: str | None) -> "torch.dtype | None":
    """Return the type with this name; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def add_strict(parser: "argparse._ActionsContainer", what: str = "a skipped file") -> None:
    """Add `--strict`."""
    parser.add_argument("--strict", action="store_true", help=f"{what} is an error")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept the flag that the launchers of DeepSpeed and torch pass; the environment has the same value."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def keep_threads_from_spinning() -> None:
    """Make torch's threads sleep while they wait for each other; call this before importing torch.

    Decoder processes share the cores with these threads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
