"""Reading a store for diffusion training: by index, or in an order that resumes exactly."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from leanvae import distributed
from leanvae.latents.store import STATISTICS, Store, StoreError
from litevae.errors import InvalidInput
from litevae.posterior import DiagonalGaussian

# Separate the random streams that share a seed.
_ORDER, _NOISE = 1, 2
_NO_WORKER = 2**32 - 1

Key = int | tuple[int, int]


class LatentClips(Dataset[dict[str, Any]]):
    """The clips of a store, by index or one after the other.

    An item is a dictionary of `latent` `(Z, T', H', W')` float32, `size` (3,) the true (T, H, W), `fps` (0 if unknown),
    `key`, `source`, `caption` (empty if there is none) and `flipped`.

    `clips[epoch, index]` depends only on the seed, the epoch and the clip. So does the output of an iteration: an
    epoch's share of this rank and, in a `DataLoader` worker, of this worker. For batches of one shape, pass
    `ShapeBatches` to a `DataLoader` as `batch_sampler`. `clips[index]`, which other samplers request, is a new sample
    each time, drawn with torch's global generator, as a `DataLoader` draws its order.

    Args:
        store: path or fsspec address.
        mode: whether to take the posterior's mean instead of a sample.
        flip: whether to take the mirror image of half of the clips, which the store must hold.
        normalize: whether to bring the channels to mean 0 and standard deviation 1 by the store's statistics.
        seed: seed of samples, flips and order.
        rank, world_size: place of this process; None means its place in distributed training.

    Attributes:
        manifest: the record of how the store was made.
        statistics: `mean` and `std` of each channel, with `normalize`.

    Raises:
        StoreError: there is no store, it holds no clips, it is damaged, or a channel that `normalize` divides is
            constant.
        InvalidInput: `flip` with a store without mirror images.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        mode: bool = False,
        flip: bool = False,
        normalize: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._store = Store(store)
        self.manifest = self._store.manifest()
        if flip and not self.manifest["flips"]:
            raise InvalidInput(f"flip: {store} holds no mirror images; encode_clips --flips makes them")
        self._index = self._store.index().combine_chunks()  # a row is found at once
        if not len(self):
            raise StoreError(f"{store}: holds no clips yet")
        self.statistics = self._store.read_json(STATISTICS) if normalize else None
        if self.statistics and min(self.statistics["std"]) <= 0:
            raise StoreError(f"{store}: normalize: channel {self.statistics['std'].index(0)} is constant")
        self._mode = mode
        self._flip = flip
        self.seed = seed
        self.rank, self.world_size = process_place(rank, world_size)
        # Shared with the copies in a loader's workers: the last epoch and who finished it; an epoch and its position.
        self._progress = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._finished_here: int | None = None
        self.load_state_dict({"epoch": 0, "position": 0})

    def __len__(self) -> int:
        return self._index.num_rows

    @property
    def epoch(self) -> int:
        """The current epoch; it advances when an iteration ends, here or in a loader's workers."""
        return _unpack(self._progress[0])[0] + 1

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.load_state_dict({"epoch": epoch, "position": 0})

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape `(Z, T', H', W')` of each clip's latent."""
        return [tuple(shape) for shape in self._index["latent_shape"].to_pylist()]

    def facts(self, index: int) -> dict[str, Any]:
        """Return a clip's row of the index, with its source's `columns` as a dictionary."""
        row = self._index.slice(index, 1).to_pylist()[0]
        return {**row, "columns": json.loads(row["columns"])}

    def posterior(self, index: int, flipped: bool = False) -> DiagonalGaussian:
        """Return a clip's stored posterior, `(1, Z, T', H', W')` in float32, with its true size."""
        row = self._index.slice(index, 1).to_pylist()[0]
        return self._read(row, flipped)

    def _read(self, row: dict[str, Any], flipped: bool) -> DiagonalGaussian:
        tensors = self._store.read_tensors(row)
        prefix = "flipped_" if flipped else ""
        mean, logvar = (tensors[f"{prefix}{part}"][None].float() for part in ("mean", "logvar"))
        return DiagonalGaussian(mean, logvar, tuple(row["size"]))

    def __getitem__(self, index: Key) -> dict[str, Any]:
        """Return the item of an epoch and an index; for only an index, a new sample each time.

        Raises:
            InvalidInput: the key is only an index, which with several ranks does not say whose clip it is.
        """
        epoch, index = index if isinstance(index, tuple) else (None, index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: the store holds {len(self)} clips")
        index %= len(self)
        if epoch is not None:
            seed = int(np.random.SeedSequence([_NOISE, self.seed, epoch, index]).generate_state(1, np.uint64)[0])
        elif self.world_size == 1:
            seed = int(torch.randint(2**63 - 1, ()))
        else:
            raise InvalidInput(
                f"clip {index}: {self.world_size} ranks would all read all clips. Give the DataLoader "
                "batch_sampler=ShapeBatches(clips, batch_size), or make LatentClips(..., rank=0, world_size=1) and "
                "divide its indices by a DistributedSampler. A single item is clips[epoch, index]"
            )
        row = self._index.slice(index, 1).to_pylist()[0]
        generator = torch.Generator().manual_seed(seed)
        flipped = self._flip and row["flipped"] and bool(torch.rand((), generator=generator) < 0.5)
        posterior = self._read(row, flipped)
        latent = (posterior.mode() if self._mode else posterior.sample(generator))[0]
        return make_item(self._normalized(latent), row, flipped)

    def _normalized(self, latent: Tensor) -> Tensor:
        if self.statistics is None:
            return latent
        mean, std = (torch.tensor(self.statistics[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
        return (latent - mean) / std

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rest of this rank's and this worker's share of the epoch, which then advances."""
        worker = get_worker_info()
        share, num_shares = (worker.id, worker.num_workers) if worker else (0, 1)
        loop = (worker.seed - worker.id) % _NO_WORKER if worker else _NO_WORKER  # the same in all its workers
        finished, finished_by = _unpack(self._progress[0])
        # Another worker of this loop may finish before this one begins.
        is_late = finished_by == loop != _NO_WORKER and finished != self._finished_here
        epoch = finished if is_late else finished + 1
        order = epoch_order(len(self), self.seed, epoch)
        for number, place in enumerate(range(self._position(epoch) + self.rank, len(order), self.world_size)):
            if worker is None:
                self._progress[1] = _pack(epoch, place - self.rank + self.world_size)
            if number % num_shares == share:
                yield self[epoch, int(order[place])]
        self._progress[0] = _pack(epoch, loop)
        self._finished_here = epoch

    def _position(self, epoch: int) -> int:
        """Return the number of an epoch's clips that all ranks together have had."""
        begun, position = _unpack(self._progress[1])
        return position if begun == epoch else 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of its clips that all ranks together have had.

        If a loader's workers iterate, only the epoch is known.
        """
        return {"epoch": self.epoch, "position": self._position(self.epoch)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position of an iteration with the same seed, on any number of ranks."""
        self._progress[1] = _pack(state["epoch"], state["position"])
        self._progress[0] = _pack(state["epoch"] - 1, _NO_WORKER)


def _pack(epoch: int, number: int) -> int:
    """Pack an epoch and a number below 2^32 into one integer, which no process can see half written."""
    return epoch << 32 | number


def _unpack(packed: Tensor) -> tuple[int, int]:
    return int(packed) >> 32, int(packed) % 2**32


class ShapeBatches(Sampler[list[Key]]):
    """Batches of clips whose latents have the same shape, for a `DataLoader`'s `batch_sampler`.

    Each rank gets the same number of batches, with the same shape at a time. An epoch has each clip once, except that
    clips of a shape are repeated to fill its last batch.

    Args:
        clips: the data set.
        batch_size: clips of a rank's batch.
    """

    def __init__(self, clips: LatentClips, batch_size: int) -> None:
        if batch_size < 1:
            raise InvalidInput(f"batch_size: expected at least 1, got {batch_size}")
        self._clips = clips
        self._batch_size = batch_size
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(clips.shapes):
            shapes.setdefault(shape, []).append(index)
        self._buckets = [np.asarray(indices) for _, indices in sorted(shapes.items())]
        self._epoch = self._position = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        together = self._batch_size * self._clips.world_size
        return sum(-(-len(bucket) // together) for bucket in self._buckets)

    @property
    def epoch(self) -> int:
        """The current epoch; it advances after an iteration. The next epoch begins with its first batch."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield the rest of the epoch, which then advances; if nothing is left, the next epoch."""
        if 0 < len(self) <= self._position:  # a loop was left at the last batch
            self.epoch += 1
        together = self._batch_size * self._clips.world_size
        batches = shape_batches(self._buckets, together, self._clips.seed, self.epoch)
        start = self._clips.rank * self._batch_size
        for position in range(self._position, len(batches)):
            self._position = position + 1
            yield [(self.epoch, int(index)) for index in batches[position][start : start + self._batch_size]]
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of its batches so far.

        A `DataLoader` with workers draws batches ahead: there, count those that it has yielded instead.
        """
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position of an iteration with the same seed, batch size and number of ranks."""
        self._epoch, self._position = state["epoch"], state["position"]


def make_item(latent: Tensor, facts: dict[str, Any], flipped: bool) -> dict[str, Any]:
    """Build an item of a data set of latents; see `LatentClips`."""
    return {
        "latent": latent,
        "size": torch.tensor(facts["size"]),
        "fps": facts["fps"] or 0.0,
        "key": facts["key"],
        "source": facts["source"],
        "caption": facts["caption"] or "",
        "flipped": flipped,
    }


def epoch_order(num_clips: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order the clips of an epoch: a permutation."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(num_clips)


def shape_batches(
    buckets: Sequence[NDArray[np.int64]], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Order an epoch's batches, each from one bucket, whose last batch is filled up with its first clips."""
    generator = np.random.default_rng([_ORDER, seed, epoch])
    batches: list[NDArray[np.int64]] = []
    for bucket in buckets:
        num_batches = -(-len(bucket) // batch_size)
        filled = np.resize(generator.permutation(bucket), num_batches * batch_size)
        batches.extend(filled.reshape(num_batches, batch_size))
    return [batches[number] for number in generator.permutation(len(batches))]


def process_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the rank and the number of ranks; None means those of this process."""
    if (rank is None) != (world_size is None):
        raise InvalidInput(f"rank and world_size: give both or none, got {rank} and {world_size}")
    if rank is None or world_size is None:
        return distributed.rank(), distributed.world_size()
    if not 0 <= rank < world_size:
        raise InvalidInput(f"rank: expected 0 to {world_size - 1}, got {rank}")
    return rank, world_size
