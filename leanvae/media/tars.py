"""Tars of images and videos (WebDataset's form), listed by their headers."""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, cast

import fsspec

from leanvae.media.errors import SourceError
from leanvae.media.item import printable

logger = logging.getLogger(__name__)

# Compressed ones are known by their names only to be refused.
_TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TEXT_SUFFIXES = (".json", ".txt")
_NONE: Mapping[str, Any] = {}


class Member(NamedTuple):
    """A clip or image inside a tar.

    Attributes:
        name: its path there.
        offset, size: where its data lie in the tar, in bytes.
        columns: what JSON and text of its name say about it.
    """

    name: str
    offset: int
    size: int
    columns: Mapping[str, Any] = _NONE


@dataclass
class TarContent:
    """What a tar holds.

    Attributes:
        members: in the tar's order.
        unmatched: numbers of JSON and text members that belong to none of them, by ending.
        damage: where it breaks off, and why; empty if it is whole.
    """

    members: list[Member]
    unmatched: Counter[str] = field(default_factory=Counter)
    damage: str = ""


def is_tar(address: str) -> bool:
    """Tell whether a name is that of a tar, compressed or not."""
    return address.lower().endswith(_TAR_SUFFIXES)


def list_members(address: str, wants: Callable[[str], bool], *, with_columns: bool = False, where: str) -> TarContent:
    """List a tar's members from their headers alone; hidden files are passed over.

    Of a tar that breaks off, or is damaged after its first member, those before count; a warning names it.

    Args:
        address: path or fsspec URL.
        wants: whether members of an ending, such as `.mp4`, are listed.
        with_columns: read the JSON and text that share a member's name, too.
        where: what errors begin with.

    Raises:
        SourceError: it cannot be read, is compressed, or has no intact member before the damage.
    """
    place = f"{where}: {printable(address)}"
    try:
        fs, path = fsspec.url_to_fs(address)
        with fs.open(path, "rb") as file:
            start = file.read(6)
            for magic, name in _COMPRESSED.items():
                if start.startswith(magic):
                    raise SourceError(f"{place}: compressed with {name}: decompress it, members must be read by offset")
            content = _read(cast(IO[bytes], file), wants, with_columns, place)
    except OSError as error:
        raise SourceError(f"{place}: cannot be read: {error.strerror or error}") from error
    if content.damage and not content.members:
        raise SourceError(f"{place}: not an intact tar: {content.damage}")
    if content.damage:
        logger.warning("%s: damaged, %d members before that are used: %s", place, len(content.members), content.damage)
    return content


def _read(file: IO[bytes], wants: Callable[[str], bool], with_columns: bool, place: str) -> TarContent:
    size = file.seek(0, 2)
    file.seek(0)
    members: list[Member] = []
    texts: dict[str, dict[str, Any]] = {}  # what JSON and text say, by name without ending
    kinds: dict[str, list[str]] = {}
    damage = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    damage = f"it ends inside {info.name}"
                    break
                if not info.isreg() or info.issparse():
                    continue
                name = info.name.removeprefix("./")
                path = PurePosixPath(name)
                suffix = path.suffix.lower()
                if wants(suffix) and not any(part.startswith(".") for part in path.parts):
                    members.append(Member(name, info.offset_data, info.size))
                elif with_columns and suffix in _TEXT_SUFFIXES:
                    data = cast(IO[bytes], tar.extractfile(info)).read()
                    stem = name[: -len(suffix)]
                    texts.setdefault(stem, {}).update(_columns(data, suffix, f"{place}/{name}"))
                    kinds.setdefault(stem, []).append(suffix)
            else:
                # tarfile takes a damaged header behind the first for the end, which is a block of zeros.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    damage = f"the header at byte {tar.offset} is damaged"
    except tarfile.TarError as error:
        damage = str(error)
    matched = set()
    for index, member in enumerate(members if texts else ()):
        # WebDataset's key ends at the first dot; names that differ only behind it have texts of their own.
        stems = [_key(member.name), str(PurePosixPath(member.name).with_suffix(""))]
        matched.update(stems)
        columns = {name: value for stem in stems for name, value in texts.get(stem, {}).items()}
        if columns:
            members[index] = member._replace(columns=columns)
    unmatched = Counter(suffix for stem, suffixes in kinds.items() if stem not in matched for suffix in suffixes)
    return TarContent(members, unmatched, damage)


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _columns(data: bytes, suffix: str, place: str) -> dict[str, Any]:
    try:
        if suffix == ".txt":
            return {"caption": data.decode().strip()}
        values = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{place}: cannot be read as {suffix[1:]}: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{place}: expected a JSON object, got {type(values).__name__}")
    return values
