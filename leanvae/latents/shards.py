"""Writing shards, each of which becomes part of the store in one step."""

import hashlib
import json
import tarfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from io import BufferedWriter, BytesIO, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from leanvae.latents.entry import FACTS, TENSORS, StoreEntry
from leanvae.latents.statistics import Moments
from leanvae.latents.store import SHARDS, SHARED_COLUMNS, ShardFacts, SourceRecord, Store, naming

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_INDEXED = {TENSORS: "", FACTS: "facts_"}  # members whose place is in the index, with the prefix of its columns
_SECONDS_PER_SHARD = 120.0  # most work that a kill can cost


class ShardWriter:
    """Writer of shards, used in a `with` block; its regular end completes the last shard.

    Args:
        store: the store.
        writer: name of this process, unique among those that write to the store at the same time.
        shard_bytes: length at which a shard is complete; it is also complete after two minutes.
    """

    def __init__(self, store: Store, writer: str, shard_bytes: int) -> None:
        self._store = store
        self._writer = writer
        self._shard_bytes = shard_bytes
        self._number = store.next_number(writer)
        self._records: list[SourceRecord] = []
        self._shard: _OpenShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.complete()
        finally:
            if self._shard is not None:
                self._shard.discard()

    def add(self, entries: Sequence[StoreEntry]) -> None:
        """Add entries."""
        for entry in entries:
            if self._shard is None:
                self._shard = _OpenShard(self._store, self._name)
            self._shard.add(entry)

    def note(self, record: SourceRecord) -> None:
        """Record a source whose entries have all been added."""
        self._records.append(record)

    def complete_if_due(self) -> None:
        """Complete the shard if it is long or old enough."""
        shard = self._shard
        if shard is not None and (
            shard.num_bytes >= self._shard_bytes or time.monotonic() - shard.started > _SECONDS_PER_SHARD
        ):
            self.complete()

    def complete(self) -> None:
        """Make the added entries part of the store, then the sources that they complete."""
        if self._shard is None and not self._records:
            return
        if self._shard is not None:
            self._shard.complete()
        if self._records:
            self._store.write_sources(self._name, self._records)
        self._shard, self._records = None, []
        self._number += 1

    @property
    def _name(self) -> str:
        return f"{self._writer}-{self._number:06d}"


class _OpenShard:
    """A tar being written."""

    def __init__(self, store: Store, name: str) -> None:
        self.started = time.monotonic()
        self._store = store
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._moments = Moments()
        with ExitStack() as stack:
            path = stack.enter_context(store.new_file(f"{SHARDS}/{name}.tar"))
            self._path = store.path(f"{SHARDS}/{name}.tar") if store.is_local else str(path)
            self._file = stack.enter_context(_HashedFile(path))
            self._tar = stack.enter_context(tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT))
            self._stack = stack.pop_all()

    @property
    def num_bytes(self) -> int:
        return self._tar.offset

    def add(self, entry: StoreEntry) -> None:
        facts = entry.facts
        row = {name: facts[name] for name in SHARED_COLUMNS}
        row |= {"source_id": entry.key.partition("_")[0], "shard": self._name}
        row |= {"columns": json.dumps(facts["columns"], default=str)}
        for extension, data in entry.members().items():
            info = tarfile.TarInfo(f"{entry.key}.{extension}")
            info.size = len(data)
            if extension in _INDEXED:
                prefix = _INDEXED[extension]
                row |= {f"{prefix}offset": self._tar.offset + tarfile.BLOCKSIZE, f"{prefix}bytes": len(data)}
            with naming(self._path):
                self._tar.addfile(info, BytesIO(data))
        self._rows.append(row)
        self._moments.add(entry.tensors["mean"], entry.tensors["logvar"])

    def complete(self) -> None:
        with naming(self._path):
            self._tar.close()
            self._file.flush()
        facts = ShardFacts(self._file.hash.hexdigest(), self._file.tell(), self._moments)
        self._store.write_shard_index(self._name, self._rows, facts)
        self._stack.close()

    def discard(self) -> None:
        with suppress(OSError):  # the unwritten rest may not fit on the disk
            self._stack.__exit__(RuntimeError, RuntimeError("the shard is given up"), None)


class _HashedFile(BufferedWriter):
    """A file written once from start to end, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "wb"))
        self.hash = hashlib.sha256()

    def write(self, data: "ReadableBuffer") -> int:
        self.hash.update(data)
        return super().write(data)
