"""Run by `test_distributed.py` as each of two ranks, whose default group gives up after two seconds.

Its argument names what they do.
"""

import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from leanvae import distributed as D
from litevae.errors import RAISED_ON_MAIN

PATIENCE = 2.0  # seconds of the default group


class Unsendable(Exception):
    def __init__(self, file, line):
        super().__init__(f"{file}, line {line}")


def work_long():
    """Rank 0 works for longer than the default group waits, three times."""
    assert D.on_main(lambda: time.sleep(2 * PATIENCE) or "done") == "done"
    if D.rank() == 0:
        time.sleep(2 * PATIENCE)
    assert D.gather(D.rank()) == [0, 1]
    if D.rank() == 0:
        time.sleep(2 * PATIENCE)
    D.barrier()
    assert D.max_over_ranks([D.rank(), -D.rank()]) == [1, 0]


def raise_on_main():
    """Rank 0 raises an error that cannot be recreated from its arguments."""

    def work():
        raise Unsendable("a.py", 3)

    with pytest.raises(RuntimeError if D.rank() else Unsendable, match=r"a\.py, line 3") as raised:
        D.on_main(work)
    assert getattr(raised.value, "__notes__", []) == [RAISED_ON_MAIN] * D.rank()
    assert D.gather(D.rank()) == [0, 1]


def die():
    """Rank 1 is killed while rank 0 waits for it."""
    if D.rank() == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    D.barrier()


def leave():
    """Rank 1 leaves after an error, and its process goes on for a while."""
    if D.rank() == 1:
        D.stop_processes()
        time.sleep(60.0)
    D.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    D.start_processes("deepspeed")
    globals()[sys.argv[1]]()
    D.stop_processes()
    print(f"rank {D.rank()} done")
    sys.stdout.flush()
    os._exit(0)
