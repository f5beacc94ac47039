"""Which clips and images folders, globs, ranges, lists, tables and tars name, on this machine or at an fsspec address.

A folder is searched for files whose endings are known, and what it holds besides is counted in a warning. A file that
is named, alone or in a list, is taken whatever its ending.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from leanvae.media.builtin import find_photographs, make_builtin_clips
from leanvae.media.errors import SourceError
from leanvae.media.image import ANIMATION_SUFFIX, is_animation, missing_plugin
from leanvae.media.item import BUILTIN, HELD_OUT_WITH, Item, Kind, cache_folder, local_path, printable
from leanvae.media.tables import Row, read_list, read_table
from leanvae.media.tars import is_tar, list_members

logger = logging.getLogger(__name__)

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".264", ".265", ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc",
    ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
    ".nut", ".ogg", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})
IMAGE_SUFFIXES = frozenset({
    ".avif", ".bmp", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".jxl", ".pgm", ".png", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
})
# fmt: on
_TABLE_SUFFIXES = (".csv", ".parquet")
_NO_MEDIA = {".txt", ".json", *_TABLE_SUFFIXES}  # what a glob matches besides
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)")
_NOUNS = {"clip": "clips", "image": "images", None: "clips or images"}


@dataclass
class _Search:
    """What is searched for, and what was passed over on the way.

    Attributes:
        where: what errors begin with.
        address: what is listed.
        source: its index.
        without: a folder that is not entered.
        ignored: numbers of files that are of no use, by ending.
        unreadable: folders that cannot be read, and why.
        unmatched: numbers of captions and the like in tars that belong to no video, by ending.
    """

    kind: Kind | None
    where: str
    address: str
    source: int
    without: str | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    unmatched: Counter[str] = field(default_factory=Counter)

    def item(self, address: str, **fields: Any) -> Item:
        suffix = PurePosixPath(address).suffix.lower()
        is_image = suffix in IMAGE_SUFFIXES and (self.kind is not None or not _is_animation(address))
        kind = self.kind or ("image" if is_image else "clip")
        return Item(address, kind, source=self.source, **fields)

    def wants(self, suffix: str, address: str = "") -> bool:
        suffixes = {"clip": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES, None: VIDEO_SUFFIXES | IMAGE_SUFFIXES}
        if self.kind == "clip" and address and _is_animation(address):
            return True
        return suffix in suffixes[self.kind] and not missing_plugin(suffix)

    def error(self, address: str, reason: str) -> SourceError:
        return SourceError(f"{self.where}: {printable(address)}: {reason}")


def _is_animation(address: str) -> bool:
    """Tell whether a file is an animated WebP, which is a clip; remote and unreadable ones are not looked into."""
    path = local_path(address)
    if path is None or not path.lower().endswith(ANIMATION_SUFFIX):
        return False
    try:
        with open(path, "rb") as file:
            return is_animation(file.read(21))
    except OSError:
        return False


def list_items(
    addresses: Sequence[str],
    kind: Kind | tuple[Kind, ...] | None = None,
    *,
    where: str,
    cache: Path | None = None,
    without: Path | None = None,
    unreadable: dict[str, str] | None = None,
) -> list[Item]:
    """List the clips and images that addresses name, in an order that does not depend on the machine.

    Hidden files are passed over. In a folder, tars count where they are wanted for images, or nothing else is there.
    A folder whose own images are numbered is one clip where clips are wanted, no video lies in it, and it is named
    itself: as an address, in a list or in a table.

    Args:
        addresses: folders, globs, files, ranges such as `shard-{000..012}.tar`, lists (`.txt`), tables (`.csv`,
            `.parquet`) and tars, as paths or fsspec URLs; `builtin` stands for photographs of installed packages and
            clips made of them.
        kind: what is wanted, of all addresses or of each; None takes both by the endings of names.
        where: what errors and warnings begin with, such as the setting that holds the addresses.
        cache: folder for the built-in clips; None takes the user's.
        without: a folder that is not searched.
        unreadable: gets the folders that cannot be read, and why.

    Raises:
        SourceError: an address is missing, empty, wrongly written or cannot be read.
        MissingFile: the packages with the built-in photographs are not installed.
    """
    items: list[Item] = []
    searches: list[_Search] = []
    for source, address in enumerate(addresses):
        search = _Search(kind[source] if isinstance(kind, tuple) else kind, where, address, source)
        search.without = without and os.path.realpath(without)
        if address == BUILTIN:
            found = _list_builtin(search, cache or cache_folder())
        else:
            found = _expand_tars(_list_address(address, search), search)
        if not found:
            raise search.error(address, _why_nothing(search))
        items += found
        searches.append(search)
    locked = {folder: reason for search in searches for folder, reason in search.unreadable.items()}
    _warn(searches, locked)
    if unreadable is not None:
        unreadable |= locked
    return items


def _warn(searches: list[_Search], locked: dict[str, str]) -> None:
    """Say what was of no use."""
    ignored, unmatched = Counter[str](), Counter[str]()
    for search in searches:
        beside = [other for other in searches if other.address == search.address]
        used = {suffix for suffix in search.ignored if any(other.wants(suffix) for other in beside)}
        ignored.update({suffix: count for suffix, count in search.ignored.items() if suffix not in used})
        unmatched += search.unmatched
    where = searches[0].where if searches else ""
    if ignored:
        logger.warning("%s: passed over %s", where, _counts(ignored))
    if unmatched:
        logger.warning("%s: in tars, %s match no video", where, _counts(unmatched))
    for folder, reason in locked.items():
        logger.warning("%s: %s: cannot be read, nothing in it is used: %s", where, printable(folder), reason)


def _counts(counter: Counter[str]) -> str:
    """Write numbers of files by ending, the most frequent first: `3 .json, 1 without an ending`."""
    ordered = sorted(counter.items(), key=lambda pair: (-pair[1], pair[0] or "~"))
    return ", ".join(f"{count} {suffix or 'without an ending'}{_need(suffix)}" for suffix, count in ordered)


def _need(suffix: str) -> str:
    package = missing_plugin(suffix)
    return f" (pip install {package})" if package else ""


def _why_nothing(search: _Search) -> str:
    if search.unreadable:
        return next(iter(search.unreadable.values()))
    reason = f"no {_NOUNS[search.kind]} found"
    if search.ignored:
        reason += f"; it holds {_counts(search.ignored)}"
    if search.kind == "clip" and any(suffix in IMAGE_SUFFIXES for suffix in search.ignored):
        reason += "; images are a clip if they are numbered without gaps, and their folder is named itself"
    return reason


def _list_builtin(search: _Search, cache: Path) -> list[Item]:
    if search.kind == "image":
        photographs = sorted(find_photographs().items())
        return [search.item(str(path), columns={HELD_OUT_WITH: f"photo_{name}.mp4"}) for name, path in photographs]
    return [search.item(str(path)) for path in make_builtin_clips(cache)]


def _list_address(address: str, search: _Search) -> list[Item]:
    """List what an address names; tars stand for what they hold."""
    path = local_path(address)
    fs, path = (LocalFileSystem(), str(Path(path))) if path is not None else fsspec.url_to_fs(address)
    try:
        if fs.isdir(path):
            return _list_folder(fs, path, address, search)
        if fs.isfile(path):
            return _list_file(fs, path, address, search)
    except PermissionError as error:
        raise search.error(address, error.strerror or str(error)) from error
    if has_braces(address):
        return [item for each in expand_braces(address, search.where) for item in _list_address(each, search)]
    if glob.has_magic(path):
        return _list_matches(fs, path, address, search)
    raise search.error(address, "no such file or folder")


def has_braces(address: str) -> bool:
    """Tell whether an address holds a range in braces, as in `shard-{000000..000012}.tar`."""
    return _BRACES.search(address) is not None


def expand_braces(address: str, where: str) -> Iterator[str]:
    """Yield what ranges in braces stand for, both ends included, padded with zeros like the ends.

    Raises:
        SourceError: a range runs backwards.
    """
    found = _BRACES.search(address)
    if found is None:
        yield address
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise SourceError(f"{where}: {address}: the range {found.group()} runs backwards")
    width = max(len(first), len(last)) if "0" in (first[:1], last[:1]) else 0
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{address[: found.start()]}{number:0{width}}{address[found.end() :]}", where)


def _list_folder(fs: AbstractFileSystem, path: str, address: str, search: _Search) -> list[Item]:
    from tqdm import tqdm

    names = _walk(path, search) if isinstance(fs, LocalFileSystem) else _find(fs, path)
    files = sorted(tqdm(names, "listing the files", unit=" files", disable=None, delay=1.0, leave=False))
    passed_over = search.ignored.copy()
    found, tars = [], []
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if search.wants(suffix, _full_address(fs, file, address)):
            found.append(file)
        elif suffix == ".tar":
            tars.append(file)
        else:
            search.ignored[suffix] += 1
    if search.kind == "image":
        found = sorted(found + tars)
    elif not found and tars:
        found = tars
    elif tars:
        search.ignored[".tar"] += len(tars)
    if not found and search.kind == "clip" and (frames := _frames_in(files, path)):
        search.ignored = passed_over
        return [search.item(_full_address(fs, path, address), frames=frames)]
    return [search.item(_full_address(fs, file, address)) for file in found]


def _walk(folder: str, search: _Search) -> Iterator[str]:
    """Yield all files under a local folder, links followed (each folder once), hidden ones left out."""

    def note(error: OSError) -> None:
        search.unreadable[str(error.filename)] = error.strerror or str(error)

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or real == search.without:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _find(fs: AbstractFileSystem, folder: str) -> Iterator[str]:
    for file in cast(Iterable[str], fs.find(folder)):
        if not any(part.startswith(".") for part in os.path.relpath(file, folder).split("/")):
            yield file


def _frames_in(files: Iterable[str], folder: str) -> tuple[str, ...]:
    """List the images that lie in a folder itself, in order, if they are numbered without gaps; else nothing."""
    names = [file[len(folder.rstrip("/")) + 1 :] for file in files]
    found = [
        _NUMBERED.fullmatch(name)
        for name in names
        if "/" not in name and name[:1] != "." and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    ]
    numbers = sorted((int(match[2]), match[0]) for match in found if match)
    kinds = {(match[1], match[3].lower()) for match in found if match}
    steps = {later[0] - earlier[0] for earlier, later in pairwise(numbers)}
    if None in found or len(kinds) != 1 or len(steps) != 1:
        return ()
    return tuple(name for _, name in numbers)


def _list_matches(fs: AbstractFileSystem, path: str, address: str, search: _Search) -> list[Item]:
    """List what a glob matches; of one that names no ending, neither text nor files of the other kind."""
    if isinstance(fs, LocalFileSystem):
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    else:
        found = cast(list[str], fs.glob(path))
        matches = [match for match in found if fs.isfile(match) and not os.path.basename(match).startswith(".")]
    names_ending = not glob.has_magic(PurePosixPath(path).suffix or "*")
    unwanted = _NO_MEDIA | (VIDEO_SUFFIXES | IMAGE_SUFFIXES)
    items = []
    for match in sorted(matches):
        suffix = os.path.splitext(match)[1].lower()
        if names_ending or search.wants(suffix, match) or suffix not in unwanted:
            items += _list_file(fs, match, _full_address(fs, match, address), search)
        else:
            search.ignored[suffix] += 1
    return items


def _list_file(fs: AbstractFileSystem, path: str, address: str, search: _Search) -> list[Item]:
    suffix = PurePosixPath(path).suffix.lower()
    full = _full_address(fs, path, address)
    if suffix == ".txt":
        return _list_rows(read_list(fs, path, search.where), fs, path, address, search)
    if suffix in _TABLE_SUFFIXES:
        return _list_rows(read_table(fs, path, search.where, search.kind), fs, path, address, search)
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not (search.wants(suffix, full) or missing_plugin(suffix)):
        named = "a .tar or an image file" if search.kind == "image" else "a .tar or a video file"
        raise search.error(address, f"expected a .csv, a .txt, a .parquet or {named}, got {suffix!r}")
    return [search.item(full)]


def _list_rows(rows: Iterable[Row], fs: AbstractFileSystem, path: str, address: str, search: _Search) -> list[Item]:
    """List what a list or table at `path` names."""
    items = []
    for row in rows:
        item = search.item(_relative_to(fs, path, address, row.path), start=row.start, end=row.end)
        if row.columns:
            item = replace(item, columns=row.columns)
        if item.kind == "clip" and not search.wants(os.path.splitext(row.path)[1].lower()):
            item = _as_frames(item)
        items.append(item)
    return items


def _as_frames(item: Item) -> Item:
    """Turn a folder of numbered images into a clip; leave other files as they are."""
    fs, path = fsspec.url_to_fs(item.address)
    if not fs.isdir(path):
        return item
    return replace(item, frames=_frames_in(cast(list[str], fs.ls(path, detail=False)), path))


def _relative_to(fs: AbstractFileSystem, path: str, address: str, name: str) -> str:
    """Resolve the address of a file that a list or table at `path` names, relative to its folder by default."""
    if "://" in name:
        return name
    if isinstance(fs, LocalFileSystem):
        return str(Path(path).parent / Path(name).expanduser())
    if os.path.isabs(os.path.expanduser(name)):
        return os.path.expanduser(name)
    return _full_address(fs, f"{path.rpartition('/')[0]}/{name}", address)


def _full_address(fs: AbstractFileSystem, path: str, address: str) -> str:
    """Name the address of a file that was found by way of another address."""
    if isinstance(fs, LocalFileSystem):
        return path
    _, separator, outer = address.partition("::")  # as in zip://inner.mp4::s3://bucket/outer.zip
    return fs.unstrip_protocol(path) + separator + outer


def _expand_tars(items: list[Item], search: _Search) -> list[Item]:
    """Put what tars hold in their places."""
    from tqdm import tqdm

    num_tars = sum(is_tar(item.address) for item in items)
    if not num_tars:
        return items
    if num_tars > 1:
        logger.info("listing the %s in %d tars", _NOUNS[search.kind], num_tars)
    expanded = []
    with tqdm(desc="listing the tars", unit="tar", total=num_tars, disable=None if num_tars > 1 else True) as bar:
        for item in items:
            if not is_tar(item.address):
                expanded.append(item)
                continue
            tar = list_members(item.address, search.wants, with_columns=search.kind != "image", where=search.where)
            search.unmatched += tar.unmatched
            for member in tar.members:
                kind = search.kind or search.item(member.name).kind
                columns = {**item.columns, **member.columns} if item.columns or member.columns else item.columns
                place = {"member": member.name, "offset": member.offset, "size": member.size}
                expanded.append(replace(item, kind=kind, columns=columns, **place))
            bar.update()
    return expanded
