"""Decoder processes that die, hang or are stopped: replaced, and files are blamed only at the second time."""

import os
import signal
import textwrap
import time
from itertools import islice

import psutil
import pytest

from leanvae.data import workers as W
from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig
from leanvae.data.loader import Loader
from leanvae.data.order import phases_of
from leanvae.data.schedule import Schedule
from leanvae.data.sources import list_items

TIMEOUT = 0.5
ODD = """
    import os, signal, time

    def misbehave(how, times, log):
        with open(log, "a") as file:
            file.write(".")
        if os.path.getsize(log) > times:
            return "sample"
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        while how == "hanging":
            try:
                time.sleep(1)
            except SystemExit:
                pass
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "crashing": signal.SIGSEGV, "told": signal.SIGTERM}[how])
        time.sleep(60)
"""


@pytest.fixture
def misbehave(tmp_path, monkeypatch):
    """A function that processes can import."""
    (tmp_path / "odd.py").write_text(textwrap.dedent(ODD))
    monkeypatch.syspath_prepend(tmp_path)
    import odd  # pyright: ignore[reportMissingImports]

    return odd.misbehave


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "the decoder process died (exit code -9)"),
        ("crashing", "the decoder process died (exit code -11)"),
        pytest.param("stopped", "decoding took longer than 0.5 s", marks=pytest.mark.slow),
        ("hanging", "decoding took longer than 0.5 s"),
    ],
)
def test_a_file_is_blamed_at_the_second_time(misbehave, tmp_path, how, reason):
    with W.Decoders(1, TIMEOUT) as decoders:
        for times, result in ((1, "sample"), (9, reason)):
            log = tmp_path / str(times)
            assert decoders.result(decoders.begin(misbehave, how, times, str(log))) == result
            assert len(log.read_text()) == 2


def test_processes_told_to_end_blame_nobody(misbehave, tmp_path):
    with W.Decoders(1, 20.0) as decoders:
        assert decoders.result(decoders.begin(misbehave, "told", 3, str(tmp_path / "log"))) == "sample"
    assert len((tmp_path / "log").read_text()) == 4


@pytest.mark.slow
def test_stopped_idle_processes_are_replaced(write_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(W, "_START_SECONDS", 10.0)
    (tmp_path / "clips").mkdir()
    for index in range(4):
        write_clip(tmp_path / "clips" / f"clip{index}.mp4", seed=index)
    config = ClipDataConfig(
        sources=[str(tmp_path / "clips")], num_frames=5, num_workers=1, prefetch=1, timeout=TIMEOUT, flip=False
    )
    schedule = Schedule(config, list_items(config), None, phases_of([(1, {Shape(5, 16, 16): 2})]), 0)
    others = psutil.Process().children()
    with Loader(config, schedule, record=tmp_path / "quarantine.rank0.jsonl") as loader:
        steps = iter(loader)
        paths = [next(steps).paths]
        while not all(item.work.future.done() for _, step in loader._ahead for item in step):
            time.sleep(0.05)
        for child in psutil.Process().children():
            if child not in others:
                os.kill(child.pid, signal.SIGSTOP)
        paths += [step.paths for step in islice(steps, 5)]
        assert not loader.rejected_paths
    with Loader(config, schedule, record=tmp_path / "other" / "quarantine.rank0.jsonl") as loader:
        assert [step.paths for step in islice(loader, 6)] == paths
