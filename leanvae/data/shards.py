"""Tar shards of images (WebDataset's form): listed by their headers, read by offset."""

import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from leanvae.media.errors import MediaError, SourceError
from leanvae.media.video import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """An image inside a tar.

    Attributes:
        name: its path there.
        offset, size: where its data lie in the tar, in bytes.
    """

    name: str
    offset: int
    size: int


def has_braces(path: str) -> bool:
    """Whether a path holds WebDataset's notation of a range, as in ``shard-{000000..000012}.tar``."""
    return _BRACES.search(path) is not None


def expand_braces(path: str) -> Iterator[str]:
    """The paths that ranges in braces stand for, both ends included, padded with zeros like the ends.

    Raises:
        SourceError: a range that runs backwards.
    """
    found = _BRACES.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise SourceError(f"data.sources: {path}: the range {found.group()} runs backwards")
    width = max(len(first), len(last)) if "0" in (first[:1], last[:1]) else 0
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{path[: found.start()]}{number:0{width}}{path[found.end() :]}")


def list_members(shard: Path) -> list[Member]:
    """Lists the images of a tar in its order, from the headers alone; hidden files and other types are passed over.

    Of a tar that breaks off, or is damaged after its first image, the images before count; a warning names it.

    Raises:
        SourceError: it cannot be read, is compressed, or has no intact image before the damage.
    """
    place = f"data.sources: {shard}"
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            start = file.read(6)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise SourceError(f"{place}: compressed with {name}: decompress it, images must be read by offset")
        members, damage = _read_headers(shard, size)
    except OSError as error:
        raise SourceError(f"{place}: cannot be read: {error.strerror}") from error
    if damage and not members:
        raise SourceError(f"{place}: not an intact tar: {damage}")
    if damage:
        logger.warning("%s: damaged, %d images before that are used: %s", place, len(members), damage)
    return members


def _read_headers(shard: Path, size: int) -> tuple[list[Member], str]:
    """The images before the first damage, and what that is, if any."""
    members: list[Member] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    return members, f"it ends inside {info.name}"
                if info.isreg() and not info.issparse() and _is_wanted(info.name):
                    members.append(Member(info.name.removeprefix("./"), info.offset_data, info.size))
            # tarfile takes a damaged header behind the first for the end, which is a block of zeros.
            with shard.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    return members, f"the header at byte {tar.offset} is damaged"
    except tarfile.TarError as error:
        return members, str(error)
    return members, ""


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def read_member(shard: str, offset: int, size: int, name: str) -> bytes:
    """Reads an image's data out of a tar.

    Args:
        name: what errors call it.

    Raises:
        MediaError: the tar is gone, cannot be read, or has become shorter.
    """
    try:
        with open(shard, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise MediaError(name, error.strerror or str(error)) from error
    if len(data) < size:
        raise MediaError(name, f"truncated: the tar ends {size - len(data)} bytes before it should")
    return data
