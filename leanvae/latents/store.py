"""The store on disk or at any fsspec address: shards with their indexes, and records of the sources.

    store.json              how the store was made; only clips made in the same way may be added
    shards/NAME.tar         entries, in WebDataset's form
    shards/NAME.parquet     a row for each of them; written before the tar appears under its name
    sources/NAME.parquet    finished sources: their number of clips, or why they cannot be used
    index.parquet           the rows of all shards; missing while a run is writing
    statistics.json         mean and standard deviation of the latents' channels
    summary.json            the work of the last run

A tar appears under its name in one step, complete and with its index in place, so only the tars decide what the store
holds. A source is recorded as finished after its last clip is in a tar. So after a kill, at most the decoding of
sources whose clips are already stored is repeated.
"""

import errno
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from leanvae.latents.entry import FACTS, TENSORS, StoreEntry, StoreError, parse_facts, read_json, read_tensors
from leanvae.latents.statistics import Moments
from litevae.files import atomic_path

FORMAT = 1
MANIFEST, INDEX, STATISTICS, SUMMARY = "store.json", "index.parquet", "statistics.json", "summary.json"
SHARDS, SOURCES = "shards", "sources"
_METADATA = b"leanvae"

# Columns of the index that an entry's own JSON has, too.
SHARED_COLUMNS = ("key", "source", "first_frame", "stride", "fps", "size", "latent_shape", "flipped", "caption")

# fmt: off
INDEX_SCHEMA = pa.schema([
    ("key", pa.string()), ("source_id", pa.string()), ("source", pa.string()), ("shard", pa.string()),
    ("offset", pa.int64()), ("bytes", pa.int64()), ("facts_offset", pa.int64()), ("facts_bytes", pa.int64()),
    ("first_frame", pa.int64()), ("stride", pa.int64()),
    ("fps", pa.float64()), ("size", pa.list_(pa.int64())), ("latent_shape", pa.list_(pa.int64())),
    ("flipped", pa.bool_()), ("caption", pa.string()), ("columns", pa.string()),
])
SOURCE_SCHEMA = pa.schema([
    ("id", pa.string()), ("source", pa.string()), ("modified", pa.int64()), ("num_frames", pa.int64()),
    ("num_clips", pa.int64()), ("reason", pa.string()),
])
# fmt: on


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name a file in errors that do not, such as those of a full disk or a network."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno or errno.EIO, reason, path) from error


@dataclass(frozen=True)
class SourceRecord:
    """A finished source.

    Attributes:
        id: the source's id.
        source: its name.
        modified: time of its file's last change in nanoseconds; -1 if unknown or irrelevant.
        num_frames: its number of frames; 0 if it cannot be used.
        num_clips: its number of clips in the store.
        reason: why it cannot be used; None if it can.
    """

    id: str
    source: str
    modified: int
    num_frames: int
    num_clips: int
    reason: str | None


@dataclass(frozen=True)
class ShardFacts:
    """Facts about a shard, which its index holds.

    Attributes:
        sha256: hash of the tar, in hexadecimal.
        bytes: length of the tar.
        moments: sums over its latents.
    """

    sha256: str
    bytes: int
    moments: Moments


class Store:
    """The files of a store.

    Args:
        address: path or fsspec address of the folder.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        self._fs, self.root = fsspec.url_to_fs(self.address)
        self._opened_by = os.getpid()
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.address,)

    @property
    def fs(self) -> AbstractFileSystem:
        """The file system, opened in this process: connections and event loops do not survive a fork."""
        if self._opened_by != os.getpid():
            self._fs, _ = fsspec.url_to_fs(self.address)
            self._opened_by = os.getpid()
        return self._fs

    def path(self, name: str) -> str:
        """Return a file's path in the store's file system."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Tell whether a file exists.

        Raises:
            OSError: the file system does not answer; fsspec's own `exists` and `isdir` would return False.
        """
        self.fs.invalidate_cache()
        try:
            with naming(self.path(name)):
                self.fs.info(self.path(name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read a file, or the bytes from `start` to `end`.

        Raises:
            StoreError: the file does not exist.
        """
        try:
            with naming(self.path(name)):
                return cast(bytes, self.fs.cat_file(self.path(name), start=start, end=end))
        except FileNotFoundError as error:
            raise StoreError(f"{self.address}: {name} is missing") from error

    def names(self, folder: str, suffix: str) -> list[str]:
        """List a folder's files by name without the suffix, sorted; hidden files are left out."""
        names = [path.rpartition("/")[2] for path in self._paths(folder)]
        return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix) and name[0] != ".")

    def _paths(self, folder: str) -> list[str]:
        """List the paths in a folder; none if it does not exist."""
        self.fs.invalidate_cache()  # other ranks write too
        try:
            with naming(self.path(folder)):
                return [str(path) for path in self.fs.ls(self.path(folder), detail=False)]
        except FileNotFoundError:
            return []

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to; the file gets its name, complete, when the block succeeds."""
        self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
        if self.is_local:
            with naming(self.path(name)), atomic_path(self.path(name)) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
            file = Path(folder, "file")
            with naming(str(file)):
                yield file
            # Not every file system writes a file atomically, but all of them rename atomically.
            folder_name, _, base = self.path(name).rpartition("/")
            arriving = f"{folder_name}/.{base}.{os.getpid()}.tmp"
            with naming(self.path(name)):
                self.fs.put_file(str(file), arriving)
                self.fs.mv(arriving, self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
        with self.new_file(name) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file.

        Raises:
            StoreError: it is missing or damaged.
        """
        return read_json(self.read(name), f"{self.address}: {name}")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def read_table(self, name: str) -> pa.Table:
        """Read a Parquet file.

        Raises:
            StoreError: it is missing or damaged.
        """
        data = io.BytesIO(self.read(name))
        try:
            return pq.read_table(data)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.address}: {name} is not a valid Parquet file: {error}") from error

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file."""
        with self.new_file(name) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def manifest(self) -> dict[str, Any]:
        """Read the record of how the store was made.

        Raises:
            StoreError: the store does not exist, or has another format.
        """
        if not self.exists(MANIFEST):
            raise StoreError(f"{self.address}: not a latent store: {MANIFEST} is missing")
        manifest = self.read_json(MANIFEST)
        if manifest.get("format") != FORMAT:
            raise StoreError(f"{self.address}: {MANIFEST}: expected format {FORMAT}, got {manifest.get('format')}")
        return manifest

    def shards(self) -> list[str]:
        """List the names of the shards."""
        return self.names(SHARDS, ".tar")

    def shard_index(self, shard: str) -> pa.Table:
        """Read a shard's index, a row for each clip.

        Raises:
            StoreError: it is missing or damaged.
        """
        name = f"{SHARDS}/{shard}.parquet"
        table = self.read_table(name).replace_schema_metadata()
        if not table.schema.equals(INDEX_SCHEMA):
            raise StoreError(f"{self.address}: {name} has other columns than the index of a shard")
        return table

    def shard_facts(self, shard: str) -> ShardFacts:
        """Read a shard's facts from its index.

        Raises:
            StoreError: it is missing or damaged.
        """
        name = f"{SHARDS}/{shard}.parquet"
        metadata = self.read_table(name).schema.metadata or {}
        try:
            facts = json.loads(metadata[_METADATA])
            return ShardFacts(facts["sha256"], facts["bytes"], Moments.from_json(facts["moments"]))
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self.address}: {name} does not describe its shard: {error!r}") from error

    def write_shard_index(self, shard: str, rows: Sequence[dict[str, Any]], facts: ShardFacts) -> None:
        """Write a shard's index, before the tar itself."""
        described = {"sha256": facts.sha256, "bytes": facts.bytes, "moments": facts.moments.to_json()}
        table = pa.Table.from_pylist(list(rows), INDEX_SCHEMA)
        table = table.replace_schema_metadata({_METADATA: json.dumps(described).encode()})
        self.write_table(f"{SHARDS}/{shard}.parquet", table)

    def index(self) -> pa.Table:
        """Return a row for each clip, shard by shard, even while a run is writing."""
        return self.read_table(INDEX) if self.exists(INDEX) else self.merge_indexes()

    def merge_indexes(self) -> pa.Table:
        """Return a row for each clip, from the shards' own indexes."""
        tables = [self.shard_index(shard) for shard in self.shards()]
        return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()

    def read_tensors(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Read the tensors of the entry described by a row of the index."""
        data, place = self._read_member(row, "")
        return read_tensors(data, f"{place}.{TENSORS}")

    def read_entry(self, row: dict[str, Any]) -> StoreEntry:
        """Read the entry described by a row of the index, without its thumbnail.

        Raises:
            StoreError: the shard does not match the index.
        """
        data, place = self._read_member(row, "facts_")
        return StoreEntry(parse_facts(data, f"{place}.{FACTS}"), self.read_tensors(row))

    def _read_member(self, row: dict[str, Any], prefix: str) -> tuple[bytes, str]:
        name = f"{SHARDS}/{row['shard']}.tar"
        start = row[f"{prefix}offset"]
        return self.read(name, start, start + row[f"{prefix}bytes"]), f"{self.address}: {name}: {row['key']}"

    def sources(self) -> dict[str, SourceRecord]:
        """Return the finished sources by id; if one is recorded twice, the record of a usable source counts."""
        records: dict[str, SourceRecord] = {}
        for name in self.names(SOURCES, ".parquet"):
            for row in self.read_table(f"{SOURCES}/{name}.parquet").to_pylist():
                known = records.get(row["id"])
                if known is None or known.reason is not None:
                    records[row["id"]] = SourceRecord(**row)
        return records

    def write_sources(self, name: str, records: Sequence[SourceRecord]) -> None:
        """Record finished sources."""
        table = pa.Table.from_pylist([asdict(record) for record in records], SOURCE_SCHEMA)
        self.write_table(f"{SOURCES}/{name}.parquet", table)

    def next_number(self, writer: str) -> int:
        """Return the number of a writer's next shard."""
        names = [*self.shards(), *self.names(SOURCES, ".parquet")]
        return 1 + max((int(name.rpartition("-")[2]) for name in names if name.startswith(f"{writer}-")), default=-1)

    def remove_leftovers(self) -> None:
        """Remove the remains of a killed run; call this only while no run is writing."""
        shards = set(self.shards())
        for shard in self.names(SHARDS, ".parquet"):
            if shard not in shards:
                self.remove(f"{SHARDS}/{shard}.parquet")
        for path in (path for folder in ("", SHARDS, SOURCES) for path in self._paths(folder)):
            name = path.rpartition("/")[2]
            if name.startswith(".") and ".tmp" in name:
                self.fs.rm_file(path)
