"""Decoder processes: they work ahead of the model, and a file that crashes or hangs one costs that file alone."""

import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from leanvae.latents.decoding import Decoded, Decoding, Finished, Piece, Rejected, decode_source
from leanvae.latents.sources import Source
from litevae.errors import extra

with extra("video"):
    import cv2

Order = tuple[Source, frozenset[int]]

_NICENESS = 5  # on a CPU, frames are decoded in the time that the model leaves


def decode_ahead(
    orders: Iterable[Order], decoding: Decoding, num_workers: int, ahead: int, timeout: float
) -> Iterator[Decoded]:
    """Decodes sources in processes of their own, in whatever order they get done; see `decode_source`.

    Args:
        orders: sources, each with the first frames of its clips that are not wanted.
        ahead: pieces that may wait for the caller.
        timeout: seconds that a process may be silent; then it is ended, and the source rejected.
    """
    results: queue.Queue[Decoded | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    source_of_orders = _Shared(iter(orders))
    threads = [
        threading.Thread(target=_Supervisor(source_of_orders, decoding, results, stop, timeout).run, daemon=True)
        for _ in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    try:
        running = num_workers
        while running:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            while thread.is_alive():  # one that waits for room needs it, to see that it shall stop
                _discard(results)
                thread.join(timeout=0.05)


def _discard(results: "queue.Queue[Decoded | BaseException | None]") -> None:
    while True:
        try:
            results.get_nowait()
        except queue.Empty:
            return


class _Shared:
    """An iterator that several threads draw from."""

    def __init__(self, orders: Iterator[Order]) -> None:
        self._orders = orders
        self._lock = threading.Lock()

    def next(self) -> Order | None:
        with self._lock:
            return next(self._orders, None)


class _Supervisor:
    """Keeps one decoder process at work, and replaces it when it dies."""

    def __init__(
        self,
        orders: _Shared,
        decoding: Decoding,
        results: "queue.Queue[Decoded | BaseException | None]",
        stop: threading.Event,
        timeout: float,
    ) -> None:
        self._orders = orders
        self._decoding = decoding
        self._results = results
        self._stop = stop
        self._timeout = timeout
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self) -> None:
        """Hands out sources until there are none left, and passes on what comes of them."""
        try:
            while not self._stop.is_set() and (order := self._orders.next()) is not None:
                for result in self._decode(order):
                    self._results.put(result)
                    if self._stop.is_set():
                        break
            self._results.put(None)
        except BaseException as error:
            self._results.put(error)
        finally:
            self._end_process()

    def _decode(self, order: Order) -> Iterator[Decoded]:
        source = order[0]
        connection = self._connection or self._start_process()
        try:
            connection.send(order)
            while True:
                if not connection.poll(self._timeout):
                    self._end_process()
                    yield Rejected(source, f"decoding hangs: nothing came for {self._timeout:g} s", may_pass=True)
                    return
                result = _receive(connection)
                yield result
                if isinstance(result, Finished | Rejected):
                    return
        except (EOFError, OSError):
            process = self._process
            assert process is not None
            process.join(timeout=10)
            yield Rejected(source, f"the decoder process died (exit code {process.exitcode})", may_pass=True)
            self._end_process()

    def _start_process(self) -> Connection:
        # Fresh processes: forked ones would inherit the threads and locks of torch.
        context = multiprocessing.get_context("spawn")
        connection, far_end = context.Pipe()
        process = context.Process(target=_work, args=(far_end, self._decoding), daemon=True)
        process.start()
        far_end.close()
        self._process, self._connection = process, connection
        return connection

    def _end_process(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def _work(connection: Connection, decoding: Decoding) -> None:
    """What a decoder process runs, until the other end of its connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interruption means
    gc.freeze()  # what is imported stays, and need not be looked at after each source
    os.nice(_NICENESS)
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(0)
    try:
        while True:
            source, known = connection.recv()
            for result in decode_source(source, decoding, known):
                _send(connection, result)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _send(connection: Connection, result: Decoded) -> None:
    """Sends a result; frames go as they are, since pickled ones are copied several times."""
    if not isinstance(result, Piece):
        connection.send(result)
        return
    connection.send(replace(result, frames=np.empty(0, np.uint8)))
    connection.send(result.frames.shape)
    connection.send_bytes(result.frames.data.cast("B"))


def _receive(connection: Connection) -> Decoded:
    result: Decoded = connection.recv()
    if not isinstance(result, Piece):
        return result
    frames = np.empty(connection.recv(), np.uint8)
    connection.recv_bytes_into(frames.data.cast("B"))
    return replace(result, frames=frames)
