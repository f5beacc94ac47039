"""Intact files of all containers are read, and cut ones are refused unless all their frames are there."""

import av
import numpy as np
import pytest

from leanvae.media.errors import MediaError
from leanvae.media.truncation import missing_bytes
from leanvae.media.video import VideoReader

COUNT = 20
CONTAINERS = {  # codec, FFmpeg's name of the format, options
    "mp4": ("libx264", None, {}),
    "fragmented.mp4": ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "faststart.mov": ("libx264", "mov", {"movflags": "faststart"}),
    "mov": ("prores_ks", None, {}),
    "mkv": ("libx264", None, {}),
    "live.mkv": ("libx264", "matroska", {"live": "1"}),
    "webm": ("libvpx-vp9", None, {}),
    "avi": ("mpeg4", None, {}),
    "ts": ("libx264", None, {}),
    "mpeg2.ts": ("mpeg2video", "mpegts", {}),
    "m2ts": ("libx264", "mpegts", {"mpegts_m2ts_mode": "1"}),
    "flv": ("flv1", None, {}),
    "h264.flv": ("libx264", "flv", {}),
    "ogv": ("libvpx", "ogg", {}),
    "gif": ("gif", None, {}),
    "apng": ("apng", "apng", {}),
    "y4m": ("rawvideo", "yuv4mpegpipe", {}),
    "mxf": ("mpeg2video", None, {}),
    "h264.mxf": ("libx264", "mxf", {}),
    "asf": ("wmv2", None, {}),
    "nut": ("ffv1", None, {}),
    "mpg": ("mpeg2video", None, {}),
    "vob": ("mpeg2video", None, {}),
    "mjpeg": ("mjpeg", "mjpeg", {}),
}
CHECKS_WHAT_FOLLOWS = {"nut"}  # FFmpeg itself refuses other bytes behind the end


def make(path, name):
    codec, container_format, options = CONTAINERS[name]
    pix_fmt = {"gif": "rgb8", "apng": "rgb24", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}.get(codec, "yuv420p")
    noise = np.random.default_rng(0).integers(0, 255, (COUNT, 48, 64, 3), np.uint8)
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
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
    if name not in CHECKS_WHAT_FOLLOWS:
        path.write_bytes(data + b"other bytes")
        assert count(path) == COUNT
    for size in [int(share * len(data)) for share in np.linspace(0.03, 0.997, 14)] + [len(data) - n for n in (1, 30)]:
        path.write_bytes(data[:size])
        try:
            found = count(path)
        except MediaError:
            continue
        assert found == COUNT, f"{found} frames of a file cut to {size} of {len(data)} bytes"


def test_frames_cut_between_their_blocks_are_missed_in_live_matroska(tmp_path):
    """Browsers leave the length of each cluster open, too."""
    data = make(tmp_path / "clip.mkv", "live.mkv")
    cluster = data.index(b"\x1f\x43\xb6\x75") + 4
    width = 9 - data[cluster].bit_length()
    unknown = (2 ** (7 * width + 1) - 1).to_bytes(width, "big")
    opened = data[:cluster] + unknown + data[cluster + width :]
    (tmp_path / "clip.mkv").write_bytes(opened)
    assert count(tmp_path / "clip.mkv") == COUNT
    (tmp_path / "clip.mkv").write_bytes(opened[:-100])
    with pytest.raises(MediaError, match="truncated"):
        count(tmp_path / "clip.mkv")


@pytest.mark.parametrize(("lead", "parity"), [(b"", 16), (b"torn packet", 0)])
def test_transport_streams_may_have_parity_or_begin_inside_a_packet(tmp_path, lead, parity):
    path = tmp_path / "clip.ts"
    data = make(path, "ts")
    path.write_bytes(lead + b"".join(data[at : at + 188] + bytes(parity) for at in range(0, len(data), 188)))
    assert count(path) == COUNT
    path.write_bytes(path.read_bytes()[: -40 - parity])
    with pytest.raises(MediaError, match="truncated"):
        count(path)


def test_lengths_that_are_declared_open_are_not_read(tmp_path):
    path = tmp_path / "clip.asf"
    data = bytearray(make(path, "asf"))
    properties = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    data[properties + 40 : properties + 48] = (2**30).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(MediaError, match="truncated"):
        count(path)
    data[properties + 88] |= 1  # a broadcast
    path.write_bytes(data)
    assert count(path) == COUNT


def test_a_run_in_before_mxf_does_not_count(tmp_path):
    path = tmp_path / "clip.mxf"
    data = make(path, "mxf")
    path.write_bytes(b"\0" * 1000 + data)
    with path.open("rb") as file:
        assert missing_bytes(file, "mxf") == 0
    path.write_bytes(b"\0" * 1000 + data[: len(data) // 2])
    with path.open("rb") as file:
        assert missing_bytes(file, "mxf") > 0
