"""Opening of video containers."""

import math
import os
from typing import BinaryIO, cast

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
        what = f"the last {missing:,} bytes are" if missing < math.inf else "its end is"
        raise MediaError(name, f"truncated: {what} missing")
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
