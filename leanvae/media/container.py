"""Opening of video containers, and whether all their bytes are there by the lengths that their parts state."""

import os
from typing import BinaryIO, cast

from leanvae.media.errors import MediaError
from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.stream import Disposition
    from av.video.stream import VideoStream

_DATA_BOXES = (b"mdat", b"moof", b"moov")  # ISO base media: what frames are lost with
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


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
    """Read the length of Matroska's only segment (RFC 8794, 4; RFC 9559, 5.1); live recordings do not state it."""
    place = 0
    for element in (_EBML, _SEGMENT):
        file.seek(place)
        header = file.read(12)
        if len(header) < 12 or int.from_bytes(header[:4], "big") != element or not header[4]:
            return 0
        width = 9 - header[4].bit_length()
        unknown = 2 ** (7 * width) - 1
        length = int.from_bytes(header[4 : 4 + width], "big") & unknown
        if length == unknown:
            return 0
        place += 4 + width + length
    return place


def _length_of_riff(file: BinaryIO, size: int) -> int:
    """Read the length of an AVI's first RIFF chunk, which recordings that broke off leave at 0."""
    return int.from_bytes(file.read(8)[4:], "little")
