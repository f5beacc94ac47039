"""Opening of video containers, and whether all their bytes are there by the lengths that their parts state."""

import os
import re
from typing import BinaryIO, cast

from leanvae.media.errors import MediaError
from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.stream import Disposition
    from av.video.stream import VideoStream

_DATA_BOXES = (b"mdat", b"moof", b"moov")  # ISO base media: what frames are lost with
_SEGMENT = b"\x18\x53\x80\x67"


def open_container(file: str | BinaryIO, name: str) -> InputContainer:
    """Open a path, or a seekable file from its beginning.

    Raises:
        MediaError: no such file; or a cut one, by the lengths that the container states.
        FFmpegError: it cannot be opened.
    """
    if not isinstance(file, str):
        file.seek(0)
        container = cast(InputContainer, av.open(file, metadata_errors="ignore"))
        place = file.tell()
        missing = missing_bytes(file, container.format.name)
        file.seek(place)
    else:
        if not os.path.isfile(file):
            raise MediaError(name, "a folder, not a file" if os.path.isdir(file) else "no such file")
        if os.path.getsize(file) == 0:
            raise MediaError(name, "empty file")
        # The prefix keeps names with colons from being taken for protocols; the whitelist keeps playlists from
        # fetching addresses.
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{file}", metadata_errors="ignore", options=options)
        with open(file, "rb") as opened:
            missing = missing_bytes(opened, container.format.name)
    if missing:
        container.close()
        raise MediaError(name, f"truncated: the last {missing:,} bytes are missing")
    return container


def best_video_stream(container: InputContainer, name: str) -> VideoStream:
    """Choose FFmpeg's best video stream, unless that is a cover picture.

    Raises:
        MediaError: of `name`: a still image, or without a video stream.
    """
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise MediaError(name, "a still image, not a video")
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if not moving:
        raise MediaError(name, "no video stream")
    return next((s for s in moving if best is not None and s.index == best.index), moving[0])


def missing_bytes(file: BinaryIO, container: str) -> int:
    """Count the bytes that a cut file lacks, as far as its container tells; 0 for other containers.

    Args:
        file: seekable; read from its beginning, and left anywhere.
        container: FFmpeg's name of the format.
    """
    measure = {
        "mov,mp4,m4a,3gp,3g2,mj2": _length_of_boxes,
        "matroska,webm": _length_of_segment,
        "avi": _length_of_riff,
        "gif": _length_of_gif,
        "mpegts": _length_of_packets,
        "mxf": _length_to_footer,
        "ogg": _length_of_pages,
        "yuv4mpegpipe": _length_of_y4m,
    }.get(container)
    if measure is None:
        return 0
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return max(0, measure(file, size) - size)


def _length_of_boxes(file: BinaryIO, size: int) -> int:
    """Walk the boxes of the top level (ISO/IEC 14496-12, 4.2)."""
    place = end = 0
    while place + 8 <= size:
        file.seek(place)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0 reaches to the end of the file; anything else is no box
            break
        place += length
        if header[4:8] in _DATA_BOXES:
            end = place
    return end


def _length_of_segment(file: BinaryIO, size: int) -> int:
    """Walk Matroska's elements (RFC 8794, 4); into those of unknown length, as in live recordings."""
    place = 0
    while place < size:
        file.seek(place)
        header = file.read(12)
        width = 9 - header[0].bit_length()  # of the ID; the length follows in the same notation
        if width > 4 or len(header) <= width or not header[width]:
            return 0
        start, width = width, 9 - header[width].bit_length()
        unknown = 2 ** (7 * width) - 1
        length = int.from_bytes(header[start : start + width], "big") & unknown
        place += start + width + (0 if length == unknown else length)
        if header[:4] == _SEGMENT and length != unknown:
            return place
    return place


def _length_of_riff(file: BinaryIO, size: int) -> int:
    """Read the length of an AVI's first RIFF chunk, which recordings that broke off leave at 0."""
    return int.from_bytes(file.read(8)[4:], "little")


def _length_of_gif(file: BinaryIO, size: int) -> int:
    """Walk the blocks of a GIF; one that breaks off lacks at least a byte."""
    flags = file.read(13)[10:11]
    if not flags:
        return size + 1
    _skip_palette(file, flags[0])
    while kind := file.read(1):
        if kind == b";":
            return 0
        if kind == b",":
            _skip_palette(file, (file.read(9)[8:9] or b"\0")[0])
        elif kind != b"!":  # what players pass over
            return 0
        file.read(1)  # code size, or label
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
        else:
            return size + 1
    return 0  # only the trailer is missing


def _skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 * 2 ** (1 + (flags & 7)), os.SEEK_CUR)


def _length_of_packets(file: BinaryIO, size: int) -> int:
    """Complete the last packet of a transport stream; Blu-ray's have a time of 4 bytes in front."""
    start = file.read(197)
    length, lead = (192, 4) if start[4:5] == start[196:197] == b"G" and start[188:189] != b"G" else (188, 0)
    rest = size % length
    file.seek(size - rest + lead)
    return size - rest + length if rest > lead and file.read(1) == b"G" else 0


def _length_to_footer(file: BinaryIO, size: int) -> int:
    """Read where an MXF's header says that the footer begins (SMPTE ST 377-1, 7.1); open files do not say."""
    header = file.read(64)
    is_partition = header[:4] == b"\x06\x0e\x2b\x34" and header[13:14] == b"\x02"
    start = 17 + (header[16] & 0x7F if header[16:17] >= b"\x80" else 0)
    return int.from_bytes(header[start + 24 : start + 32], "big") + 16 if is_partition else 0


def _length_of_pages(file: BinaryIO, size: int) -> int:
    """Read the length of an Ogg's last page."""
    place = max(0, size - 65_307 - 27)  # of the longest page
    file.seek(place)
    data = file.read()
    last = data.rfind(b"OggS")
    num_segments = data[last + 26 : last + 27]
    if last < 0 or not num_segments:
        return size + 1
    segments = data[last + 27 : last + 27 + num_segments[0]]
    return place + last + 27 + num_segments[0] + sum(segments)


def _length_of_y4m(file: BinaryIO, size: int) -> int:
    """Complete the last frame of a YUV4MPEG2 file, all of which have one length."""
    header = file.readline(1024)
    fields = {part[:1]: part[1:].decode("ascii", "replace") for part in header.split()[1:]}
    start, mark = len(header), file.readline(1024)
    width, height, layout = int(fields[b"W"]), int(fields[b"H"]), fields.get(b"C", "420jpeg")
    across, down = {"420": (2, 2), "411": (4, 1), "422": (2, 1)}.get(layout[:3], (1, 1))
    chroma = 0 if layout.startswith("mono") else 2 * -(-width // across) * -(-height // down)
    alpha = width * height if layout == "444alpha" else 0
    deep = 2 if re.search(r"(p|mono)(9|1\d)$", layout) else 1
    length = len(mark) + deep * (width * height + chroma + alpha)
    rest = (size - start) % length
    file.seek(size - rest)
    return size - rest + length if rest and file.read(5) == b"FRAME"[:rest] else 0
