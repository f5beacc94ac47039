"""Clips and images by address, and the way to their bytes; free of torch."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import fsspec
from fsspec import AbstractFileSystem

from leanvae.media.errors import MediaError

Kind = Literal["clip", "image"]
Hdr = Literal["tonemap", "refuse"]  # what is done with a clip in PQ or HLG

_NO_COLUMNS: Mapping[str, Any] = {}  # shared: most of millions of items have none
BUILTIN = "builtin"  # an address, of photographs that packages carry and of clips made of them
HELD_OUT_WITH = "builtin clip"  # column of a built-in photograph: the clip made of it, which is held out with it


@dataclass(frozen=True, slots=True)
class Item:
    """A clip or image named by an address.

    Attributes:
        address: file, tar or folder of frames: a path or an fsspec URL.
        kind: `clip` or `image`.
        member: its name inside the tar, if it lies in one.
        offset, size: where its data lie in the tar, in bytes.
        frames: names of the images in a folder of frames, in order.
        start: seconds since the container's start at which the clip begins.
        end: seconds at which it ends; None means the end of the file.
        columns: what a table or tar says about it, such as `caption`; `fps` of a folder of frames.
        source: index of the address that listed it.
    """

    address: str
    kind: Kind
    member: str = ""
    offset: int = 0
    size: int = 0
    frames: tuple[str, ...] = ()
    start: float = 0.0
    end: float | None = None
    columns: Mapping[str, Any] = field(default_factory=lambda: _NO_COLUMNS, compare=False)
    source: int = 0

    @property
    def path(self) -> str:
        """The address, with the name inside a tar; bytes of file names that are not UTF-8 are surrogates."""
        return f"{self.address}/{self.member}" if self.member else self.address

    @property
    def name(self) -> str:
        """The path as users and stores see it: text that any encoder takes."""
        return printable(self.path)

    @property
    def id(self) -> str:
        """Twenty hexadecimal digits that depend on path, start and end alone."""
        return hashlib.sha256(json.dumps([self.path, self.start, self.end]).encode()).hexdigest()[:20]

    @property
    def split_name(self) -> str:
        """The part of its name that decides whether it is held out.

        This is the file's name. Names in tars are often plain numbers, so the tar's name stands before them.
        """
        held_out_with = self.columns.get(HELD_OUT_WITH)
        if held_out_with:
            return held_out_with
        base = os.path.basename(self.address)
        return f"{base}/{self.member}" if self.member else base


def cache_folder() -> Path:
    """Name the user's folder for what is made once and kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanvae"


def printable(text: str) -> str:
    """Write bytes that are not UTF-8, which Python keeps as surrogates, as `\\udcXX`."""
    return text.encode("utf-8", "backslashreplace").decode()


def local_path(address: str) -> str | None:
    """Return the path of an address on this machine, or None if it lies elsewhere."""
    if "://" not in address:
        return os.path.expanduser(address)
    fs, path = fsspec.url_to_fs(address)
    return str(path) if "local" in fs.protocol else None


@contextmanager
def open_item(item: Item) -> Iterator[str | BinaryIO]:
    """Give a local path, or a seekable file for remote addresses and tar members.

    Raises:
        MediaError: a local file cannot be opened, or a tar ends before the item does.
        OSError: a remote file cannot be opened.
    """
    path = local_path(item.address)
    if path is not None and not item.member:
        yield path
        return
    fs, place = fsspec.url_to_fs(item.address) if path is None else (None, path)  # the system must outlive its file
    with _open(item, fs, place) as file:
        if not item.member:
            yield file
            return
        missing = item.offset + item.size - file.seek(0, os.SEEK_END)
        if missing > 0:
            raise MediaError(item.name, f"truncated: the tar ends {missing} bytes before it should")
        yield cast(BinaryIO, _Part(file, item.offset, item.size))


def _open(item: Item, fs: AbstractFileSystem | None, path: str) -> BinaryIO:
    if fs is not None:
        return cast(BinaryIO, fs.open(path, "rb"))
    try:
        return open(path, "rb")
    except OSError as error:
        raise MediaError(item.name, error.strerror or str(error)) from error


def read_item(item: Item) -> bytes:
    """Read all of an item's bytes.

    Raises:
        MediaError: a local file cannot be read, or a tar ends before the item does.
        OSError: a remote file cannot be read.
    """
    with open_item(item) as opened:
        if not isinstance(opened, str):
            return opened.read()
        try:
            with open(opened, "rb") as file:
                return file.read()
        except OSError as error:
            raise MediaError(item.name, error.strerror or str(error)) from error


class _Part(io.RawIOBase):
    """A part of a seekable file, as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
