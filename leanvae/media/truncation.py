"""How long a video file has to be, by the lengths that its parts state; more than there is means that it was cut.

Durations are no evidence: they are wrong in intact files. Bytes behind the end are no fault. Files whose lengths are
open, as those of live recordings, count as whole if their last part is. FFmpeg itself reports cuts in other containers.
"""

import math
import os
import re
from typing import BinaryIO

from leanvae.media.boxes import iter_boxes

_DATA_BOXES = (b"mdat", b"moof", b"moov")  # ISO base media: what frames are lost with
_EBML, _SEGMENT, _CLUSTER = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
# What stands in clusters: timestamp, blocks, position, size, padding, checksum; and behind them, what is about all.
_LIVE = {
    *(_CLUSTER, b"\xe7", b"\xa3", b"\xa0", b"\xa7", b"\xab", b"\xec", b"\xbf"),
    *(b"\x1c\x53\xbb\x6b", b"\x12\x54\xc3\x67", b"\x11\x4d\x9b\x74", b"\x10\x43\xa7\x70"),
}
_STEP, _LONGEST_SEARCH = 2**20, 2**26  # bytes from the end in which the last cluster has to begin
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_MXF_PARTITION = bytes.fromhex("060e2b34020501010d010201")
_MXF_RUN_IN = 65_536
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes, and where 0x47 stands; of Blu-ray discs, and with parity
_OGG_PAGE = 65_307


def missing_bytes(file: BinaryIO, container: str) -> float:
    """Count the bytes that a cut file lacks, as far as its container tells; 0 for other containers.

    Args:
        file: seekable; read from its beginning, and left anywhere.
        container: FFmpeg's name of the format.

    Returns:
        The number of bytes; infinity where it is only known that some are missing.
    """
    measure = {
        "mov,mp4,m4a,3gp,3g2,mj2": _length_of_boxes,
        "matroska,webm": _length_of_segment,
        "avi": _length_of_riff,
        "gif": _length_of_blocks,
        "mpegts": _length_of_packets,
        "mxf": _length_to_footer,
        "ogg": _length_of_pages,
        "yuv4mpegpipe": _length_of_frames,
        "asf": _length_in_properties,
        "mpeg": _length_of_packs,
        "mjpeg": _length_of_pictures,
    }.get(container)
    if measure is None:
        return 0
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return max(0, measure(file, size) - size)


def _length_of_boxes(file: BinaryIO, size: int) -> int:
    """Walk the boxes of the top level (ISO/IEC 14496-12, 4.2)."""
    length = 0
    for name, _, end in iter_boxes(file, 0, size):
        if name in _DATA_BOXES:
            length = end + 8 if name == b"moof" else end  # a fragment's data follow it
    return length


def _length_of_segment(file: BinaryIO, size: int) -> float:
    """Read the length of Matroska's segment (RFC 9559, 5.1), or walk the last cluster of one that is live."""
    place = 0
    for wanted in (_EBML, _SEGMENT):
        name, start, length = _element(file, place)
        if name != wanted:
            return 0
        if length is None:
            return _length_of_cluster(file, size)
        place = start + length
    return place


def _length_of_cluster(file: BinaryIO, size: int) -> float:
    """Walk the last cluster's elements (RFC 9559, 5.1.3), whose own length may be open as well."""
    place = _last(file, size, _CLUSTER)
    while place < size:
        name, start, length = _element(file, place)
        if name not in _LIVE:
            return math.inf if any(whole.startswith(name) for whole in _LIVE) else 0
        place = start + (length or 0)
    return place


def _element(file: BinaryIO, place: int) -> tuple[bytes, int, int | None]:
    """Read an element's name, where its data start, and their length; None if that is open (RFC 8794, 4 to 6)."""
    file.seek(place)
    header = file.read(12)
    width = 9 - header[:1].ljust(1, b"\0")[0].bit_length()
    name, rest = header[:width], header[width:].ljust(8, b"\0")
    width = 9 - rest[0].bit_length()
    unknown = 2 ** (7 * width) - 1
    length = int.from_bytes(rest[:width], "big") & unknown
    return name, place + len(name) + width, None if length == unknown else length


def _last(file: BinaryIO, size: int, mark: bytes) -> int:
    """Find where a mark of 4 bytes stands last; the file's size if it does not."""
    for end in range(size, max(0, size - _LONGEST_SEARCH), -_STEP):
        begin = max(0, end - _STEP)
        file.seek(begin)
        found = file.read(end - begin + 3).rfind(mark)
        if found >= 0:
            return begin + found
    return size


def _length_of_riff(file: BinaryIO, size: int) -> int:
    """Walk an AVI's RIFF chunks, of which large files have several; recordings that broke off leave a length at 0."""
    place = 0
    while place < size:
        file.seek(place)
        header = file.read(8)
        if header[:4] != b"RIFF":
            break
        place += 8 + int.from_bytes(header[4:], "little")
    return place - 8  # some writers count the header


def _length_of_blocks(file: BinaryIO, size: int) -> float:
    """Walk a GIF's blocks to its trailer (GIF89a, 27), which none may lack."""
    _skip_colours(file, file.read(13)[10:11])
    while kind := file.read(1):
        if kind == b",":
            _skip_colours(file, file.read(9)[8:9])
        elif kind != b"!":  # the trailer, or what players end at as well
            return 0
        file.read(1)  # code size, or label
        while (length := file.read(1)) > b"\0":
            file.seek(length[0], os.SEEK_CUR)
    return math.inf


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    """Pass over the table of colours that a GIF's flags announce."""
    if flags >= b"\x80":
        file.seek(3 * 2 ** (1 + (flags[0] & 7)), os.SEEK_CUR)


def _length_of_packets(file: BinaryIO, size: int) -> int:
    """Complete the last packet of a transport stream (ISO/IEC 13818-1, 2.4.3.2)."""
    start = file.read(8 * 204)
    for length, lead in _TS_PACKETS:
        for shift in range(length):
            marks = start[shift + lead :: length]
            if len(marks) > 4 and set(marks) == {0x47}:
                rest = (size - shift) % length
                file.seek(size - rest + lead)
                return size - rest + length if rest and file.read(1) in (b"\x47", b"") else 0
    return 0


def _length_to_footer(file: BinaryIO, size: int) -> int:
    """Read in an MXF's header where its footer begins (SMPTE ST 377-1, 7.1); files still open do not say."""
    start = file.read(_MXF_RUN_IN + 256)
    place = start.find(_MXF_PARTITION)
    width = start[place + 16 : place + 17] if place >= 0 else b""
    value = place + 17 + (width[0] & 0x7F if width >= b"\x80" else 0)
    footer = int.from_bytes(start[value + 24 : value + 32], "big") if width else 0
    return place + footer + 17 if footer else 0


def _length_of_pages(file: BinaryIO, size: int) -> float:
    """Complete an Ogg's last page, and the packet that goes on behind it (RFC 3533, 6)."""
    begin = max(0, size - 2 * _OGG_PAGE)
    file.seek(begin)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0
    count = tail[page + 26 : page + 27]
    lengths = tail[page + 27 : page + 27 + count[0]] if count else b""
    if not count or len(lengths) < count[0] or lengths.endswith(b"\xff"):
        return math.inf
    return begin + page + 27 + len(lengths) + sum(lengths)


def _length_of_frames(file: BinaryIO, size: int) -> int:
    """Complete the last frame of a YUV4MPEG2 file, all of which have one length."""
    header, mark = file.readline(1024), file.readline(1024)
    fields = {field[:1]: field[1:].decode("ascii", "replace") for field in header.split()[1:]}
    width, height, layout = int(fields[b"W"]), int(fields[b"H"]), fields.get(b"C", "420")
    across, down = {"420": (2, 2), "411": (4, 1), "422": (2, 1)}.get(layout[:3], (1, 1))
    chroma = 0 if layout.startswith("mono") else 2 * -(-width // across) * -(-height // down)
    alpha = width * height if layout == "444alpha" else 0
    deep = 2 if re.search(r"(p|mono)(9|1\d)$", layout) else 1
    length = len(mark) + deep * (width * height + chroma + alpha)
    rest = (size - len(header)) % length
    file.seek(size - rest)
    return size - rest + length if rest and file.read(5) == b"FRAME"[:rest] else 0


def _length_in_properties(file: BinaryIO, size: int) -> int:
    """Read the length of an ASF (3.2 of its specification); broadcasts do not state it."""
    start = file.read(2**16)
    place = start.find(_ASF_PROPERTIES)
    is_stated = place >= 0 and not start[place + 88] & 1 if len(start) > place + 88 else False
    return int.from_bytes(start[place + 40 : place + 48], "little") if is_stated else 0


def _length_of_packs(file: BinaryIO, size: int) -> int:
    """Walk the last pack of an MPEG program stream (ISO/IEC 13818-1, 2.5.3; 11172-1, 2.4.3)."""
    place = _last(file, size, b"\0\0\1\xba")
    while place < size:
        file.seek(place)
        header = file.read(14).ljust(14, b"\0")
        if header[:3] != b"\0\0\1":
            return 0
        if header[3] == 0xBA:
            place += 14 + (header[13] & 7) if header[4] & 0xC0 == 0x40 else 12
        elif header[3] == 0xB9:  # the end
            return 0
        else:
            place += 6 + int.from_bytes(header[4:6], "big")
    return place


def _length_of_pictures(file: BinaryIO, size: int) -> float:
    """Look whether a sequence of JPEG pictures ends with the end of one (ITU-T T.81, B.2.1)."""
    return math.inf if _last(file, size, b"\xff\xd8\xff") > _last(file, size, b"\xff\xd9") else 0
