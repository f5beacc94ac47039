"""The loader of training data: decodes ahead in processes, replaces what cannot be read, resumes exactly."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leanvae.data.buckets import Shape
from leanvae.data.config import DataConfig
from leanvae.data.order import substitute
from leanvae.data.quarantine import (
    QuarantineRecord,
    Rejection,
    TooManyBadClips,
    check_bad_share,
    modification_time,
)
from leanvae.data.samples import Sample, read_sample
from leanvae.data.schedule import Draw, Schedule
from leanvae.media.item import Item
from leanvae.media.pool import DecoderPool, Task
from leanvae.media.worker import FileFailure
from litevae.errors import InvalidInput

logger = logging.getLogger(__name__)

# So many bad files in a row at one position mean that hardly any is good; trying them all could take hours.
_MAX_ATTEMPTS = 32


@dataclass(frozen=True)
class Batch:
    """One rank's part of a training step.

    Attributes:
        bucket: the shape of its samples.
        size: samples of all ranks together.
        pixels: uint8, full-range RGB; clips (n, 3, T, H, W), images (n, 3, H, W).
        indices: places in the global batch.
        paths: files that the samples come from.
        rejected: what was replaced here.
    """

    bucket: Shape
    size: int
    pixels: Tensor
    indices: list[int]
    paths: list[str]
    rejected: list[Rejection]


class Loader:
    """Yields one rank's batches, a training step each, without end.

    What a step holds depends on (items, config, schedule, step) alone: not on the number of ranks, on when
    training was resumed, or on how fast files decode. Use it as a context manager, or call :meth:`close`.

    Args:
        config: a ``ClipDataConfig`` where there are clips.
        schedule: what each step draws.
        start_step: the first step to yield.
        record: this rank's file of rejections, named ``quarantine.rank<R>.jsonl``; all such files beside it are
            read.
    """

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        record: Path,
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.rank = rank
        self.world_size = world_size
        self.record = QuarantineRecord(record)
        self._ahead: deque[tuple[Draw, list[_Pending]]] = deque()
        self._next_step = start_step
        self._pool = DecoderPool(config.num_workers, config.timeout)

    @property
    def rejected_paths(self) -> dict[str, str]:
        """Unusable files so far with the reason, those of earlier starts and their ranks included."""
        return self.record.reasons()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoder processes; safe to call again."""
        self._pool.close()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from ``start_step`` on, or from where the last iteration stopped.

        Raises:
            TooManyBadClips: this rank alone has met more bad files than ``data.max_bad_share`` allows.
            RuntimeError: the loader is closed.
        """
        while True:
            while len(self._ahead) <= self.config.prefetch:
                self._ahead.append(self._begin_step(self._next_step))
                self._next_step += 1
            yield self._finish(*self._ahead.popleft())

    def _finish(self, draw: Draw, pending: list["_Pending"]) -> Batch:
        samples, rejected = [], []
        for item in pending:
            sample, rejections = self._wait(item)
            samples.append(sample)
            rejected.extend(rejections)
        frames = torch.from_numpy(np.stack([sample.frames for sample in samples]))
        return Batch(
            bucket=draw.bucket,
            size=draw.batch_size,
            pixels=frames.movedim(-1, 1).contiguous(),
            indices=[item.index for item in pending],
            paths=[sample.item.name for sample in samples],
            rejected=rejected,
        )

    def _begin_step(self, step: int) -> tuple[Draw, list["_Pending"]]:
        """Start on this rank's part of a step.

        Raises:
            ValueError: the ranks cannot share its batch.
        """
        draw = self.schedule.at(step)
        share, rest = divmod(draw.batch_size, self.world_size)
        if rest:
            raise InvalidInput(
                f"step {step}: {draw.batch_size} samples of {draw.bucket} cannot be shared by {self.world_size} ranks"
            )
        return draw, [self._begin(draw, step, index) for index in range(self.rank * share, (self.rank + 1) * share)]

    def _begin(self, draw: Draw, step: int, index: int) -> "_Pending":
        """Start on what the order names for a place in a step's batch."""
        source, number = draw.row.item(self.schedule.seed, draw.place + index)
        pending = _Pending(draw, step, index, source, number, [], draw.row.items[source][number])
        self._schedule(pending, pending.item, urgent=False)
        return pending

    def _substitute(self, pending: "_Pending", path: str, reason: str) -> Item:
        """Choose what to try next at a position."""
        attempt = len(pending.rejections) - 1
        row, items = pending.draw.row, pending.draw.row.items[pending.source]
        if attempt >= min(_MAX_ATTEMPTS, len(items) - 1):
            raise TooManyBadClips(
                f"data.sources: {self.config.sources[row.sources[pending.source]].path}: {attempt + 1} files tried one "
                f"after another for {pending.draw.bucket} cannot be used; the last one is {path}: {reason}"
            )
        return items[substitute(self.schedule.seed, pending.position, attempt, pending.number, len(items))]

    def _schedule(self, pending: "_Pending", item: Item, urgent: bool) -> None:
        """Send an item, or the substitute that the record knows for it, to the decoder processes."""
        while known := self.record.find(pending.position, len(pending.rejections), item.name):
            pending.rejections.append(known)
            item = self._substitute(pending, known.path, known.reason)
        pending.item = item
        seed = (self.schedule.seed, pending.step, pending.index)
        pending.task = self._pool.submit(read_sample, item, self.config, pending.draw.bucket, seed, urgent=urgent)

    def _wait(self, pending: "_Pending") -> tuple[Sample, list[Rejection]]:
        """Wait for a position's sample, after as many substitutes as it takes."""
        while True:
            assert pending.task is not None
            bad = pending.item
            result = pending.task.result()
            if not isinstance(result, FileFailure):
                return result, pending.rejections
            rejection = Rejection(
                pending.position,
                len(pending.rejections),
                bad.name,
                reason=result.reason,
                substitute="",
                modified=modification_time(bad.address),
                file=bad.address if bad.address != bad.name else "",
            )
            pending.rejections.append(rejection)
            item = self._substitute(pending, bad.name, result.reason)
            pending.rejections[-1] = replace(rejection, substitute=item.name)
            self.record.add(pending.rejections[-1])
            logger.debug("%s: not used: %s", bad.name, result.reason)
            check_bad_share(self.rejected_paths, self.schedule.num_files, self.config.max_bad_share)
            self._schedule(pending, item, urgent=True)  # a step waits for it


@dataclass
class _Pending:
    """A position whose item is being decoded, with what was rejected there so far.

    ``source`` is one of the row's, ``number`` the item's place in it by the order, before any substitution.
    """

    draw: Draw
    step: int
    index: int
    source: int
    number: int
    rejections: list[Rejection]
    item: Item
    task: Task[Sample] | None = None

    @property
    def position(self) -> int:
        """Number of the sample in the run."""
        return self.draw.position + self.index


def read_first(schedule: Schedule, config: DataConfig, count: int) -> Iterator[Sample]:
    """Read one sample of each of the first steps, the phases' steps in turn; unusable files are passed over.

    Args:
        schedule: of the run.
        config: of the data.
        count: steps; each phase has an equal part.

    Raises:
        InvalidInput: none of the samples can be used; names the first file and its reason.
    """
    failures: list[FileFailure] = []
    num_usable = 0
    for result in _read_steps(schedule, config, count):
        if isinstance(result, FileFailure):
            failures.append(result)
        else:
            num_usable += 1
            yield result
    if not num_usable:
        first = f": {failures[0].path}: {failures[0].reason}" if failures else ""
        raise InvalidInput(f"training.start: none of the first {count} samples can be used{first}")


def _read_steps(schedule: Schedule, config: DataConfig, count: int) -> Iterator[Sample | FileFailure]:
    waiting: deque[Task[Sample]] = deque()
    with DecoderPool(config.num_workers, config.timeout) as pool:
        for step in schedule.first_steps(count):
            draw = schedule.at(step)
            source, number = draw.row.item(schedule.seed, draw.place)
            item, seed = draw.row.items[source][number], (schedule.seed, step, 0)
            waiting.append(pool.submit(read_sample, item, config, draw.bucket, seed))
            if len(waiting) > 2 * config.num_workers:
                yield waiting.popleft().result()
        for task in waiting:
            yield task.result()


def read_held_out(items: Sequence[Item], config: DataConfig, bucket: Shape, limit: int) -> list[Sample]:
    """Read the central parts of the first usable held-out clips or pictures, under the time limit of training.

    Args:
        items: all clips, or all images.
        bucket: the shape that they are cut to.
        limit: how many to return at most; fewer come back when there are no more.
    """
    samples: list[Sample] = []
    with DecoderPool(1, config.timeout) as pool:
        for item in items:
            if len(samples) == limit:
                break
            result = pool.submit(read_sample, item, config, bucket, None).result()
            if isinstance(result, FileFailure):
                logger.warning("%s: held out, but not used: %s", item.name, result.reason)
            else:
                samples.append(result)
    return samples
