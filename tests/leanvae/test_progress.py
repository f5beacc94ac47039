"""Progress without a terminal: lines at intervals, with rates and the remaining time."""

import io
import logging
import sys

import pytest

from leanvae import progress
from leanvae.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_intervals_with_rates_and_time_left(clock, caplog):
    with caplog.at_level(logging.INFO, "leanvae"), Progress("encoding", "file", 4) as bar:
        for _ in range(3):
            clock[0] += 20
            bar.count(clips=2, frames=34)
            bar.add()
    assert caplog.messages == ["encoding: 1 of 4 files, 0.10 clips/s, 1.70 frames/s, 02:00 left"]
    assert bar.counts == {"clips": 6, "frames": 102}


def test_work_of_unknown_length_is_counted(clock, caplog):
    with caplog.at_level(logging.INFO, "leanvae"), Progress("a.mp4", "frame") as bar:
        clock[0] += 31
        bar.add(240)
    assert caplog.messages == ["a.mp4: 240 frames"]


def test_other_ranks_show_nothing(clock, caplog):
    with caplog.at_level(logging.INFO, "leanvae"), Progress("encoding", "file", 4, is_shown=False) as bar:
        clock[0] += 100
        bar.add()
    assert caplog.messages == []


def test_terminals_get_a_bar_and_no_lines(clock, caplog, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO, "leanvae"), Progress("encoding", "file", 4) as bar:
        clock[0] += 100
        bar.count(clips=3)
        bar.add(3)
    assert "encoding:  75%" in terminal.getvalue()
    assert "clips/s" in terminal.getvalue()
    assert caplog.messages == []
