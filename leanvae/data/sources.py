"""Data sources: folders, globs, lists, CSV files and tars that name clips or images, and what is held out of them."""

import csv
import glob
import hashlib
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from leanvae.data.config import BUILTIN, DataConfig
from leanvae.data.shards import expand_braces, has_braces, list_members
from leanvae.media.builtin import find_photographs, make_builtin_clips
from leanvae.media.errors import SourceError
from leanvae.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

# Compressed ones are known by their names only to be refused.
_SHARD_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class Clip:
    """A video file, or a part of one.

    Attributes:
        path: the file.
        start: seconds since the container's start at which the clip begins.
        end: seconds at which it ends, or None for the end of the file.
        caption: text that a CSV gives for it.
        source: index of the data source that it comes from.
    """

    path: str
    start: float = 0.0
    end: float | None = None
    caption: str | None = None
    source: int = 0

    @property
    def file(self) -> str:
        """The file on disk."""
        return self.path

    @property
    def split_name(self) -> str:
        """What decides whether it is held out: the file's name."""
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file, or an image inside a tar.

    Attributes:
        path: the file, or ``<tar>/<name inside>``, which is what users see.
        caption: text that a CSV gives for it.
        source: index of the data source that it comes from.
        archive: the tar that holds it, if one does.
        offset, size: where its data lie in the tar, in bytes.
        clip: name of the built-in clip made of it, if one is: both are held out together.
    """

    path: str
    caption: str | None = None
    source: int = 0
    archive: str | None = None
    offset: int = 0
    size: int = 0
    clip: str | None = None

    @property
    def file(self) -> str:
        """The file on disk that holds it."""
        return self.archive or self.path

    @property
    def split_name(self) -> str:
        """What decides whether it is held out: the file's name; in a tar, where numbers serve as names, with its."""
        if self.archive is not None:
            return os.path.basename(self.archive) + self.path[len(self.archive) :]
        return self.clip or os.path.basename(self.path)


Item = Clip | Picture
_Item = TypeVar("_Item", bound=Item)


@dataclass(frozen=True)
class _Kind:
    """What a source is searched for."""

    noun: str
    example: str
    suffixes: frozenset[str]
    has_time: bool


_CLIPS = _Kind("clips", "a video file", VIDEO_SUFFIXES, has_time=True)
_PICTURES = _Kind("images", "a .tar or an image file", IMAGE_SUFFIXES | {".tar"}, has_time=False)


@dataclass(frozen=True)
class _Entry:
    """A file that a source names, with what a CSV says of it."""

    path: str
    start: float = 0.0
    end: float | None = None
    caption: str | None = None


def list_items(config: DataConfig) -> list[Item]:
    """Lists the clips and images of all sources, source by source, in an order that does not depend on the machine.

    The built-in clips are made now if they are not there yet. Of tars only the headers are read, wherever they are
    named; their images stand in the tar's own order.

    Raises:
        SourceError: a source is missing, empty, wrongly written, or a tar that cannot be used.
        FileNotFoundError: the packages with the built-in source's photographs are not installed.
    """
    items: list[Item] = []
    for index, (source, kind) in enumerate(zip(config.sources, config.kinds, strict=True)):
        found = _list_clips(source.path, index, config) if kind == "clips" else _list_pictures(source.path, index)
        if not found:
            raise SourceError(f"data.sources: {source.path}: no {kind} found")
        items.extend(found)
    return items


def _list_clips(path: str, source: int, config: DataConfig) -> list[Clip]:
    if path == BUILTIN:
        found = [_Entry(str(clip)) for clip in make_builtin_clips(config.cache_folder)]
    else:
        found = _list_source(path, _CLIPS)
    return [Clip(entry.path, entry.start, entry.end, entry.caption, source) for entry in found]


def _list_pictures(path: str, source: int) -> list[Picture]:
    if path == BUILTIN:
        photographs = sorted(find_photographs().items())
        return [Picture(str(photo), source=source, clip=f"photo_{name}.mp4") for name, photo in photographs]
    return _to_pictures(_list_source(path, _PICTURES), source)


def _to_pictures(entries: list[_Entry], source: int) -> list[Picture]:
    """Turns files into pictures, each tar into those that it holds."""
    from tqdm import tqdm

    pictures = []
    shards = sum(_is_shard(entry.path) for entry in entries)
    if shards > 1:
        logger.info("listing the images in %d tars", shards)
    with tqdm(desc="listing the tars", unit="tar", total=shards, disable=None if shards > 1 else True) as bar:
        for entry in entries:
            if not _is_shard(entry.path):
                pictures.append(Picture(entry.path, entry.caption, source))
                continue
            pictures.extend(
                Picture(f"{entry.path}/{member.name}", entry.caption, source, entry.path, member.offset, member.size)
                for member in list_members(Path(entry.path))
            )
            bar.update()
    return pictures


def _is_shard(path: str) -> bool:
    return path.lower().endswith(_SHARD_SUFFIXES)


def _list_source(path: str, kind: _Kind) -> list[_Entry]:
    location = Path(path).expanduser()
    if location.is_dir():
        return _to_entries(_walk(location, kind.suffixes))
    if location.is_file():
        suffix = location.suffix.lower()
        if suffix == ".csv":
            return _read_csv(location, kind)
        if suffix == ".txt":
            return _read_list(location)
        if suffix in kind.suffixes or (kind is _PICTURES and _is_shard(path)):
            return [_Entry(str(location))]
        raise SourceError(f"data.sources: {path}: expected a .csv, a .txt or {kind.example}, got {suffix!r}")
    if kind is _PICTURES and has_braces(path):
        return [entry for expanded in expand_braces(path) for entry in _list_source(expanded, kind)]
    if glob.has_magic(path):
        matches = sorted(glob.glob(str(location), recursive=True))
        return _to_entries([match for match in matches if os.path.isfile(match)])
    raise SourceError(f"data.sources: {path}: no such file or folder")


def _to_entries(paths: Sequence[str | Path]) -> list[_Entry]:
    return [_Entry(str(path)) for path in paths]


def _walk(folder: Path, suffixes: frozenset[str]) -> list[str]:
    """All files of a kind under a folder, links followed (each folder once), hidden ones left out; sorted."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.extend(
            os.path.join(parent, name)
            for name in files
            if Path(name).suffix.lower() in suffixes and not name.startswith(".")
        )
    return sorted(found)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"data.sources: {path}: cannot be read as UTF-8 text: {error}") from error


def _read_list(path: Path) -> list[_Entry]:
    """One path a line, relative to the list's folder; empty lines and those that begin with # are passed over."""
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return _to_entries([path.parent / Path(line).expanduser() for line in lines if line and line[0] != "#"])


def _read_csv(path: Path, kind: _Kind) -> list[_Entry]:
    """Columns ``path`` (relative to the CSV) and, if present, ``caption``, and of clips ``start``, ``end``."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), skipinitialspace=True)
    columns = reader.fieldnames or []
    if "path" not in columns:
        raise SourceError(f"data.sources: {path}: a column named 'path' is missing; found {list(columns)}")
    if not kind.has_time and (timed := sorted({"start", "end"} & set(columns))):
        raise SourceError(f"data.sources: {path}: images have no column named {timed[0]!r}: it is for clips")
    entries = []
    for row in _rows(reader, path):
        place = f"data.sources: {path}: line {reader.line_num}"
        if not row["path"]:
            raise SourceError(f"{place}: the path is empty")
        start = _seconds(row.get("start"), f"{place}: start")
        end = _seconds(row.get("end"), f"{place}: end")
        if end is not None and end <= (start or 0.0):
            raise SourceError(f"{place}: end {end:g} is not after start {start or 0.0:g}")
        location = path.parent / Path(row["path"]).expanduser()
        entries.append(_Entry(str(location), start or 0.0, end, row.get("caption") or None))
    return entries


def _rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise SourceError(f"data.sources: {path}: line {reader.line_num}: {error}") from error


def _seconds(text: str | None, place: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise SourceError(f"{place}: expected seconds, 0 or more, got {text!r}")
    return value


def split_held_out(items: Sequence[_Item], share: float) -> tuple[list[_Item], list[_Item]]:
    """Splits clips or pictures into (training, held-out) by a hash of the file name alone.

    Adding, removing or moving files never changes the side of the others, and all parts of a file stand on
    one side. Images in a tar count one by one, under the tar's name and their own. The share is met on average; of
    few files, none or many may be held out.

    Args:
        share: part of the file names to hold out, in [0, 1).
    """
    training, held_out = [], []
    for item in items:
        digest = hashlib.sha256(item.split_name.encode("utf-8", "surrogateescape")).digest()
        below = int.from_bytes(digest[:8], "big") < share * 2**64
        (held_out if below else training).append(item)
    return training, held_out
