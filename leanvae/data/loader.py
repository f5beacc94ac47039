"""The loader of training data: decodes ahead in processes, replaces what cannot be read, resumes exactly."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leanvae.data.config import DataConfig, source_weights
from leanvae.data.order import Phase, epoch_order, locate, phase_at, substitute
from leanvae.data.quarantine import (
    QuarantineRecord,
    Rejection,
    TooManyBadClips,
    check_bad_share,
    modification_time,
)
from leanvae.data.sources import Item
from leanvae.data.workers import (
    DecoderTerminated,
    Sample,
    decode_sample,
    outcome,
    start_decoders,
    stop_decoders,
)

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

logger = logging.getLogger(__name__)

# So many bad files in a row at one position mean that hardly any is good; trying them all could take hours.
_MAX_ATTEMPTS = 32
# Decoder processes that all die before one file is decoded do not die of the files.
_MAX_RESTARTS = 5


@dataclass(frozen=True)
class Batch:
    """One rank's part of a training step.

    Attributes:
        pixels: uint8, full-range RGB; clips (n, 3, T, H, W), images (n, 3, H, W).
        indices: places in the global batch.
        paths: files that the samples come from.
        rejected: what was replaced here.
    """

    pixels: Tensor
    indices: list[int]
    paths: list[str]
    rejected: list[Rejection]


class Loader:
    """Yields one rank's batches, a training step each, without end.

    What a step holds depends on (items, config, seed, phases, step) alone: not on the number of ranks, on when
    training was resumed, or on how fast files decode. Use it as a context manager, or call :meth:`close`.

    Args:
        config: a ``ClipDataConfig`` for clips; phases give the resolution in place of its own.
        items: the training clips, or the training pictures, of all sources.
        seed: non-negative; of the order, the windows, the crops and the flips.
        phases: batch sizes (of all ranks together) and resolutions; see :func:`leanvae.data.order.phases_of`.
        start_step: the first step to yield.
        record: this rank's file of rejections, named ``quarantine.rank<R>.jsonl``; all such files beside it are
            read.

    Raises:
        ValueError: a source without training files, no phases, or a batch size that the ranks cannot share.
    """

    def __init__(
        self,
        config: DataConfig,
        items: Sequence[Item],
        *,
        seed: int,
        phases: Sequence[Phase],
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        record: Path,
    ) -> None:
        _check_phases(phases, world_size)
        self.config = config
        self.seed = seed
        self.phases = tuple(phases)
        self.rank = rank
        self.world_size = world_size
        self.sources: list[list[Item]] = [[] for _ in config.sources]
        for item in items:
            self.sources[item.source].append(item)
        self.sizes = [len(source) for source in self.sources]
        for source, size in zip(config.sources, self.sizes, strict=True):
            if not size:
                raise ValueError(
                    f"data.sources: {source.path}: nothing is left for training, data.held_out took it all"
                )
        self.weights = source_weights(config, self.sizes)
        self.num_files = len({item.path for item in items})
        self.record = QuarantineRecord(record)
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None
        self._ahead: deque[list[_Pending]] = deque()
        self._next_step = start_step
        self._restarts = 0
        self._pool: ProcessPool | None = start_decoders(config.num_workers)

    @property
    def rejected_paths(self) -> dict[str, str]:
        """Unusable files so far with the reason, those of earlier starts and their ranks included."""
        return self.record.reasons()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decoder processes; safe to call again."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            stop_decoders(pool)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches from ``start_step`` on, or from where the last iteration stopped.

        Raises:
            TooManyBadClips: this rank alone has met more bad files than ``data.max_bad_share`` allows.
            RuntimeError: the loader is closed.
        """
        while True:
            while len(self._ahead) <= self.config.prefetch:
                self._ahead.append(self._begin_step(self._next_step))
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
            pixels=frames.movedim(-1, 1).contiguous(),
            indices=[item.index for item in pending],
            paths=[sample.item.path for sample in samples],
            rejected=rejected,
        )

    def _begin_step(self, step: int) -> list["_Pending"]:
        phase = phase_at(self.phases, step)
        local = phase.batch_size // self.world_size
        return [self._begin(phase, step, index) for index in range(self.rank * local, (self.rank + 1) * local)]

    def _begin(self, phase: Phase, step: int, index: int) -> "_Pending":
        """Starts on what the order names for a place in a step's batch."""
        position = phase.position(step, index)
        epoch, place = locate(position, sum(self.sizes))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.sizes, self.weights, self.seed, epoch))
        source, number = self._order[1][place].tolist()
        item = self.sources[source][number]
        pending = _Pending(step, index, phase.resolution, position, epoch, place, source, number, [], item)
        self._schedule(pending, item)
        return pending

    def _substitute(self, pending: "_Pending", path: str, reason: str) -> Item:
        """What to try next at a position."""
        attempt = len(pending.rejections) - 1
        size = self.sizes[pending.source]
        if attempt >= min(_MAX_ATTEMPTS, size - 1):
            raise TooManyBadClips(
                f"data.sources: {self.config.sources[pending.source].path}: {attempt + 1} files tried one after "
                f"another cannot be used; the last one is {path}: {reason}"
            )
        number = substitute(self.seed, pending.epoch, pending.place, attempt, pending.number, size)
        return self.sources[pending.source][number]

    def _schedule(self, pending: "_Pending", item: Item) -> None:
        """Sends an item, or the substitute that the record knows for it, to the decoder processes."""
        if self._pool is None:
            raise RuntimeError("the loader is closed")
        while known := self.record.find(pending.position, len(pending.rejections), item.path):
            pending.rejections.append(known)
            item = self._substitute(pending, known.path, known.reason)
        pending.item = item
        arguments = (item, self.config, pending.resolution, (self.seed, pending.step, pending.index))
        try:
            pending.future = self._pool.schedule(decode_sample, args=arguments, timeout=self.config.timeout)
        except RuntimeError:  # all decoder processes died, and pebble gave the pool up
            self._restart()
            pending.future = self._pool.schedule(decode_sample, args=arguments, timeout=self.config.timeout)

    def _restart(self) -> None:
        """Replaces the decoder processes; what they had not finished is scheduled again when it is waited for."""
        if self._restarts == _MAX_RESTARTS:
            raise RuntimeError(f"all decoder processes died {_MAX_RESTARTS + 1} times in a row, before any result")
        self._restarts += 1
        self.close()
        self._pool = start_decoders(self.config.num_workers)

    def _wait(self, pending: "_Pending") -> tuple[Sample, list[Rejection]]:
        """A position's sample, after as many substitutes as it takes."""
        while True:
            assert pending.future is not None
            bad = pending.item
            try:
                result = outcome(pending.future, self.config.timeout)
            except DecoderTerminated:
                self._schedule(pending, bad)
                continue
            self._restarts = 0
            if not isinstance(result, str):
                return result, pending.rejections
            rejection = Rejection(
                pending.position,
                pending.epoch,
                len(pending.rejections),
                bad.path,
                reason=result,
                substitute="",
                modified=modification_time(bad.file),
                file=bad.file if bad.file != bad.path else "",
            )
            pending.rejections.append(rejection)
            item = self._substitute(pending, bad.path, result)
            pending.rejections[-1] = replace(rejection, substitute=item.path)
            self.record.add(pending.rejections[-1])
            logger.debug("%s: not used: %s", bad.path, result)
            check_bad_share(self.rejected_paths, self.num_files, self.config.max_bad_share)
            self._schedule(pending, item)


@dataclass
class _Pending:
    """A position whose item is being decoded, with what was rejected there so far.

    ``number`` is the item's place in its source by the order, before any substitution.
    """

    step: int
    index: int
    resolution: tuple[int, int]
    position: int
    epoch: int
    place: int
    source: int
    number: int
    rejections: list[Rejection]
    item: Item
    future: "ProcessFuture[Sample] | None" = None


def _check_phases(phases: Sequence[Phase], world_size: int) -> None:
    if not phases:
        raise ValueError("expected at least one phase")
    for number, phase in enumerate(phases):
        if phase.batch_size < 1 or phase.batch_size % world_size:
            raise ValueError(
                f"phase {number} (from step {phase.first_step}): batch size {phase.batch_size} cannot be shared by "
                f"{world_size} ranks: it must be a multiple"
            )


def read_held_out(items: Sequence[Item], config: DataConfig, resolution: tuple[int, int], limit: int) -> list[Sample]:
    """Reads the central parts of the first usable held-out clips or pictures, under the time limit of training.

    Args:
        resolution: (height, width) in pixels.
        limit: how many to return at most; fewer come back when there are no more.
    """
    samples: list[Sample] = []
    pool = start_decoders(1)
    try:
        for item in items:
            if len(samples) == limit:
                break
            future = pool.schedule(decode_sample, args=(item, config, resolution, None), timeout=config.timeout)
            result = outcome(future, config.timeout)
            if isinstance(result, str):
                logger.warning("%s: held out, but not used: %s", item.path, result)
            else:
                samples.append(result)
    finally:
        stop_decoders(pool)
    return samples
