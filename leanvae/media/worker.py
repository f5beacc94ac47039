"""What runs in a decoder process, and what it sends to the pool; free of torch."""

import copy
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from leanvae.media.errors import MediaError
from leanvae.media.item import Item
from litevae.errors import extra

with extra("video"):
    import cv2

T = TypeVar("T")

# What no file makes a library raise: these are faults of the code.
FAULTS = (TypeError, NameError, AttributeError, AssertionError, ImportError)
READY, ALIVE, ADVICE, RESULT, FAULT, END = range(6)  # kinds of messages


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
    except FAULTS:
        raise
    except MediaError as error:
        yield FileFailure(error.path, error.reason)
    except Exception as error:
        yield FileFailure(name_in(args), f"{type(error).__name__}: {error}", may_pass=True)


def name_in(args: tuple[Any, ...]) -> str:
    """Name the item that work is about."""
    flat = [part for arg in args for part in (arg if isinstance(arg, tuple) else (arg,))]
    return next((part.name for part in flat if isinstance(part, Item)), "")


# In a decoder process: the line to the pool, when it last spoke, and how long it may rest.
_line: Connection | None = None
_spoke = 0.0
_rest = 0.0


def show_life() -> None:
    """Tell the pool that work goes on, as decoders do at every frame; elsewhere than in its processes, do nothing."""
    global _spoke
    if _line is not None and time.monotonic() - _spoke > _rest:
        _line.send((ALIVE, None, None))
        _spoke = time.monotonic()


def advise(advice: str) -> None:
    """Let the pool log advice to the user, once; elsewhere than in its processes, do nothing."""
    if _line is not None:
        _line.send((ADVICE, advice, None))


def run_process(connection: Connection, niceness: int, rest: float) -> None:
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
        connection.send((READY, None, None))
        while True:
            try:
                function, args = connection.recv()
                for result in attempt(function, *args):
                    _send_result(connection, result)
                connection.send((END, None, None))
            except FAULTS as error:
                connection.send((FAULT, _with_traceback(error), None))
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
        connection.send((RESULT, result, None))
        return
    connection.send((RESULT, replace(result, frames=np.empty(0, frames.dtype)), frames.shape))
    connection.send_bytes(np.ascontiguousarray(frames).data.cast("B"))


def receive(connection: Connection) -> tuple[int, Any]:
    kind, value, shape = connection.recv()
    if kind == FAULT:
        value, text = value
        value.__cause__ = _RemoteTraceback(text)
    elif shape is not None:
        frames = np.empty(shape, value.frames.dtype)
        connection.recv_bytes_into(frames.data.cast("B"))
        value = replace(value, frames=frames)
    return kind, value
