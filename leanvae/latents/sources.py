"""What is to be encoded: folders, globs, lists, CSV and Parquet files and WebDataset tars, at any fsspec address."""

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any, cast

from leanvae.data.config import BUILTIN, ClipDataConfig
from leanvae.data.shards import expand_braces
from leanvae.media.builtin import make_builtin_clips
from leanvae.media.errors import SourceError
from leanvae.media.video import VIDEO_SUFFIXES
from litevae.errors import extra

with extra("latents"):
    import fsspec
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq
    from fsspec import AbstractFileSystem
    from fsspec.implementations.local import LocalFileSystem

_TABLE_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """A video file, or a part of one, that clips are cut from.

    Attributes:
        address: path or fsspec address of the file, or of the tar that holds it.
        start: seconds since the container's start at which the part begins.
        end: seconds at which it ends, or None for the end of the file.
        member: its name in the tar, if it lies in one.
        offset, size: where its data lie in the tar, in bytes.
        columns: what a table or the tar says of it besides, such as a caption.
    """

    address: str
    start: float = 0.0
    end: float | None = None
    member: str = ""
    offset: int = 0
    size: int = 0
    columns: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """What users see: the address, with the name inside a tar."""
        return f"{self.address}/{self.member}" if self.member else self.address

    @cached_property
    def id(self) -> str:
        """Twenty hexadecimal digits that depend on name, start and end alone."""
        return hashlib.sha256(json.dumps([self.name, self.start, self.end]).encode()).hexdigest()[:20]

    def belongs_to(self, rank: int, world_size: int) -> bool:
        """Whether a rank encodes it; each source has exactly one."""
        return int(self.id, 16) % world_size == rank

    def local_path(self) -> str | None:
        """The file's path on this machine, or None where it has to be fetched."""
        fs, path = fsspec.url_to_fs(self.address)
        return path if isinstance(fs, LocalFileSystem) and not self.member else None

    def read(self) -> bytes:
        """The file's content.

        Raises:
            OSError: it cannot be read.
        """
        fs, path = fsspec.url_to_fs(self.address)
        place = (self.offset, self.offset + self.size) if self.member else (None, None)
        return cast(bytes, fs.cat_file(path, *place))


def list_sources(addresses: Sequence[str]) -> list[Source]:
    """Lists what the given folders, globs, files, lists, tables and tars name; each part of a file once.

    Args:
        addresses: paths or fsspec addresses; `builtin` stands for clips made of photographs of installed packages.

    Raises:
        SourceError: an address is missing, empty or wrongly written.
    """
    found: dict[str, Source] = {}
    for address in addresses:
        sources = [source for expanded in expand_braces(address) for source in _list(expanded)]
        if not sources:
            raise SourceError(f"{address}: no clips found")
        found |= {source.id: source for source in sources}
    return list(found.values())


def find_source(name: str, start: float = 0.0, end: float | None = None) -> Source:
    """The source of a name, as `Source.name` gives it.

    Raises:
        SourceError: it lies in a tar that does not hold it any more.
    """
    archive, is_in_tar, member = name.partition(".tar/")
    if not is_in_tar:
        return Source(name, start, end)
    for source in list_sources([f"{archive}.tar"]):
        if source.member == member:
            return replace(source, start=start, end=end)
    raise SourceError(f"{archive}.tar: {member} is not in it")


def _list(address: str) -> Iterator[Source]:
    if address == BUILTIN:
        yield from (Source(str(path)) for path in make_builtin_clips(ClipDataConfig().cache_folder))
        return
    fs, path = fsspec.url_to_fs(address)
    if fs.isdir(path):
        for file in sorted(fs.find(path)):
            if _is_shown_video(os.path.relpath(file, path)):
                yield Source(_full_address(fs, file, address))
    elif fs.isfile(path):
        yield from _list_file(fs, path, address)
    elif matches := sorted(str(match) for match in fs.glob(path)):
        for match in matches:
            if fs.isfile(match) and not os.path.basename(match).startswith("."):
                yield from _list_file(fs, match, _full_address(fs, match, address))
    else:
        raise SourceError(f"{address}: no such file or folder")


def _is_shown_video(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _full_address(fs: AbstractFileSystem, path: str, address: str) -> str:
    """The address of a file that was found by way of another address."""
    if isinstance(fs, LocalFileSystem):
        return path
    _, separator, outer = address.partition("::")  # as in zip://inner.mp4::s3://bucket/outer.zip
    return fs.unstrip_protocol(path) + separator + outer


def _list_file(fs: AbstractFileSystem, path: str, address: str) -> Iterator[Source]:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".tar":
        yield from _list_tar(fs, path, _full_address(fs, path, address))
    elif suffix == ".txt":
        lines = (line.strip() for line in _read_text(fs, path, address).splitlines())
        yield from (Source(_relative_to(fs, path, address, line)) for line in lines if line and line[0] != "#")
    elif suffix in _TABLE_SUFFIXES:
        yield from _list_table(fs, path, address)
    elif suffix in VIDEO_SUFFIXES:
        yield Source(_full_address(fs, path, address))
    else:
        raise SourceError(f"{address}: expected a video, a .tar, a list (.txt) or a table (.csv, .parquet)")


def _read_text(fs: AbstractFileSystem, path: str, address: str) -> str:
    try:
        return cast(bytes, fs.cat_file(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{address}: cannot be read as UTF-8 text: {error}") from error


def _relative_to(fs: AbstractFileSystem, path: str, address: str, name: str) -> str:
    """The address of a file that a list or table at `path` names, relative to its folder unless it says otherwise."""
    if "://" in name:
        return name
    if os.path.isabs(os.path.expanduser(name)):
        return os.path.expanduser(name)
    parent = path.rpartition("/")[0]
    full = f"{parent}/{name}"
    return os.path.normpath(full) if isinstance(fs, LocalFileSystem) else _full_address(fs, full, address)


def _list_table(fs: AbstractFileSystem, path: str, address: str) -> Iterator[Source]:
    """Rows with a column `path`, if need be `start` and `end` in seconds, and others that are carried along."""
    try:
        if path.lower().endswith(".parquet"):
            table = pq.read_table(io.BytesIO(cast(bytes, fs.cat_file(path))))
        else:
            text = _read_text(fs, path, address).encode()
            as_text = pa_csv.ConvertOptions(column_types={"path": pa.string(), "caption": pa.string()})
            table = pa_csv.read_csv(
                io.BytesIO(text),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
                convert_options=as_text,
            )
    except pa.ArrowInvalid as error:
        raise SourceError(f"{address}: cannot be read as a table: {error}") from error
    if "path" not in table.column_names:
        raise SourceError(f"{address}: a column named 'path' is missing; found {table.column_names}")
    for number, row in enumerate(table.to_pylist(), start=1):
        place = f"{address}: row {number}"
        name, start, end = row.pop("path"), row.pop("start", None), row.pop("end", None)
        if not name:
            raise SourceError(f"{place}: the path is empty")
        start, end = _seconds(start, f"{place}: start") or 0.0, _seconds(end, f"{place}: end")
        if end is not None and end <= start:
            raise SourceError(f"{place}: end {end:g} is not after start {start:g}")
        columns = {key: value for key, value in row.items() if value is not None and value != ""}
        yield Source(_relative_to(fs, path, address, str(name)), start, end, columns=columns)


def _seconds(value: Any, place: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise SourceError(f"{place}: expected seconds, 0 or more, got {value!r}")
    return seconds


def _list_tar(fs: AbstractFileSystem, path: str, address: str) -> Iterator[Source]:
    """The videos of a WebDataset tar, with the JSON and the text that share their key as columns and caption."""
    videos: list[tuple[str, tarfile.TarInfo]] = []
    columns: dict[str, dict[str, Any]] = {}
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                key, _, extension = base.partition(".")
                key = f"{folder}/{key}"
                if not info.isreg():
                    continue
                if _is_shown_video(info.name):
                    videos.append((key, info))
                elif extension in ("json", "txt"):
                    member = tar.extractfile(info)
                    assert member is not None
                    columns.setdefault(key, {}).update(_columns(member.read(), extension, f"{address}/{info.name}"))
    except tarfile.TarError as error:
        raise SourceError(f"{address}: cannot be read as an uncompressed tar: {error}") from error
    for key, info in videos:
        name = info.name.removeprefix("./")
        yield Source(address, member=name, offset=info.offset_data, size=info.size, columns=columns.get(key, {}))


def _columns(data: bytes, extension: str, place: str) -> dict[str, Any]:
    try:
        if extension == "txt":
            return {"caption": data.decode().strip()}
        values = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{place}: cannot be read as {extension}: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{place}: expected a JSON object, got {type(values).__name__}")
    return values
