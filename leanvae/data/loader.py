"""The loader of training clips: decodes ahead in processes, replaces what cannot be read, resumes exactly."""

import json
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as DecodingTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanvae.data.clips import ClipSample, decode_sample, warm_up
from leanvae.data.config import DataConfig, source_weights
from leanvae.data.order import epoch_order, locate, substitute
from leanvae.data.sources import Clip
from leanvae.media import MediaError

try:
    from pebble import ProcessExpired, ProcessFuture, ProcessPool
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError("decoding training clips needs pebble: pip install 'leanvae[video]'") from error

logger = logging.getLogger(__name__)

# So many bad clips in a row at one position mean that hardly any is good; trying them all could take hours.
_MAX_ATTEMPTS = 32
# Decoder processes that all die before one clip is decoded do not die of the clips.
_MAX_RESTARTS = 5


class _DecoderTerminated(Exception):
    """A decoder process was told to end from outside, as when a job's processes all are: not the clip's fault."""


class TooManyBadClips(RuntimeError):
    """More clips cannot be used than ``data.max_bad_share`` allows."""


@dataclass(frozen=True)
class Rejection:
    """A clip that could not be used at a position of the order.

    Attributes:
        position: step * batch size + index in the global batch.
        attempt: 0 for the clip that the order names, 1 for its first substitute, ...
        path: the file.
        reason: what is wrong with it.
        substitute: the file tried in its place.
        modified: time at which the file was last changed, in nanoseconds; -1 where it could not be read.
    """

    position: int
    epoch: int
    attempt: int
    path: str
    reason: str
    substitute: str
    modified: int


@dataclass(frozen=True)
class Batch:
    """One rank's part of a training step.

    Attributes:
        clips: (n, 3, T, H, W) uint8, full-range RGB.
        indices: places in the global batch.
        paths: files that the clips come from.
        rejected: the clips that were replaced here.
    """

    clips: Tensor
    indices: list[int]
    paths: list[str]
    rejected: list[Rejection]


def check_bad_share(rejected: Mapping[str, str], total: int, max_share: float) -> None:
    """Stops the run when too many files are unusable.

    Args:
        rejected: reasons by path, of all ranks.
        total: number of training files.
        max_share: allowed share of them (``data.max_bad_share``).

    Raises:
        TooManyBadClips: with the count and the first few files and reasons.
    """
    if len(rejected) <= max_share * total:
        return
    listed = "\n".join(f"  {path}: {rejected[path]}" for path in sorted(rejected)[:10])
    more = f"\n  and {len(rejected) - 10} more" if len(rejected) > 10 else ""
    raise TooManyBadClips(
        f"{len(rejected)} of {total} training files cannot be used; data.max_bad_share allows {max_share:.0%}:\n"
        f"{listed}{more}"
    )


class QuarantineRecord:
    """The rejections of a run: one JSON object a line, in one file a rank, kept over resumes.

    Decisions already recorded, by any rank of any earlier start, are replayed, because whether a clip runs out
    of time is not the same every time. What is recorded of a file that has changed since counts no more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[int, int], Rejection] = {}
        for file in sorted({*path.parent.glob("quarantine.rank*.jsonl"), path}):
            for rejection in _read_rejections(file):
                if rejection.modified == _modified(rejection.path):
                    self._known[rejection.position, rejection.attempt] = rejection
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            # A line torn by a crash must not swallow the next one.
            self._append(b"\n")

    def find(self, position: int, attempt: int, path: str) -> Rejection | None:
        """The recorded rejection of ``path`` there, if there is one; other data leave records behind."""
        known = self._known.get((position, attempt))
        return known if known is not None and known.path == path else None

    def add(self, rejection: Rejection) -> None:
        """Writes a rejection to disk, unless it is recorded already."""
        if self.find(rejection.position, rejection.attempt, rejection.path) is None:
            self._known[rejection.position, rejection.attempt] = rejection
            self._append(json.dumps(asdict(rejection)).encode() + b"\n")

    def reasons(self) -> dict[str, str]:
        """Reasons by path of all rejections."""
        return {rejection.path: rejection.reason for rejection in self._known.values()}

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _modified(path: str) -> int:
    """Time of a file's last change in nanoseconds, or -1."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _read_rejections(path: Path) -> Iterator[Rejection]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            yield Rejection(**json.loads(line))
        except (ValueError, TypeError):
            logger.warning("%s: passed over a line that is not complete", path)


class ClipLoader:
    """Yields one rank's batches, a training step each, without end.

    What a step holds depends on (clips, config, seed, step) alone: not on the number of ranks, on when training
    was resumed, or on how fast clips decode. Use it as a context manager, or call :meth:`close`.

    Args:
        clips: the training clips, of all sources.
        seed: non-negative; of the order, the windows, the crops and the flips.
        batch_size: of all ranks together.
        start_step: the first step to yield.
        record: this rank's file of rejections, named ``quarantine.rank<R>.jsonl``; all such files beside it are
            read.

    Raises:
        ValueError: no clips, a source without training clips, or a batch size that the ranks cannot share.
    """

    def __init__(
        self,
        config: DataConfig,
        clips: Sequence[Clip],
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        record: Path,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch size {batch_size} cannot be shared by {world_size} ranks: it must be a multiple")
        self.config = config
        self.seed = seed
        self.batch_size = batch_size
        local = batch_size // world_size
        self.indices = range(rank * local, (rank + 1) * local)
        self.sources = [[clip for clip in clips if clip.source == n] for n in range(len(config.sources))]
        self.sizes = [len(source) for source in self.sources]
        for source, size in zip(config.sources, self.sizes, strict=True):
            if not size:
                raise ValueError(
                    f"data.sources: {source.path}: no clips are left for training, data.held_out took them all"
                )
        self.weights = source_weights(config, self.sizes)
        self.num_files = len({clip.path for clip in clips})
        self.record = QuarantineRecord(record)
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None
        self._ahead: deque[list[_Pending]] = deque()
        self._next_step = start_step
        self._restarts = 0
        self._pool: ProcessPool | None = _decoder_pool(config.num_workers)

    @property
    def rejected_paths(self) -> dict[str, str]:
        """Unusable files so far with the reason, those of earlier starts and their ranks included."""
        return self.record.reasons()

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decoder processes; safe to call again."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            _stop(pool)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches from ``start_step`` on, or from where the last iteration stopped.

        Raises:
            TooManyBadClips: this rank alone has met more bad files than ``data.max_bad_share`` allows.
            RuntimeError: the loader is closed.
        """
        while True:
            while len(self._ahead) <= self.config.prefetch:
                step = self._next_step
                positions = (step * self.batch_size + index for index in self.indices)
                self._ahead.append([self._begin(position) for position in positions])
                self._next_step += 1
            pending = self._ahead.popleft()
            yield self._finish(pending)

    def _finish(self, pending: list["_Pending"]) -> Batch:
        samples, rejected = [], []
        for item in pending:
            sample, rejections = self._wait(item)
            samples.append(sample)
            rejected.extend(rejections)
        frames = torch.from_numpy(np.stack([sample.frames for sample in samples]))
        return Batch(
            clips=frames.permute(0, 4, 1, 2, 3).contiguous(),
            indices=list(self.indices),
            paths=[sample.clip.path for sample in samples],
            rejected=rejected,
        )

    def _begin(self, position: int) -> "_Pending":
        """Starts on the clip that the order names for a position."""
        epoch, place = locate(position, sum(self.sizes))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.sizes, self.weights, self.seed, epoch))
        source, index = self._order[1][place].tolist()
        item = _Pending(position, epoch, place, source, index, [])
        self._schedule(item, self.sources[source][index])
        return item

    def _substitute(self, item: "_Pending", path: str, reason: str) -> Clip:
        """The next clip to try at a position."""
        attempt = len(item.rejections) - 1
        size = self.sizes[item.source]
        if attempt >= min(_MAX_ATTEMPTS, size - 1):
            raise TooManyBadClips(
                f"data.sources: {self.config.sources[item.source].path}: {attempt + 1} clips tried one after "
                f"another cannot be used; the last one is {path}: {reason}"
            )
        return self.sources[item.source][substitute(self.seed, item.epoch, item.place, attempt, item.index, size)]

    def _schedule(self, item: "_Pending", clip: Clip) -> None:
        """Sends a clip, or the substitute that the record knows for it, to the decoder processes."""
        if self._pool is None:
            raise RuntimeError("the clip loader is closed")
        while known := self.record.find(item.position, len(item.rejections), clip.path):
            item.rejections.append(known)
            clip = self._substitute(item, known.path, known.reason)
        seed = (self.seed, *divmod(item.position, self.batch_size))
        item.clip = clip
        arguments = (clip, self.config, seed)
        try:
            item.future = self._pool.schedule(decode_sample, args=arguments, timeout=self.config.timeout)
        except RuntimeError:  # all decoder processes died, and pebble gave the pool up
            self._restart()
            item.future = self._pool.schedule(decode_sample, args=arguments, timeout=self.config.timeout)

    def _restart(self) -> None:
        """Replaces the decoder processes; what they had not finished is scheduled again when it is waited for."""
        if self._restarts == _MAX_RESTARTS:
            raise RuntimeError(f"all decoder processes died {_MAX_RESTARTS + 1} times in a row, before any result")
        self._restarts += 1
        self.close()
        self._pool = _decoder_pool(self.config.num_workers)

    def _wait(self, item: "_Pending") -> tuple[ClipSample, list[Rejection]]:
        """A position's sample, after as many substitutes as it takes."""
        while True:
            assert item.future is not None
            assert item.clip is not None
            bad = item.clip
            try:
                outcome = _outcome(item.future, self.config.timeout)
            except _DecoderTerminated:
                self._schedule(item, bad)
                continue
            self._restarts = 0
            if isinstance(outcome, ClipSample):
                return outcome, item.rejections
            rejection = Rejection(
                item.position, item.epoch, len(item.rejections), bad.path, outcome, "", _modified(bad.path)
            )
            item.rejections.append(rejection)
            clip = self._substitute(item, bad.path, outcome)
            item.rejections[-1] = Rejection(**{**asdict(rejection), "substitute": clip.path})
            self.record.add(item.rejections[-1])
            logger.debug("%s: not used: %s", bad.path, outcome)
            check_bad_share(self.rejected_paths, self.num_files, self.config.max_bad_share)
            self._schedule(item, clip)


@dataclass
class _Pending:
    """A position whose clip is being decoded, with what was rejected there so far."""

    position: int
    epoch: int
    place: int
    source: int
    index: int
    rejections: list[Rejection]
    clip: Clip | None = None
    future: "ProcessFuture[ClipSample] | None" = None


def read_held_out(clips: Sequence[Clip], config: DataConfig, limit: int) -> list[ClipSample]:
    """Reads the central windows of the first usable held-out clips, under the same time limit as in training.

    Args:
        limit: how many to return at most; fewer come back when there are no more.
    """
    samples: list[ClipSample] = []
    pool = _decoder_pool(1)
    try:
        for clip in clips:
            if len(samples) == limit:
                break
            future = pool.schedule(decode_sample, args=(clip, config, None), timeout=config.timeout)
            outcome = _outcome(future, config.timeout)
            if isinstance(outcome, ClipSample):
                samples.append(outcome)
            else:
                logger.warning("%s: held-out clip not used: %s", clip.path, outcome)
    finally:
        _stop(pool)
    return samples


def _decoder_pool(num_workers: int) -> ProcessPool:
    # Fresh processes: forked ones would inherit the threads and locks of torch, and communication with it.
    context = multiprocessing.get_context("spawn")
    return ProcessPool(max_workers=num_workers, initializer=warm_up, context=context)


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _outcome(future: "ProcessFuture[ClipSample]", timeout: float) -> ClipSample | str:
    """The sample, or the reason why there is none."""
    try:
        return future.result()
    except MediaError as error:
        return error.reason
    except DecodingTimeout:
        return f"decoding took longer than {timeout:g} s"
    except ProcessExpired as error:
        if abs(error.exitcode) == signal.SIGTERM:
            raise _DecoderTerminated from error
        return f"the decoder process died (exit code {error.exitcode})"
    except (BrokenProcessPool, CancelledError) as error:
        raise _DecoderTerminated from error
    except Exception as error:
        # Whatever else a file makes the decoders do, it must not end the run; many of them will.
        return f"{type(error).__name__}: {error}"
