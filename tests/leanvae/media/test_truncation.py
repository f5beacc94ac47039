"""Intact files of all containers are read, and cut ones are refused unless all their frames are there."""

import av
import numpy as np
import pytest

from leanvae.media.errors import MediaError
from leanvae.media.video import VideoReader

COUNT = 30
CONTAINERS = {  # codec, FFmpeg's name of the format, options
    "mp4": ("libx264", None, {}),
    "fragmented.mp4": ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "faststart.mov": ("libx264", "mov", {"movflags": "faststart"}),
    "mov": ("libx264", None, {}),
    "mkv": ("libx264", None, {}),
    "live.mkv": ("libx264", "matroska", {"live": "1"}),
    "webm": ("libvpx-vp9", None, {}),
    "avi": ("mpeg4", None, {}),
    "ts": ("libx264", None, {}),
    "m2ts": ("libx264", "mpegts", {"mpegts_m2ts_mode": "1"}),
    "flv": ("flv1", None, {}),
    "ogv": ("libvpx", "ogg", {}),
    "gif": ("gif", None, {}),
    "y4m": ("rawvideo", "yuv4mpegpipe", {}),
    "mxf": ("mpeg2video", None, {}),
}


def make(path, name):
    codec, container_format, options = CONTAINERS[name]
    noise = np.random.default_rng(0).integers(0, 255, (COUNT, 64, 96, 3), np.uint8)
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb8" if codec == "gif" else "yuv420p"
        for index, image in enumerate(noise):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def count(path):
    with VideoReader(str(path)) as reader:
        return len(list(reader.frames()))


@pytest.mark.parametrize("name", CONTAINERS)
def test_intact_files_are_read_and_cut_ones_refused(tmp_path, name):
    path = tmp_path / f"clip.{name}"
    data = make(path, name)
    assert count(path) == COUNT
    for size in [int(share * len(data)) for share in np.linspace(0.03, 0.997, 14)] + [len(data) - n for n in (1, 30)]:
        path.write_bytes(data[:size])
        try:
            found = count(path)
        except MediaError:
            continue
        assert found == COUNT, f"{found} frames of a file cut to {size} of {len(data)} bytes"


def test_transport_streams_with_other_bytes_behind_are_intact(tmp_path):
    data = make(tmp_path / "clip.ts", "ts")
    (tmp_path / "clip.ts").write_bytes(data + b"rest")
    assert count(tmp_path / "clip.ts") == COUNT
