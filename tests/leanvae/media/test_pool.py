"""Decoder processes: results stream, processes that die or hang are replaced, and faults of the code are not files'."""

import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice

import numpy as np
import psutil
import pytest

from leanvae.media.item import Item
from leanvae.media.pool import DecoderPool
from leanvae.media.worker import FileFailure, show_life

TIMEOUT = 0.5
ODD = """
    import os, signal, sys, time
    from dataclasses import dataclass

    import numpy as np

    from leanvae.media.errors import MediaError
    from leanvae.media.worker import show_life

    def misbehave(how, times, log):
        with open(log, "a") as file:
            file.write(".")
        if os.path.getsize(log) > times:
            yield "sample"
            return
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "half sent":
            np.ascontiguousarray = lambda frames: time.sleep(60)  # what stands between the parts of a message
            yield Piece(0, np.zeros(8))
        while how == "hanging":
            try:
                time.sleep(1)
            except SystemExit:
                pass
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "crashing": signal.SIGSEGV, "told": signal.SIGTERM}[how])
        time.sleep(60)

    def count(item):
        yield from range(item)

    def count_and_die(item):
        yield 0
        time.sleep(0.2)
        os._exit(3)

    def raise_error(item, kind):
        yield 1
        raise {"media": MediaError("a.mp4", "too short"), "type": TypeError("a fault"), "name": NameError("a fault"),
               "attribute": AttributeError("a fault"), "assertion": AssertionError("a fault"),
               "import": ImportError("a fault"), "os": OSError("gone"), "value": ValueError("odd")}[kind]

    def work_slowly(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
            show_life()
        yield "done"

    def sleep(seconds, result):
        time.sleep(seconds)
        yield result

    @dataclass(frozen=True)
    class Piece:
        number: int
        frames: np.ndarray

    def make_frames(shape):
        for number in range(3):
            yield Piece(number, np.full(shape, number, np.uint8)[:, ::-1])

    def describe(_):
        modules = [name for name in ("torch", "cv2") if name in sys.modules]
        yield modules, os.getsid(0) == os.getpid(), os.nice(0)
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Functions that processes can import."""
    (tmp_path / "odd.py").write_text(textwrap.dedent(ODD))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("odd", None)
    import odd  # pyright: ignore[reportMissingImports]

    return odd


def children():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_results_stream_in_the_order_of_their_work(odd):
    with DecoderPool(2, 20.0) as pool:
        tasks = [pool.submit(odd.count, number) for number in (3, 0, 5)]
        assert [list(task) for task in tasks] == [[0, 1, 2], [], [0, 1, 2, 3, 4]]
        results = list(pool.run(odd.count, iter(range(5)), ahead=1))
        assert sorted(results) == [(job, number) for job in range(5) for number in range(job)]
        for job in range(5):
            assert [number for other, number in results if other == job] == list(range(job))
        assert next(iter(pool.run(odd.count, [1000, 1000], ahead=1))) == (1000, 0)  # and the rest is given up
        assert pool.submit(odd.count, 1).result() == 0
        found = pool.submit(odd.make_frames, (2, 3, 3))
        for number, piece in enumerate(found):
            assert piece.number == number
            assert np.array_equal(piece.frames, np.full((2, 3, 3), number, np.uint8))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "the decoder process died (exit code -9)"),
        ("crashing", "the decoder process died (exit code -11)"),
        pytest.param("stopped", "decoding hangs: nothing came for 0.5 s", marks=pytest.mark.slow),
        ("hanging", "decoding hangs: nothing came for 0.5 s"),
        ("half sent", "decoding hangs: nothing came for 0.5 s"),
    ],
)
def test_a_file_is_blamed_at_the_second_time(odd, tmp_path, how, reason):
    with DecoderPool(1, TIMEOUT) as pool:
        for times, result in ((1, "sample"), (9, FileFailure("", reason, may_pass=True))):
            log = tmp_path / str(times)
            assert pool.submit(odd.misbehave, how, times, str(log)).result() == result
            assert len(log.read_text()) == 2


def test_processes_told_to_end_blame_nobody(odd, tmp_path):
    with DecoderPool(1, 20.0) as pool:
        assert pool.submit(odd.misbehave, "told", 3, str(tmp_path / "log")).result() == "sample"
    assert len((tmp_path / "log").read_text()) == 4


def test_work_that_has_sent_something_is_not_begun_again(odd):
    with DecoderPool(1, 20.0) as pool:
        assert list(pool.submit(odd.count_and_die, 1)) == [
            0,
            FileFailure("", "the decoder process died (exit code 3)", may_pass=True),
        ]
        assert list(pool.submit(odd.count, 2)) == [0, 1]


def test_processes_that_die_again_and_again_end_the_run(odd, tmp_path):
    with DecoderPool(2, 20.0) as pool:
        tasks = [pool.submit(odd.misbehave, "killed", 99, str(tmp_path / str(number))) for number in range(12)]
        with pytest.raises(RuntimeError, match="died 10 times in a row, before any result"):
            [task.result() for task in tasks]
        with pytest.raises(RuntimeError, match="died 10 times in a row"):
            list(pool.run(odd.count, [1], ahead=1))


@pytest.mark.parametrize("kind", ["type", "name", "attribute", "assertion", "import"])
def test_faults_of_the_code_end_the_run_with_their_traceback(odd, kind):
    with DecoderPool(1, 20.0) as pool:
        for results in (pool.submit(odd.raise_error, 1, kind), pool.run(odd.count, ["no number"], ahead=1)):
            with pytest.raises((TypeError, NameError, AttributeError, AssertionError, ImportError)) as caught:
                list(results)
            assert "odd.py" in str(caught.value.__cause__)


def test_what_files_and_libraries_cause_is_the_files(odd):
    item = Item("clip.mp4", "clip")
    reasons = {
        "media": FileFailure("a.mp4", "too short"),
        "os": FileFailure("clip.mp4", "OSError: gone", may_pass=True),
        "value": FileFailure("clip.mp4", "ValueError: odd", may_pass=True),
    }
    with DecoderPool(1, 20.0) as pool:
        for kind, failure in reasons.items():
            assert list(pool.submit(odd.raise_error, item, kind)) == [1, failure]


def test_silence_counts_and_not_the_time_that_work_takes(odd):
    with DecoderPool(1, TIMEOUT) as pool:
        assert pool.submit(odd.work_slowly, 4 * TIMEOUT).result() == "done"
    show_life()  # does nothing in the main process


def test_urgent_work_overtakes_what_waits(odd):
    with DecoderPool(1, 20.0) as pool:
        slow = [pool.submit(odd.sleep, 0.3, number) for number in range(8)]
        assert slow[0].result() == 0
        started = time.monotonic()
        assert pool.submit(odd.sleep, 0.0, "substitute", urgent=True).result() == "substitute"
        assert time.monotonic() - started < 1.0
        assert [task.result() for task in slow[1:]] == list(range(1, 8))


def test_processes_have_no_torch_and_a_session_and_are_nice(odd):
    with DecoderPool(1, 20.0, niceness=5) as pool:
        modules, leads_session, niceness = pool.submit(odd.describe, 0).result()
    assert (modules, leads_session) == (["cv2"], True)
    assert niceness >= 5


def test_idle_processes_that_are_killed_or_stopped_are_replaced(odd):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        with DecoderPool(2, 2.0) as pool:
            assert [pool.submit(odd.sleep, 0.2, n).result() for n in range(2)] == [0, 1]
            for child in children():
                child.send_signal(number)
            time.sleep(0.1)
            assert [task.result() for task in [pool.submit(odd.sleep, 0.0, n) for n in range(4)]] == [0, 1, 2, 3]


def test_a_closed_pool_has_no_processes_and_takes_no_work(odd):
    pool = DecoderPool(2, 20.0)
    task = pool.submit(odd.sleep, 60, "never")
    running = pool.run(odd.count, [1000], ahead=1)
    next(running)
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 5
    assert not children()
    for waiting in (task.result, lambda: list(running), lambda: pool.submit(odd.count, 1)):
        with pytest.raises(RuntimeError, match="closed"):
            waiting()
    with pytest.raises(RuntimeError, match="closed"):
        list(islice(pool.run(odd.count, [1], ahead=1), 1))


def test_processes_end_with_the_main_process_whatever_they_are_at(odd, tmp_path):
    script = f"""
        import os, sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        import odd
        from leanvae.media.pool import DecoderPool

        if __name__ == "__main__":
            pool = DecoderPool(2, 600.0)
            tasks = [pool.submit(odd.sleep, 500, n) for n in range(4)]
            time.sleep(3)
            print(*(s._process.pid for s in pool._supervisors), flush=True)
            os.kill(os.getpid(), 9)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_program_that_leaves_the_pool_open_still_ends(odd, tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import odd
        from leanvae.media.pool import DecoderPool

        if __name__ == "__main__":
            pool = DecoderPool(2, 600.0)
            tasks = [pool.submit(odd.sleep, n, n) for n in (0, 500, 500)]
            print(tasks[0].result())
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)
