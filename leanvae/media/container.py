"""Opening of video containers."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from leanvae.media.boxes import Aperture, clean_aperture
from leanvae.media.errors import MediaError
from leanvae.media.truncation import missing_bytes
from litevae.errors import extra

with extra("video"):
    import av
    from av.container import InputContainer
    from av.stream import Disposition
    from av.video.stream import VideoStream


def open_container(file: str | BinaryIO, name: str) -> InputContainer:
    """Open a path, or a seekable file from its beginning.

    Raises:
        MediaError: no such file; or a cut one, by the lengths that the container states.
        FFmpegError: it cannot be opened.
    """
    if not isinstance(file, str):
        file.seek(0)
        container = cast(InputContainer, av.open(file, metadata_errors="ignore"))
    else:
        if not os.path.isfile(file):
            raise MediaError(name, "a folder, not a file" if os.path.isdir(file) else "no such file")
        if os.path.getsize(file) == 0:
            raise MediaError(name, "empty file")
        # The prefix keeps names with colons from being taken for protocols; the whitelist keeps playlists from
        # fetching addresses.
        options = {"protocol_whitelist": "file"}
        container = av.open(f"file:{file}", metadata_errors="ignore", options=options)
    with _own_bytes(file) as data:
        missing = missing_bytes(data, container.format.name)
    if missing:
        container.close()
        what = f"the last {missing:,} bytes are" if missing < math.inf else "its end is"
        raise MediaError(name, f"truncated: {what} missing")
    return container


@contextmanager
def _own_bytes(file: str | BinaryIO) -> Iterator[BinaryIO]:
    """Give the bytes of a file that FFmpeg reads, and bring it back to where that was."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            yield opened
        return
    place = file.tell()
    yield file
    file.seek(place)


def read_aperture(file: str | BinaryIO, container: InputContainer, stream: VideoStream) -> Aperture | None:
    """Read the part of a stream's frames that is shown, as MP4 and QuickTime files state it; None means all."""
    if not container.format.name.startswith("mov,"):
        return None
    with _own_bytes(file) as data:
        return clean_aperture(data, stream.id)


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
