"""Memory: how much is free, limits as users write them, and out-of-memory errors."""

import ctypes
import logging
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from litevae.errors import InvalidInput

logger = logging.getLogger("leanvae")

PlanT = TypeVar("PlanT")
ResultT = TypeVar("ResultT")

SHARE_OF_FREE = 0.9  # of a device's free memory that a plan may take; its libraries need the rest

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("KMGT", start=1)
}
_OUT_OF_MEMORY_WORDS = ("not enough memory", "allocate memory", "out of memory", "could not allocate", "bad_alloc")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Return the bytes of `"6GiB"`, `"512 MiB"`, `"1.5GB"` or a plain number.

    Raises:
        ValueError: it has another form, or is not above zero.
    """
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    try:
        if isinstance(size, str):
            match = _SIZE.fullmatch(size)
            number = int(float(match[1]) * units[match[2].lower()]) if match else 0
        else:
            number = operator.index(size)
    except (KeyError, TypeError):
        number = 0
    if isinstance(size, bool) or number <= 0:
        raise InvalidInput(
            f"memory_limit is {size!r}: expected a positive number of bytes, or one with a unit, such as "
            f"'6GiB', '512MiB' or '6GB'"
        )
    return number


def format_bytes(number: float) -> str:
    """Format bytes for a message, in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes available on a CUDA device, including its allocator's unused ones; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def return_freed_memory(device: torch.device) -> None:
    """Make a CPU's heap return freed memory, which tensors kept between parts otherwise prevent."""
    if device.type == "cpu" and (trim := _heap_trimmer()) is not None:
        trim(0)


@cache
def _heap_trimmer() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a failed allocation, on a device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)


def retry_smaller(
    run: Callable[[PlanT], ResultT], plan: PlanT, halved: Callable[[PlanT], PlanT | None], what: str
) -> ResultT:
    """Run a plan; if memory runs out, log that and run the halved one.

    Args:
        run: does the work by a plan; it must be safe to repeat after a failure.
        plan: the first plan.
        halved: gives the next smaller plan, or None.
        what: name of the work for the log.

    Raises:
        RuntimeError: memory ran out again, or there is no smaller plan.
    """
    try:
        return run(plan)
    except (RuntimeError, MemoryError) as error:
        smaller = halved(plan) if is_out_of_memory(error) else None
        if smaller is None:
            raise
        logger.warning("%s: out of memory (%s); trying again with %s", what, str(error).splitlines()[0], smaller)
    empty_cache()  # outside the handler, after which the error's frames and their tensors are gone
    return run(smaller)


def empty_cache() -> None:
    """Make torch return a GPU's unused memory, so that it is available in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
