"""Data sources: folders, globs, lists and CSV files that name clips, and the split into training and held-out."""

import csv
import glob
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leanvae.data.builtin import make_builtin_clips
from leanvae.data.config import BUILTIN, DataConfig
from leanvae.media import VIDEO_SUFFIXES


class SourceError(ValueError):
    """A data source is missing, empty or wrongly written; the message names it and the place in it."""


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


def list_clips(config: DataConfig) -> list[Clip]:
    """Lists the clips of all sources, source by source, in an order that does not depend on the machine.

    The built-in clips are made now if they are not there yet.

    Raises:
        SourceError: a source is missing, empty or wrongly written.
    """
    clips = []
    for index, source in enumerate(config.sources):
        found = _list_source(source.path, index, config)
        if not found:
            raise SourceError(f"data.sources: {source.path}: no clips found")
        clips.extend(found)
    return clips


def _list_source(path: str, index: int, config: DataConfig) -> list[Clip]:
    if path == BUILTIN:
        return _to_clips(make_builtin_clips(config.cache_folder), index)
    location = Path(path).expanduser()
    if location.is_dir():
        return _to_clips(_walk(location), index)
    if location.is_file():
        suffix = location.suffix.lower()
        if suffix == ".csv":
            return _read_csv(location, index)
        if suffix == ".txt":
            return _read_list(location, index)
        if suffix in VIDEO_SUFFIXES:
            return [Clip(str(location), source=index)]
        raise SourceError(f"data.sources: {path}: expected a .csv, a .txt or a video file, got {suffix!r}")
    if glob.has_magic(path):
        matches = sorted(glob.glob(str(location), recursive=True))
        return _to_clips((match for match in matches if os.path.isfile(match)), index)
    raise SourceError(f"data.sources: {path}: no such file or folder")


def _to_clips(paths: Iterable[str | Path], source: int) -> list[Clip]:
    return [Clip(str(path), source=source) for path in paths]


def _walk(folder: Path) -> list[str]:
    """All video files under a folder, links followed (each folder once), hidden ones left out; sorted."""
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
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        )
    return sorted(found)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"data.sources: {path}: cannot be read as UTF-8 text: {error}") from error


def _read_list(path: Path, source: int) -> list[Clip]:
    """One path a line, relative to the list's folder; empty lines and those that begin with # are passed over."""
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return _to_clips((path.parent / Path(line).expanduser() for line in lines if line and line[0] != "#"), source)


def _read_csv(path: Path, source: int) -> list[Clip]:
    """Columns ``path`` (relative to the file's folder) and, if present, ``start``, ``end``, ``caption``."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), skipinitialspace=True)
    columns = reader.fieldnames or []
    if "path" not in columns:
        raise SourceError(f"data.sources: {path}: a column named 'path' is missing; found {list(columns)}")
    clips = []
    for row in _rows(reader, path):
        place = f"data.sources: {path}: line {reader.line_num}"
        if not row["path"]:
            raise SourceError(f"{place}: the path is empty")
        start = _seconds(row.get("start"), f"{place}: start")
        end = _seconds(row.get("end"), f"{place}: end")
        if end is not None and end <= (start or 0.0):
            raise SourceError(f"{place}: end {end:g} is not after start {start or 0.0:g}")
        location = path.parent / Path(row["path"]).expanduser()
        clips.append(Clip(str(location), start or 0.0, end, row.get("caption") or None, source))
    return clips


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


def split_held_out(clips: Sequence[Clip], share: float) -> tuple[list[Clip], list[Clip]]:
    """Splits clips into (training, held-out) by a hash of the file name alone.

    Adding, removing or moving files never changes the side of the others, and all parts of a file stand on
    one side. The share is met on average; of few files, none or many may be held out.

    Args:
        share: part of the file names to hold out, in [0, 1).
    """
    training, held_out = [], []
    for clip in clips:
        digest = hashlib.sha256(os.path.basename(clip.path).encode("utf-8", "surrogateescape")).digest()
        below = int.from_bytes(digest[:8], "big") < share * 2**64
        (held_out if below else training).append(clip)
    return training, held_out
