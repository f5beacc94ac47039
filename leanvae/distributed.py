"""What the processes of a run do together, and how they learn that they should stop."""

import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from litevae.errors import InvalidInput, MissingPackage

logger = logging.getLogger("leanvae")

T = TypeVar("T")

LOCK_FILE = ".lock"
_SECONDS_FOR_THE_OTHER_RUN = 120.0
_LONGEST_WAIT_FOR_OTHER_RANKS = timedelta(days=14)


def rank() -> int:
    """Number of this process; 0 is the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def join_ranks() -> Iterator[None]:
    """Joins the other ranks that `torchrun` or `deepspeed` started, if one did, for work that needs no DeepSpeed.

    A rank ends at once when its launcher is killed, which leaves its ranks behind, be they at work or waiting for each
    other, which nothing else interrupts. So it is for work that a kill cannot harm.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    threading.Thread(target=_end_with_launcher, args=(_launcher(),), daemon=True).start()
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT_FOR_OTHER_RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _launcher() -> int | None:
    """The process that started this rank; None where torchrun did, and has been killed already."""
    import psutil

    parent = psutil.Process(os.getppid())
    if parent.pid == 1 and "TORCHELASTIC_RUN_ID" in os.environ and "torch" not in " ".join(parent.cmdline()):
        return None
    return parent.pid


def _end_with_launcher(launcher: int | None) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    logger.error("the launcher has ended")
    os._exit(1)


def start_processes(engine: str) -> torch.device:
    """Joins the ranks that a launcher started, or makes a world of one, and returns this rank's device.

    Works under `deepspeed`, `torchrun` and plain `python`.

    Raises:
        ValueError: `engine` is plain and there are several ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if engine == "plain":
        if world_size > 1:
            raise InvalidInput(f"training.engine is plain: it runs in one process, not in {world_size} ranks")
        return device
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackage(
            "training.engine is deepspeed, which is not installed: pip install 'leanvae[train]', "
            "or --set training.engine=plain"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Does work on the main rank alone and hands the result, or the error, to every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def lock_folder(folder: Path, wait: float = _SECONDS_FOR_THE_OTHER_RUN) -> int:
    """Takes a run's folder for this process, until it closes the returned file descriptor or ends.

    Args:
        folder: the run's output folder.
        wait: seconds to wait for another run, which may be about to end.

    Raises:
        ValueError: another run still writes to the folder after that time.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise InvalidInput(
                    f"{folder}: another run (process {owner}) writes here: stop it, or choose another --output"
                ) from None
            time.sleep(0.2)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


class StopRequests:
    """Remembers SIGTERM and SIGINT, and notices when DeepSpeed's launcher has died.

    `deepspeed` starts a launcher on each node, which starts the ranks. Killed, neither takes its children along; a
    rank without them takes it for SIGTERM, or it would train on beside the run that is started next.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._launchers = _launchers()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals for the length of a block."""
        handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def pending(self) -> int:
        """The signal that asks this process to stop, or 0."""
        if not self._signal and self._launchers != _launchers():
            self._signal = int(signal.SIGTERM)
        return self._signal


def _launchers() -> tuple[int, int] | None:
    """Process numbers of DeepSpeed's launcher on this node and of what started it; `None` under other launchers."""
    import psutil

    try:
        parent = psutil.Process(os.getppid())
        return (parent.pid, parent.ppid()) if "deepspeed.launcher.launch" in parent.cmdline() else None
    except psutil.Error:
        return None


def max_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """The highest of each value over all ranks."""
    if not dist.is_initialized():
        return values
    packed = torch.tensor(values, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return packed.tolist()
