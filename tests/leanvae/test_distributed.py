"""Ranks together: waiting, dying, and the main rank."""

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from leanvae import distributed as D

PROGRAM = Path(__file__).with_name("distributed_program.py")


@pytest.fixture
def start_ranks():
    """A function that starts two ranks with a task, and returns their processes."""
    processes = []

    def start(task):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        for number in ("0", "1"):
            environment = {**os.environ, **world, "RANK": number, "LOCAL_RANK": number}
            command = [sys.executable, str(PROGRAM), task]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **streams))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.distributed
@pytest.mark.parametrize("task", ["work_long", "raise_on_main"])
def test_ranks_wait_for_what_the_main_one_does_alone(start_ranks, task):
    """Longer than in DeepSpeed's own group, which gives up after ten minutes."""
    for number, process in enumerate(start_ranks(task)):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        assert f"rank {number} done" in output


@pytest.mark.distributed
@pytest.mark.parametrize("task", ["die", "leave"])
def test_nobody_waits_for_a_rank_that_is_gone(start_ranks, task):
    waiting, gone = start_ranks(task)
    output, _ = waiting.communicate(timeout=50)
    assert waiting.returncode == 1, output[-3000:]
    assert "closed by peer" in output or "reset by peer" in output
    assert task == "die" or gone.poll() is None


def test_ranks_know_their_number_without_a_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")  # of something else: there is one process
    assert (D.rank(), D.world_size()) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (D.rank(), D.world_size()) == (1, 2)


def test_one_process_works_alone():
    assert D.on_main(lambda: 3) == 3
    assert D.gather("a") == ["a"]
    assert D.max_over_ranks([1, 2]) == [1, 2]
    torch.testing.assert_close(D.mean_over_ranks(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    D.barrier()
    D.stop_processes()


def test_a_folder_that_cannot_be_taken_is_let_go(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(D.os, "open", lambda *arguments: opened.append(open_file(*arguments)) or opened[-1])
    with monkeypatch.context() as full_disk:
        full_disk.setattr(D.os, "pwrite", raise_full)
        with pytest.raises(OSError, match="No space left"):
            D.lock_folder(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    os.close(D.lock_folder(tmp_path, wait=0.0))


def open_file(*arguments, open_=os.open):
    return open_(*arguments)


def raise_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_rank_ends_with_its_launcher():
    """Even in a wait that no signal handler of Python's interrupts."""
    program = (
        "import os, signal, threading, time\n"
        "from leanvae import distributed as D\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "threading.Thread(target=D._end_with_launcher, args=(os.getppid() + 1,), daemon=True).start()\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == -9
    assert "the launcher has ended" in done.stderr
    assert time.monotonic() - started < 50
