"""Decoder processes: what runs in them, and what comes of their work; free of torch."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as DecodingTimeout
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from leanvae.data.clips import ClipSample, read_clip
from leanvae.data.config import ClipDataConfig, DataConfig
from leanvae.data.pictures import PictureSample, read_picture
from leanvae.data.sources import Item, Picture
from leanvae.media import MediaError, cv2

try:
    from pebble import ProcessExpired, ProcessFuture, ProcessPool
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError("decoding training data needs pebble: pip install 'leanvae[video]'") from error

Sample = ClipSample | PictureSample


class DecoderTerminated(Exception):
    """A decoder process was told to end from outside, as when a job's processes all are: not the file's fault."""


def decode_sample(item: Item, config: DataConfig, resolution: tuple[int, int], seed: Sequence[int] | None) -> Sample:
    """What a decoder process runs: reads a clip or an image, cut by the generator of ``seed``, or centrally.

    Args:
        config: for clips a :class:`ClipDataConfig`.
        resolution: (height, width) in pixels.

    Raises:
        MediaError: the file cannot be used.
        TypeError: a clip, but the configuration of images.
    """
    generator = None if seed is None else np.random.default_rng(seed)
    if isinstance(item, Picture):
        return read_picture(item, resolution, config.flip, generator)
    if not isinstance(config, ClipDataConfig):
        raise TypeError(f"clips are read by a ClipDataConfig, got {type(config).__name__}")
    return read_clip(item, config, resolution, generator)


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


def outcome(future: "ProcessFuture[Sample]", timeout: float) -> Sample | str:
    """Waits for a sample, or the reason why there is none.

    Raises:
        DecoderTerminated: the work was lost through no fault of the file: schedule it again.
    """
    try:
        return future.result()
    except MediaError as error:
        return error.reason
    except DecodingTimeout:
        return f"decoding took longer than {timeout:g} s"
    except ProcessExpired as error:
        if abs(error.exitcode) == signal.SIGTERM:
            raise DecoderTerminated from error
        return f"the decoder process died (exit code {error.exitcode})"
    except (BrokenProcessPool, CancelledError) as error:
        raise DecoderTerminated from error
    except Exception as error:
        # Whatever else a file makes the decoders do, it must not end the run; many of them will.
        return f"{type(error).__name__}: {error}"
