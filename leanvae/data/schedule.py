"""What each training step draws: a pure function of the seed and the step, given the files and their shapes."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from leanvae.data.buckets import Shape, choose_bucket
from leanvae.data.config import DataConfig, source_weights
from leanvae.data.order import Phase, bucket_of_step, epoch_order, phase_at
from leanvae.media.item import Item, Kind
from leanvae.media.sources import list_items
from litevae.errors import InvalidInput


def list_training_items(config: DataConfig) -> list[Item]:
    """List the clips and images of all sources, source by source.

    Raises:
        SourceError, MissingFile: as in `leanvae.media.sources.list_items`.
    """
    kinds: list[Kind] = ["clip" if kind == "clips" else "image" for kind in config.kinds]
    return list_items(
        [source.path for source in config.sources],
        tuple(kinds),
        where="data.sources",
        cache=config.cache_folder,
    )


def split_held_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split clips and images into (training, held-out) by a hash of the file name alone.

    Adding, removing or moving files never changes the side of the others, and all parts of a file stand on one side.
    What lies in a tar counts one by one, under the tar's name and its own. The share is met on average; of few files,
    none or many may be held out.

    Args:
        share: part of the file names to hold out, in [0, 1).
    """
    training, held_out = [], []
    for item in items:
        digest = hashlib.sha256(item.split_name.encode("utf-8", "surrogateescape")).digest()
        below = int.from_bytes(digest[:8], "big") < share * 2**64
        (held_out if below else training).append(item)
    return training, held_out


@dataclass(frozen=True, eq=False)
class Row:
    """An endless row of the clips or images that belong together in a bucket, epoch after epoch.

    Attributes:
        number: of the row in its run, which gives it an order of its own.
        sources: index of each data source that has a part in it.
        items: what each of those sources gives.
        weights: how many draws each of them gets relative to the others.
    """

    number: int
    sources: list[int]
    items: list[list[Item]]
    weights: list[float]
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the draws of an epoch."""
        return sum(map(len, self.items))

    def item(self, seed: int, place: int) -> tuple[int, int]:
        """Find which of the row's sources, and which of its items, stands at a place of the row."""
        epoch, place = divmod(place, len(self))
        if epoch not in self._epochs:
            self._epochs.clear()  # one is enough: places come in order
            sizes = [len(items) for items in self.items]
            self._epochs[epoch] = epoch_order(sizes, self.weights, seed, epoch, self.number)
        source, number = self._epochs[epoch][place].tolist()
        return source, number


@dataclass(frozen=True)
class Draw:
    """What a step takes.

    Attributes:
        bucket: the shape of its samples.
        batch_size: samples of all ranks together.
        row: where they come from.
        place: of the step's first sample in the row.
        position: number of that sample in the run; the others follow it.
    """

    bucket: Shape
    batch_size: int
    row: Row
    place: int
    position: int


@dataclass(frozen=True)
class _Stretch:
    """A phase with its rows, and where they and the run's samples stand at its beginning; buckets without items are
    left out."""

    phase: Phase
    buckets: list[Shape]
    rows: list[Row]
    shares: tuple[float, ...]
    places: list[int]
    position: int


class Schedule:
    """Assigns the files to buckets, and says what each step draws.

    The sources' weights are shares of the samples. Where a phase puts the same files into a bucket as an earlier one
    did, it goes on in their row where that one stopped.

    Args:
        config: of the data.
        items: the training clips and images of all sources.
        shapes: of the items; `None` where no phase `has_choice`.
        phases: buckets and batch sizes.
        seed: non-negative; of the order, the windows, the crops and the flips.

    Attributes:
        empty: number of the phase and bucket of each bucket that no file is for; it is left out.
        num_files: training files, those in tars counted one by one.

    Raises:
        ValueError: no phases, a source without training files, or a phase without files for any of its buckets.
    """

    def __init__(
        self,
        config: DataConfig,
        items: Sequence[Item],
        shapes: Sequence[Shape | None] | None,
        phases: Sequence[Phase],
        seed: int,
    ) -> None:
        if not phases:
            raise InvalidInput("expected at least one phase")
        self.seed = seed
        self.num_files = len({item.name for item in items})
        self.empty: list[tuple[int, Shape]] = []
        self._phases = tuple(phases)
        sizes = np.bincount([item.source for item in items], minlength=len(config.sources)).tolist()
        for source, size in zip(config.sources, sizes, strict=True):
            if not size:
                raise InvalidInput(
                    f"data.sources: {source.path}: nothing is left for training, data.held_out took it all"
                )
        weights = [weight / size for weight, size in zip(source_weights(config, sizes), sizes, strict=True)]
        rows: dict[bytes, Row] = {}
        taken: dict[int, int] = {}
        position = 0
        self._stretches: list[_Stretch] = []
        for number, phase in enumerate(phases):
            members = assign(items, shapes, list(phase.batches))
            self.empty += [(number, bucket) for bucket in phase.batches if bucket not in members]
            if not members:
                raise InvalidInput(f"phase {number}: there are no files for its buckets")
            found = []
            for indices in members.values():
                key = np.asarray(indices, np.int64).tobytes()
                if key not in rows:
                    rows[key] = _make_row(len(rows), [items[index] for index in indices], weights)
                found.append(rows[key])
            rates = [sum(row.weights) / phase.batches[bucket] for bucket, row in zip(members, found, strict=True)]
            shares = tuple(rate / sum(rates) for rate in rates)
            places = [taken.get(row.number, 0) for row in found]
            stretch = _Stretch(phase, list(members), found, shares, places, position)
            self._stretches.append(stretch)
            _, counts = bucket_of_step(shares, seed, phase.steps)
            for bucket, row, count in zip(members, found, counts, strict=True):
                size = count * phase.batches[bucket]
                taken[row.number] = taken.get(row.number, 0) + size
                position += size

    def at(self, step: int) -> Draw:
        """Choose what a step takes, for steps from 0 on without end."""
        phase = phase_at(self._phases, step)
        stretch = self._stretches[self._phases.index(phase)]
        number, counts = bucket_of_step(stretch.shares, self.seed, step - phase.first_step)
        sizes = [phase.batches[bucket] for bucket in stretch.buckets]
        return Draw(
            bucket=stretch.buckets[number],
            batch_size=sizes[number],
            row=stretch.rows[number],
            place=stretch.places[number] + counts[number] * sizes[number],
            position=stretch.position + sum(count * size for count, size in zip(counts, sizes, strict=True)),
        )

    def first_steps(self, count: int) -> list[int]:
        """Return the first steps of each phase, in all about `count`, fewer of phases that end before."""
        each = -(-count // len(self._phases))
        ends = [phase.first_step for phase in self._phases[1:]]
        starts = [phase.first_step for phase in self._phases]
        stops = [min(start + each, end) for start, end in zip(starts, [*ends, starts[-1] + each], strict=True)]
        return [step for start, stop in zip(starts, stops, strict=True) for step in range(start, stop)]

    def shares(self, phase: int) -> dict[Shape, float]:
        """Compute each bucket's share of the steps in a phase."""
        stretch = self._stretches[phase]
        return dict(zip(stretch.buckets, stretch.shares, strict=True))


def has_choice(buckets: Iterable[Shape]) -> bool:
    """Tell whether files of one kind can go to several buckets, so that their shapes matter."""
    kinds = [bucket.is_image for bucket in buckets]
    return len(kinds) > len(set(kinds))


def assign(
    items: Sequence[Item], shapes: Sequence[Shape | None] | None, buckets: Sequence[Shape]
) -> dict[Shape, list[int]]:
    """Give each clip or image to a bucket of its kind, if there is one.

    Args:
        items: clips and images.
        shapes: of the items; not needed where there is only one bucket of each kind.
        buckets: all different.

    Returns:
        Indices of the items by bucket, in the buckets' order; without buckets that stay empty.
    """
    members: dict[Shape, list[int]] = {bucket: [] for bucket in buckets}
    of_kind = {kind: [bucket for bucket in buckets if bucket.is_image == kind] for kind in (False, True)}
    for index, item in enumerate(items):
        choices = of_kind[item.kind == "image"]
        if len(choices) > 1:
            assert shapes is not None
            members[choices[choose_bucket(shapes[index], choices, item.split_name)]].append(index)
        elif choices:
            members[choices[0]].append(index)
    return {bucket: indices for bucket, indices in members.items() if indices}


def _make_row(number: int, items: Sequence[Item], weights: Sequence[float]) -> Row:
    """Make a row of items; `weights` are those of a single item, by source."""
    by_source: dict[int, list[Item]] = {}
    for item in items:
        by_source.setdefault(item.source, []).append(item)
    draws = [weights[source] * len(part) for source, part in by_source.items()]
    return Row(number, list(by_source), list(by_source.values()), draws)
