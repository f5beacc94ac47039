"""Boxes of MP4 and QuickTime files (ISO/IEC 14496-12, 4.2), and the clean aperture that FFmpeg does not apply."""

import os
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

_SAMPLE_ENTRY = 78  # bytes of a visual one, before its own boxes


class Aperture(NamedTuple):
    """The part of coded frames that is shown: its size, and how far its centre lies from theirs, in pixels."""

    width: Fraction
    height: Fraction
    right: Fraction
    down: Fraction

    def place_in(self, width: int, height: int) -> tuple[slice, slice] | None:
        """Compute the rows and columns of frames of a size; None if it does not lie within them or is all of them."""
        left, top = round((width - self.width) / 2 + self.right), round((height - self.height) / 2 + self.down)
        rows, columns = slice(top, top + round(self.height)), slice(left, left + round(self.width))
        is_inside = 0 <= top < rows.stop <= height and 0 <= left < columns.stop <= width
        is_whole = rows == slice(0, height) and columns == slice(0, width)
        return (rows, columns) if is_inside and not is_whole else None


def iter_boxes(file: BinaryIO, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, begin of data and end of boxes whose headers lie in a part of a file; the last may be cut."""
    while place + 8 <= end:
        file.seek(place)
        header = file.read(16)
        length, begin = int.from_bytes(header[:4], "big"), place + 8
        if length == 1:
            length, begin = int.from_bytes(header[8:16], "big"), place + 16
        elif length == 0:
            length = end - place
        if length < 8:  # no box
            return
        yield header[4:8], begin, place + length
        place += length


def _find(file: BinaryIO, place: int, end: int, *path: bytes) -> Iterator[tuple[int, int]]:
    for name, begin, stop in iter_boxes(file, place, end):
        if name == path[0]:
            yield from _find(file, begin, stop, *path[1:]) if path[1:] else [(begin, stop)]


def _track_number(file: BinaryIO, place: int, end: int) -> int | None:
    for header, _ in _find(file, place, end, b"tkhd"):
        file.seek(header)
        data = file.read(24)
        start = 12 if data[:1] == b"\0" else 20  # by the header's version
        return int.from_bytes(data[start : start + 4], "big")
    return None


def clean_aperture(file: BinaryIO, track: int) -> Aperture | None:
    """Read the clean aperture of a track's first sample entry (14496-12, 12.1.4); None if none is stated."""
    for trak in _find(file, 0, file.seek(0, os.SEEK_END), b"moov", b"trak"):
        if _track_number(file, *trak) != track:
            continue
        for descriptions, end in _find(file, *trak, b"mdia", b"minf", b"stbl", b"stsd"):
            for _, entry, stop in iter_boxes(file, descriptions + 8, end):
                for place, _ in _find(file, entry + _SAMPLE_ENTRY, stop, b"clap"):
                    file.seek(place)
                    data = file.read(32)
                    numbers = [int.from_bytes(data[at : at + 4], "big", signed=True) for at in range(0, 32, 4)]
                    if all(numbers[1::2]):
                        return Aperture(*map(Fraction, numbers[::2], numbers[1::2]))
    return None
