"""Decoder processes: what runs in them, and what comes of their work; free of torch."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as DecodingTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from leanvae.data.buckets import Shape
from leanvae.data.clips import ClipSample, read_clip
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.data.pictures import PictureSample, read_picture
from leanvae.data.sources import Item, Picture
from leanvae.media.errors import MediaError
from litevae.errors import extra

with extra("video"):
    import cv2
    from pebble import ProcessExpired, ProcessFuture, ProcessPool

Sample = ClipSample | PictureSample
T = TypeVar("T")

_START_SECONDS = 30.0  # in which a process has started, on whatever machine
# Processes that all die before one piece of work is done do not die of the files.
_MAX_RESTARTS = 5


@dataclass
class Work(Generic[T]):
    """What decoder processes have been given to do; made by `Decoders.begin`."""

    function: Callable[..., T]
    arguments: tuple[Any, ...]
    future: "ProcessFuture[T]"


class Decoders:
    """Decoder processes, replaced when they die, hang or get stuck. Use it as a context manager, or call `close`.

    Args:
        num_workers: how many.
        timeout: seconds that a piece of work may take; a process that takes longer is killed.
    """

    def __init__(self, num_workers: int, timeout: float) -> None:
        self._num_workers = num_workers
        self._timeout = timeout
        self._restarts = 0  # since the last result
        self._pool: ProcessPool | None = start_decoders(num_workers)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; safe to call again."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            stop_decoders(pool)

    def begin(self, function: Callable[..., T], *arguments: Any) -> Work[T]:
        """Puts work at the end of the queue.

        Raises:
            RuntimeError: closed; or the processes die again and again.
        """
        return Work(function, arguments, self._submit(function, arguments))

    def result(self, work: Work[T]) -> T | str:
        """Waits for a piece of work: its result, or the reason why there is none.

        The file is not blamed when a process is told to end from outside, as a job's processes all are, or when none
        begins; nor when one dies or hangs for the first time, since others may have killed it or held it up.

        Raises:
            RuntimeError: the processes die again and again.
        """
        failed = False
        while True:
            reason = None
            try:
                result: T | str = work.future.result(2 * self._timeout + _START_SECONDS)
                self._restarts = 0
                return result
            except MediaError as error:
                return error.reason
            except DecodingTimeout:
                if work.future.done():
                    reason = f"decoding took longer than {self._timeout:g} s"
                else:  # nobody has begun though all that came before must have ended
                    self._restart()
            except ProcessExpired as error:
                if abs(error.exitcode) != signal.SIGTERM:
                    reason = f"the decoder process died (exit code {error.exitcode})"
            except (BrokenProcessPool, CancelledError):
                pass
            except Exception as error:
                # Whatever else a file makes the decoders do, it must not end the run; many of them will.
                return f"{type(error).__name__}: {error}"
            if reason and failed:
                return reason
            failed = failed or reason is not None
            work.future = self._submit(work.function, work.arguments)

    def _submit(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> "ProcessFuture[T]":
        if self._pool is None:
            raise RuntimeError("the decoder processes are closed")
        try:
            return self._pool.schedule(function, args=arguments, timeout=self._timeout)
        except RuntimeError:  # all processes died, and pebble gave the pool up
            self._restart()
            return self._pool.schedule(function, args=arguments, timeout=self._timeout)

    def _restart(self) -> None:
        """Replaces all processes; what they had not finished is begun again when it is waited for."""
        if self._restarts == _MAX_RESTARTS:
            raise RuntimeError(f"all decoder processes died {_MAX_RESTARTS + 1} times in a row, before any result")
        self._restarts += 1
        self.close()
        self._pool = start_decoders(self._num_workers)


def decode_sample(item: Item, config: DataConfig, bucket: Shape, seed: Sequence[int] | None) -> Sample:
    """What a decoder process runs: reads a clip or an image, cut by the generator of ``seed``, or centrally.

    Args:
        config: for clips a :class:`ClipDataConfig`.
        bucket: the shape that it is cut to.

    Raises:
        MediaError: the file cannot be used.
        TypeError: a clip, but the configuration of images.
    """
    generator = None if seed is None else np.random.default_rng(seed)
    if isinstance(item, Picture):
        return read_picture(item, bucket.resolution, config.flip, generator)
    if not isinstance(config, ClipDataConfig):
        raise TypeError(f"clips are read by a ClipDataConfig, got {type(config).__name__}")
    return read_clip(item, config, bucket, generator)


def start_decoders(num_workers: int) -> ProcessPool:
    """Starts decoder processes."""
    # Fresh processes: forked ones would inherit the threads and locks of torch, and communication with it.
    context = multiprocessing.get_context("spawn")
    return ProcessPool(max_workers=num_workers, initializer=_warm_up, context=context)


def stop_decoders(pool: ProcessPool) -> None:
    """Ends decoder processes, whatever they are at."""
    pool.stop()
    pool.join()


def _warm_up() -> None:
    """Prepares a decoder process.

    It leaves the run's process group, so that a signal to the group lets the trainer alone decide what happens, takes
    one thread, since there are several processes, and keeps OpenCV from printing what the errors say.
    """
    os.setsid()
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(0)
