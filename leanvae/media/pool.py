"""Decoder processes: a file that kills or hangs one costs only that file; free of torch.

Each process is looked after by a thread of the main process, which gives it one piece of work at a time, passes on what
it sends, and replaces it when it dies or falls silent.
"""

import atexit
import copy
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np

from leanvae.media.errors import MediaError
from leanvae.media.item import Item
from litevae.errors import extra

with extra("video"):
    import cv2

T = TypeVar("T")
J = TypeVar("J")

_START_SECONDS = 120.0  # in which a process has started, on whatever machine
# Processes that die so often before any result do not die of the files.
_MOST_DEATHS = 10
# What no file makes a library raise: these are faults of the code.
_FAULTS = (TypeError, NameError, AttributeError, AssertionError, ImportError)
_READY, _ALIVE, _RESULT, _FAULT, _END = range(5)  # kinds of messages


@dataclass(frozen=True)
class FileFailure:
    """A file that cannot be used.

    Attributes:
        path: its name; empty where it is not known.
        reason: what is wrong.
        may_pass: whether it may be usable another time, although the file stays as it is.
    """

    path: str
    reason: str
    may_pass: bool = False


def attempt(function: Callable[..., Iterable[T]], *args: Any) -> Iterator[T | FileFailure]:
    """Yield what a function yields, and a FileFailure where it raises something that files and libraries cause.

    Raises:
        TypeError, NameError, AttributeError, AssertionError, ImportError: faults of the code.
    """
    try:
        yield from function(*args)
    except _FAULTS:
        raise
    except MediaError as error:
        yield FileFailure(error.path, error.reason)
    except Exception as error:
        yield FileFailure(_name_in(args), f"{type(error).__name__}: {error}", may_pass=True)


def _name_in(args: tuple[Any, ...]) -> str:
    """The name of the item that work is about."""
    flat = [part for arg in args for part in (arg if isinstance(arg, tuple) else (arg,))]
    return next((part.name for part in flat if isinstance(part, Item)), "")


class _Closed(Exception):
    """Nobody waits for results any more."""


class _Message(NamedTuple):
    """What a process sends of a piece of work; `key` says which."""

    key: Any
    kind: int
    value: Any = None


class _Buffer:
    """Messages between threads; those that put wait while it is full."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._messages: deque[_Message] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, message: _Message) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._messages) < self._limit)
            if self._closed:
                raise _Closed
            self._messages.append(message)
            self._changed.notify_all()

    def get(self) -> _Message:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._messages)
            if not self._messages:
                raise _Closed
            message = self._messages.popleft()
            self._changed.notify_all()
            return message

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(eq=False)
class _Work:
    """A function to run, and where its results go."""

    function: Callable[..., Iterable[Any]]
    args: tuple[Any, ...]
    buffer: _Buffer
    key: Any = None
    has_sent: bool = False

    def put(self, kind: int, value: Any = None) -> None:
        self.has_sent = True
        self.buffer.put(_Message(self.key, kind, value))


class Task(Generic[T]):
    """Work that a pool has been given; iterate over it for its results, in order and once."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self.done = False  # all results have come

    def __iter__(self) -> Iterator[T | FileFailure]:
        while not self.done:
            try:
                message = self._work.buffer.get()
            except _Closed:
                raise RuntimeError("the decoder processes are closed") from None
            if message.kind == _FAULT:
                raise message.value
            self.done = message.kind == _END
            if not self.done:
                yield message.value

    def result(self) -> T | FileFailure:
        """Wait for the only result."""
        (result,) = self
        return result


@dataclass(eq=False)
class _Feed:
    """Work that is drawn when a process is free."""

    works: Iterator[_Work]
    buffer: _Buffer
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_empty: bool = False
    num_drawn: int = 0

    def next(self) -> _Work | None:
        with self.lock:
            if self.is_empty:
                return None
            try:
                work = next(self.works)
                self.num_drawn += 1
                return work
            except StopIteration:
                self.is_empty = True
                end = _Message(None, _END)
            except BaseException as error:  # of the caller's own iterable
                self.is_empty = True
                end = _Message(None, _FAULT, error)
        with suppress(_Closed):
            self.buffer.put(end)
        return None


class DecoderPool:
    """Decoder processes; use them in a `with` block, or call `close`.

    They run in sessions of their own, so that a signal to the main process's group lets that alone decide, and end with
    it.

    Args:
        num_workers: how many.
        timeout: seconds that a process may be silent; then it is killed.
        niceness: what their niceness is raised by.
    """

    def __init__(self, num_workers: int, timeout: float, niceness: int = 0) -> None:
        self.timeout = timeout
        self.niceness = niceness
        self.deaths = 0  # of processes that nobody ended, since the last result
        self._urgent: deque[_Work] = deque()
        self._queue: deque[_Work] = deque()
        self._feeds: list[_Feed] = []
        self._buffers: set[_Buffer] = set()
        self._changed = threading.Condition()
        self.closed = False
        self._supervisors = [_Supervisor(self) for _ in range(num_workers)]
        for supervisor in self._supervisors:
            supervisor.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at; safe to call again."""
        atexit.unregister(self.close)
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            buffers = list(self._buffers)
        for buffer in buffers:
            buffer.close()
        for supervisor in self._supervisors:
            supervisor.interrupt()
        for supervisor in self._supervisors:
            supervisor.join()

    def submit(self, function: Callable[..., Iterable[T]], *args: Any, urgent: bool = False) -> Task[T]:
        """Queue work.

        Args:
            function: yields results; those that have `frames`, a numpy array, travel without being pickled.
            urgent: let it overtake what waits, because something waits for it.

        Raises:
            RuntimeError: closed.
        """
        work = _Work(function, args, _Buffer(float("inf")))
        with self._changed:
            if self.closed:
                raise RuntimeError("the decoder processes are closed")
            self._buffers.add(work.buffer)
            (self._urgent if urgent else self._queue).append(work)
            self._changed.notify()
        return Task(work)

    def run(
        self, function: Callable[[J], Iterable[T]], jobs: Iterable[J], ahead: int
    ) -> Iterator[tuple[J, T | FileFailure]]:
        """Stream results as they come, those of each job in order.

        Args:
            jobs: drawn when a process is free, in the processes' threads.
            ahead: most results that wait for the caller.

        Raises:
            RuntimeError: closed; or the processes die again and again.
        """
        buffer = _Buffer(ahead)
        feed = _Feed((_Work(function, (job,), buffer, job) for job in jobs), buffer)
        with self._changed:
            if self.closed:
                raise RuntimeError("the decoder processes are closed")
            self._buffers.add(buffer)
            self._feeds.append(feed)
            self._changed.notify_all()
        try:
            yield from self._results(feed)
        finally:
            with self._changed:
                self._feeds.remove(feed)
                self._buffers.discard(buffer)
            buffer.close()

    def _results(self, feed: _Feed) -> Iterator[tuple[Any, Any]]:
        """Yield a feed's results until it is empty and all that was drawn from it has ended."""
        num_ended, is_empty = 0, False
        while not (is_empty and num_ended == feed.num_drawn):
            try:
                message = feed.buffer.get()
            except _Closed:
                raise RuntimeError("the decoder processes are closed") from None
            if message.kind == _FAULT:
                raise message.value
            if message.kind == _RESULT:
                yield message.key, message.value
            elif message.key is None:
                is_empty = True
            else:
                num_ended += 1

    def next_work(self) -> _Work | None:
        """Wait for work; None once the pool is closed. Called by the supervisors."""
        while True:
            with self._changed:
                feeds = list(self._feeds)
                if self.closed:
                    return None
                for queue in (self._urgent, self._queue):
                    if queue:
                        return queue.popleft()
            for feed in feeds:
                if work := feed.next():
                    return work
            with self._changed:
                idle = not (self._urgent or self._queue or self.closed)
                if idle and all(feed.is_empty for feed in self._feeds):
                    self._changed.wait()

    def forget(self, buffer: _Buffer) -> None:
        """Drop a buffer that gets no more messages."""
        with self._changed:
            self._buffers.discard(buffer)


class _Supervisor(threading.Thread):
    """Keeps one process at work."""

    def __init__(self, pool: DecoderPool) -> None:
        super().__init__(daemon=True)
        self._pool = pool
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self) -> None:
        """Serve work until the pool is closed."""
        try:
            while (work := self._pool.next_work()) is not None:
                try:
                    self._serve(work)
                except _Closed:
                    self._end_process()  # it is at work for nobody
                if work.key is None:
                    self._pool.forget(work.buffer)
        finally:
            self._end_process()

    def interrupt(self) -> None:
        """End the process, from another thread."""
        if (process := self._process) is not None:
            process.kill()

    def _serve(self, work: _Work) -> None:
        """Do a piece of work; begin again, once, where it ends before it sent anything."""
        blamed = False
        while not self._pool.closed:
            if self._pool.deaths >= _MOST_DEATHS:
                work.put(
                    _FAULT, RuntimeError(f"decoder processes died {_MOST_DEATHS} times in a row, before any result")
                )
                return
            reason, counts = self._attempt(work)
            if not reason:
                return
            if work.has_sent or (counts and blamed):
                work.put(_RESULT, FileFailure(_name_in(work.args), reason, may_pass=True))
                work.put(_END)
                return
            blamed = blamed or counts

    def _attempt(self, work: _Work) -> tuple[str, bool]:
        """Do a piece of work; where it does not end, say why, and whether its file may have caused that."""
        began = False
        try:
            connection = self._connection or self._start_process()
            connection.send((work.function, work.args))
            began = True
            while connection.poll(self._pool.timeout):
                kind, value = _receive(connection)
                if kind == _ALIVE:
                    continue
                self._pool.deaths = 0
                work.put(kind, value)
                if kind in (_END, _FAULT):
                    return "", False
        except (EOFError, OSError):
            code = self._end_process(patience=10.0)
            if self._pool.closed:
                raise _Closed from None
            self._pool.deaths += 1
            # One that is told to end, as all of a job's processes are, has not met a bad file.
            return f"the decoder process died (exit code {code})", began and code != -signal.SIGTERM
        self._end_process()
        return f"decoding hangs: nothing came for {self._pool.timeout:g} s", True

    def _start_process(self) -> Connection:
        # Fresh processes: forked ones would inherit the threads and locks of torch, and communication with it.
        context = multiprocessing.get_context("spawn")
        connection, far_end = context.Pipe()
        args = (far_end, self._pool.niceness, min(1.0, self._pool.timeout / 4))
        process = context.Process(target=_run_process, args=args, daemon=True)
        process.start()
        far_end.close()
        self._process, self._connection = process, connection
        if self._pool.closed or not connection.poll(_START_SECONDS):
            process.kill()
        connection.recv()  # EOFError if it died
        return connection

    def _end_process(self, patience: float = 0.0) -> int | None:
        """End the process, if it does not end in some seconds by itself; return its exit code."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return None
        process.join(timeout=patience)
        process.kill()
        process.join()
        connection.close()
        return process.exitcode


# In a decoder process: the line to the pool, when it last spoke, and how long it may rest.
_line: Connection | None = None
_spoke = 0.0
_rest = 0.0


def show_life() -> None:
    """Tell the pool that work goes on, as decoders do at every frame; elsewhere than in its processes, do nothing."""
    global _spoke
    if _line is not None and time.monotonic() - _spoke > _rest:
        _line.send((_ALIVE, None, None))
        _spoke = time.monotonic()


def _run_process(connection: Connection, niceness: int, rest: float) -> None:
    """Work until the other end of the connection closes."""
    global _line, _rest
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(niceness)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # there are several processes
    cv2.utils.logging.setLogLevel(0)  # errors say what it would print
    gc.freeze()  # what is imported stays, and need not be looked at after each file
    _line, _rest = connection, rest
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send((_READY, None, None))
        while True:
            try:
                function, args = connection.recv()
                for result in attempt(function, *args):
                    _send_result(connection, result)
                connection.send((_END, None, None))
            except _FAULTS as error:
                connection.send((_FAULT, _with_traceback(error), None))
            gc.collect()  # PyAV's containers stand in reference cycles, and hold their frames until then


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _RemoteTraceback(Exception):
    """A traceback of another process, shown as the cause of an exception."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _with_traceback(error: BaseException) -> tuple[BaseException, str]:
    text = "".join(traceback.format_exception(error))
    try:
        return copy.copy(error), text  # as pickling would
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), text


def _send_result(connection: Connection, result: Any) -> None:
    """Send a result; frames go as they are, since pickled ones are copied several times."""
    frames = getattr(result, "frames", None)
    if not isinstance(frames, np.ndarray):
        connection.send((_RESULT, result, None))
        return
    connection.send((_RESULT, replace(result, frames=np.empty(0, frames.dtype)), frames.shape))
    connection.send_bytes(np.ascontiguousarray(frames).data.cast("B"))


def _receive(connection: Connection) -> tuple[int, Any]:
    kind, value, shape = connection.recv()
    if kind == _FAULT:
        value, text = value
        value.__cause__ = _RemoteTraceback(text)
    elif shape is not None:
        frames = np.empty(shape, value.frames.dtype)
        connection.recv_bytes_into(frames.data.cast("B"))
        value = replace(value, frames=frames)
    return kind, value
