"""Lists and tables of clips and images: text with a path a line, CSV and Parquet."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from fsspec import AbstractFileSystem

from leanvae.media.errors import SourceError
from leanvae.media.item import Kind, printable
from litevae.errors import extra

_TEXT_COLUMNS = ("path", "caption")
_INTEGER = re.compile(r"[+-]?\d+")
_NONE: Mapping[str, Any] = {}


class Row(NamedTuple):
    """What a list or table says about a clip or image; see `leanvae.media.item.Item`."""

    path: str
    start: float = 0.0
    end: float | None = None
    columns: Mapping[str, Any] = _NONE


def read_list(fs: AbstractFileSystem, path: str, where: str) -> Iterator[Row]:
    """Read one path a line; empty lines and those that begin with # are passed over.

    Raises:
        SourceError: it is not UTF-8 text.
    """
    lines = (line.strip() for line in _read_text(fs, path, where).splitlines())
    return (Row(line) for line in lines if line and line[0] != "#")


def _read_text(fs: AbstractFileSystem, path: str, where: str) -> str:
    try:
        return cast(bytes, fs.cat_file(path)).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{where}: {printable(path)}: cannot be read as UTF-8 text: {error}") from error


def read_table(fs: AbstractFileSystem, path: str, where: str, kind: Kind | None) -> Iterator[Row]:
    """Read rows with a column `path`, perhaps `start` and `end` in seconds, and others that are carried along.

    Raises:
        SourceError: it is wrongly written; the message names the line or row.
    """
    place = f"{where}: {printable(path)}"
    names, rows = _read_parquet(fs, path, place) if path.lower().endswith(".parquet") else _read_csv(fs, path, where)
    if "path" not in names:
        raise SourceError(f"{place}: a column named 'path' is missing; found {names}")
    if kind == "image" and (timed := sorted({"start", "end"} & set(names))):
        raise SourceError(f"{place}: images have no column named {timed[0]!r}: it is for clips")
    for number, row in rows:
        name, start, end = row.pop("path"), row.pop("start", None), row.pop("end", None)
        if not name:
            raise SourceError(f"{place}: {number}: the path is empty")
        start = _seconds(start, f"{place}: {number}: start") or 0.0
        end = _seconds(end, f"{place}: {number}: end")
        if end is not None and end <= start:
            raise SourceError(f"{place}: {number}: end {end:g} is not after start {start:g}")
        columns = {key: value for key, value in row.items() if value is not None and value != ""}
        yield Row(str(name), start, end, columns or _NONE)


_Rows = tuple[list[str], list[tuple[str, dict[str, Any]]]]  # names of the columns; rows with what errors call them


def _read_parquet(fs: AbstractFileSystem, path: str, place: str) -> _Rows:
    with extra("latents"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        table = pq.read_table(io.BytesIO(cast(bytes, fs.cat_file(path))))
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{place}: cannot be read as a table: {error}") from error
    rows = table.to_pylist()
    return table.column_names, [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_csv(fs: AbstractFileSystem, path: str, where: str) -> _Rows:
    place = f"{where}: {printable(path)}"
    reader = csv.DictReader(io.StringIO(_read_text(fs, path, where), newline=""), skipinitialspace=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        names = list(reader.fieldnames or [])
        for row in reader:
            if None in row:
                count = len(names) + len(row[None])  # pyright: ignore[reportArgumentType]
                raise SourceError(
                    f"{place}: line {reader.line_num}: {count} values for {len(names)} columns; "
                    "put values that hold commas in quotes"
                )
            rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        raise SourceError(f"{place}: line {reader.line_num}: {error}") from error
    for name in names:
        if name not in (*_TEXT_COLUMNS, "start", "end"):
            convert = _type_of([row[name] for _, row in rows])
            for _, row in rows:
                row[name] = convert(row[name]) if row[name] else None
    return names, rows


def _type_of(values: list[str | None]) -> Callable[[str], Any]:
    """Find the type that all values of a column have: whole numbers, numbers, truth values, or else text."""
    given = [value for value in values if value]
    if all(_INTEGER.fullmatch(value) for value in given):
        return int
    if all(value.lower() in ("true", "false") for value in given):
        return lambda value: value.lower() == "true"
    return float if all(_is_number(value) for value in given) else str


def _is_number(text: str) -> bool:
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


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
