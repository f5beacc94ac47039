"""Communication between a run's processes, and the signals that stop them."""

import copy
import fcntl
import logging
import os
import pickle
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
from torch import Tensor

from litevae.errors import RAISED_ON_MAIN, InvalidInput, MissingPackage

logger = logging.getLogger("leanvae")

T = TypeVar("T")

LOCK_FILE = ".lock"
_SECONDS_FOR_THE_OTHER_RUN = 120.0
_LONGEST_WAIT = timedelta(days=14)

# The group in which ranks wait for work of a single rank, which may take hours. DeepSpeed's own group gives up after
# minutes. None is the default group.
_waiting_group: dist.ProcessGroup | None = None


def rank() -> int:
    """Return the number of this process; 0 is the main one. Before and after a process group exists, `RANK` tells."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of processes. Before and after a process group exists, `WORLD_SIZE` tells."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(engine: str) -> torch.device:
    """Join the ranks that a launcher started, or make a world of one, for training.

    Works under `deepspeed`, `torchrun` and plain `python`. `stop_processes` undoes it.

    Args:
        engine: `training.engine` of the configuration: `deepspeed` or `plain`.

    Returns:
        This rank's device.

    Raises:
        InvalidInput: `engine` is plain and there are several ranks.
        MissingPackage: DeepSpeed is not installed.
    """
    global _waiting_group
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if engine == "plain":
        if world_size() > 1:
            raise InvalidInput(f"training.engine is plain: it runs in one process, not in {world_size()} ranks")
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
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    assert isinstance(group, dist.ProcessGroup)
    _waiting_group = group
    return device


def stop_processes() -> None:
    """Leave the other ranks; those that wait for this one fail at once."""
    global _waiting_group
    if not dist.is_initialized():
        return
    if _waiting_group is not None:
        # First, because leaving a group of GPUs may wait.
        dist.destroy_process_group(_waiting_group)
        _waiting_group = None
    dist.destroy_process_group()


@contextmanager
def join_ranks() -> Iterator[None]:
    """Join the ranks that `torchrun` or `deepspeed` started, if one did, for work that needs no DeepSpeed.

    A killed launcher leaves its ranks behind. These end at once in that case, even while they wait for each other, so
    use this only for work that a kill cannot harm.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    threading.Thread(target=_end_with_launcher, args=(_launcher(),), daemon=True).start()
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _launcher() -> int | None:
    """Return the process that started this rank; None if that was torchrun and it has already been killed."""
    import psutil

    parent = psutil.Process(os.getppid())
    if parent.pid == 1 and "TORCHELASTIC_RUN_ID" in os.environ and "torch" not in " ".join(parent.cmdline()):
        return None
    return parent.pid


def _end_with_launcher(launcher: int | None) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    logger.error("the launcher has ended")
    os.kill(os.getpid(), signal.SIGKILL)  # nothing else interrupts a rank that waits for another


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier(group=_waiting_group)


def gather(value: T) -> list[T]:
    """Return the values of all ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_waiting_group)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Do work only on the main rank, without a time limit, and return its result on every rank.

    Raises:
        Exception: whatever `work` raises, on every rank; all but the main one add the note `RAISED_ON_MAIN`.
    """
    if not dist.is_initialized():
        return work()
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = work()
        except Exception as caught:
            error = caught
    told = [result, error and _as_others_get(error)]
    dist.broadcast_object_list(told, group=_waiting_group)
    result, raised = told
    if error is not None:
        raise error
    if raised is not None:
        raised.add_note(RAISED_ON_MAIN)
        raise raised
    return result


def _as_others_get(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks; one that cannot is replaced by a description."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # recreates it from its arguments, as unpickling on the other ranks does
    except Exception:
        return RuntimeError(f"the main rank: {type(error).__name__}: {error}")
    return error


def max_over_ranks(values: list[int]) -> list[int]:
    """Return the maximum of each value over all ranks."""
    if not dist.is_initialized():
        return values
    packed = torch.tensor(values)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=_waiting_group)
    return packed.tolist()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a tensor of the same shape over all ranks, on its device."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def lock_folder(folder: Path, wait: float = _SECONDS_FOR_THE_OTHER_RUN) -> int:
    """Take a run's folder for this process, until it closes the returned file descriptor or ends.

    Args:
        folder: the run's output folder.
        wait: seconds to wait for another run, which may be about to end.

    Raises:
        InvalidInput: another run still writes to the folder after that time.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + wait
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                    raise InvalidInput(
                        f"{folder}: another run (process {owner}) writes here: stop it, or choose another --output"
                    ) from None
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:  # such as a full disk
        os.close(descriptor)
        raise
    return descriptor


class StopRequests:
    """SIGTERM, SIGINT, and the death of DeepSpeed's launcher.

    `deepspeed` starts a launcher on each node, which starts the ranks. If either is killed, its children stay alive. A
    rank without its launcher acts as after SIGTERM; otherwise it would keep training beside the next run.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._launchers = _launchers()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals during a block."""
        handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def pending(self) -> int:
        """Return the signal that asks this process to stop, or 0."""
        if not self._signal and self._launchers != _launchers():
            self._signal = int(signal.SIGTERM)
        return self._signal


def _launchers() -> tuple[int, int] | None:
    """Return the processes of DeepSpeed's launcher on this node and of what started it; None under other launchers."""
    import psutil

    try:
        parent = psutil.Process(os.getppid())
        return (parent.pid, parent.ppid()) if "deepspeed.launcher.launch" in parent.cmdline() else None
    except psutil.Error:
        return None
