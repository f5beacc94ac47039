"""Decoder processes: a file that kills or hangs one costs only that file; free of torch.

Each process is looked after by a thread of the main process, which gives it one piece of work at a time, passes on what
it sends, and replaces it when it dies or falls silent.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from leanvae.media.worker import ADVICE, ALIVE, END, FAULT, RESULT, FileFailure, name_in, receive, run_process

logger = logging.getLogger("leanvae")

T = TypeVar("T")
J = TypeVar("J")

_START_SECONDS = 120.0  # in which a process has started, on whatever machine
# Processes that die so often before any result do not die of the files.
_MOST_DEATHS = 10


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
            if message.kind == FAULT:
                raise message.value
            self.done = message.kind == END
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
                end = _Message(None, END)
            except BaseException as error:  # of the caller's own iterable
                self.is_empty = True
                end = _Message(None, FAULT, error)
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
        self._advised = False
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
            if message.kind == FAULT:
                raise message.value
            if message.kind == RESULT:
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

    def advise(self, advice: str) -> None:
        """Log advice, the first time that one of the processes gives any."""
        with self._changed:
            is_first, self._advised = not self._advised, True
        if is_first:
            logger.warning("%s", advice)

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
                    FAULT, RuntimeError(f"decoder processes died {_MOST_DEATHS} times in a row, before any result")
                )
                return
            reason, counts = self._attempt(work)
            if not reason:
                return
            if work.has_sent or (counts and blamed):
                work.put(RESULT, FileFailure(name_in(work.args), reason, may_pass=True))
                work.put(END)
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
                kind, value = receive(connection)
                if kind in (ALIVE, ADVICE):
                    if value:
                        self._pool.advise(value)
                    continue
                self._pool.deaths = 0
                work.put(kind, value)
                if kind in (END, FAULT):
                    return "", False
        except BlockingIOError:  # silent in the midst of a message
            pass
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
        process = context.Process(target=run_process, args=args, daemon=True)
        process.start()
        far_end.close()
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            seconds, rest = divmod(self._pool.timeout, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))
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
