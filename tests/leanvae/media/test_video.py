"""Videos come out upright, in full-range RGB by their own tags, or are refused with the reason."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from leanvae.media.errors import MediaError
from leanvae.media.video import VideoReader


def probe(path):
    with VideoReader(str(path)) as reader:
        return reader.info


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared clips are not beside the checkout")

# (red weight, blue weight) of the luma, ITU-R BT.601-7, BT.709-6 and BT.2020-2.
LUMA_WEIGHTS = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}


def patches(height: int, width: int) -> list[np.ndarray]:
    """Random Y, U, V planes that are flat over 16x16 pixels and stay inside the RGB cube."""
    generator = np.random.default_rng(0)
    shape = (height // 16, width // 16)
    planes = [generator.integers(60, 190, shape), *generator.integers(110, 146, (2, *shape))]
    return [np.kron(plane, np.ones((16, 16), int)) for plane in planes]


def expected_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray, matrix: str, full: bool) -> np.ndarray:
    red, blue = LUMA_WEIGHTS[matrix]
    luma, cb, cr = (
        (y / 255, (u - 128) / 255, (v - 128) / 255)
        if full
        else (
            (y - 16) / 219,
            (u - 128) / 224,
            (v - 128) / 224,
        )
    )
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return 255 * np.stack([r, g, b], axis=-1)


def write_planes(path, planes, pix_fmt="yuv420p", matrix=None, color_range=None, transfer=None, num_frames=3):
    height, width = planes[0].shape
    bits = 10 if "10" in pix_fmt else 8
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        if matrix is not None:
            context.colorspace, context.color_primaries = matrix, 1
        if color_range is not None:
            context.color_range = color_range
        if transfer is not None:
            context.color_trc = transfer
        for index in range(num_frames):
            frame = av.VideoFrame(width, height, pix_fmt)
            for plane, values in zip(frame.planes, (planes[0], planes[1][::2, ::2], planes[2][::2, ::2]), strict=True):
                dtype = np.uint8 if bits == 8 else np.uint16
                data = np.zeros((plane.height, plane.line_size // dtype().itemsize), dtype)
                data[:, : values.shape[1]] = values << (bits - 8)
                plane.update(data.tobytes())
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_video(path, images, pts=None, rotation=None, codec="libx264", options=None):
    height, width = images[0].shape[:2]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=30, options={"crf": "8"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation:
            stream.set_display_rotation(**rotation)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = pts[index] if pts else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def corners(height=48, width=64):
    """A red, a green, a blue and a white corner."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (255, 0, 0)
    image[: height // 2, width // 2 :] = (0, 255, 0)
    image[height // 2 :, : width // 2] = (0, 0, 255)
    image[height // 2 :, width // 2 :] = 255
    return image


def corner_colours(image):
    height, width = image.shape[:2]
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    points = [(height // 4, width // 4), (height // 4, 3 * width // 4)]
    points += [(3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    return [names[tuple((image[point] > 128).astype(int).tolist())] for point in points]


@pytest.mark.parametrize(
    ("tags", "matrix", "full"),
    [
        ({"matrix": 1}, "709", False),
        ({"matrix": 6}, "601", False),
        ({"matrix": 5}, "601", False),
        ({"matrix": 9}, "2020", False),
        ({}, "601", False),
        ({"matrix": 1, "color_range": 2}, "709", True),
        ({"pix_fmt": "yuvj420p"}, "601", True),
        ({"matrix": 1, "pix_fmt": "yuv420p10le"}, "709", False),
        ({"matrix": 6, "pix_fmt": "yuv420p10le"}, "601", False),
    ],
)
def test_frames_follow_the_streams_own_matrix_and_range(tmp_path, tags, matrix, full):
    planes = patches(96, 128)
    write_planes(tmp_path / "clip.mp4", planes, **tags)
    image = next(iter_frames(tmp_path / "clip.mp4")).image
    error = np.abs(image - expected_rgb(*planes, matrix, full))[8::16, 8::16]
    assert error.max() <= 1.5
    assert error.mean() < 0.4


@pytest.mark.parametrize(("height", "matrix"), [(704, "601"), (720, "709")])
def test_untagged_frames_are_709_from_720_lines(tmp_path, height, matrix):
    planes = patches(height, 64)
    write_planes(tmp_path / "clip.mp4", planes, num_frames=1)
    image = next(iter_frames(tmp_path / "clip.mp4")).image
    assert np.abs(image - expected_rgb(*planes, matrix, False))[8::16, 8::16].max() <= 1.5


@pytest.mark.parametrize(
    ("rotation", "clockwise", "seen"),
    [
        ({}, 0, ["red", "green", "blue", "white"]),
        ({"degrees": -90}, 90, ["blue", "red", "white", "green"]),
        ({"degrees": 180}, 180, ["white", "blue", "green", "red"]),
        ({"degrees": 90}, 270, ["green", "white", "red", "blue"]),
    ],
)
def test_frames_are_turned_upright(tmp_path, rotation, clockwise, seen):
    write_video(tmp_path / "clip.mp4", [corners()] * 2, rotation=rotation)
    info = probe(tmp_path / "clip.mp4")
    image = next(iter_frames(tmp_path / "clip.mp4")).image
    assert image.shape == (info.height, info.width, 3)
    assert image.flags.c_contiguous
    assert info.rotation == clockwise
    assert not info.mirrored
    assert corner_colours(image) == seen


def test_frames_mirrored_by_their_matrix_are_mirrored_back(tmp_path):
    write_video(tmp_path / "clip.mp4", [corners()] * 2, rotation={"degrees": 0, "hflip": True})
    assert probe(tmp_path / "clip.mp4").mirrored
    seen = corner_colours(next(iter_frames(tmp_path / "clip.mp4")).image)
    assert seen == ["green", "red", "white", "blue"]


def numbered(count, height=48, width=64):
    return [np.full((height, width, 3), 5 * index + 20, np.uint8) for index in range(count)]


def test_frames_keeps_variable_timestamps(tmp_path):
    pts = [0, 1, 2, 5, 9, 10]
    write_video(tmp_path / "vfr.mp4", numbered(6), pts=pts)
    info = probe(tmp_path / "vfr.mp4")
    frames = list(iter_frames(tmp_path / "vfr.mp4"))
    assert np.allclose([frame.time for frame in frames], np.array(pts) / 30)
    assert np.allclose([float(frame.pts * info.time_base) for frame in frames], np.array(pts) / 30)
    assert info.num_frames == 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_starts_at_the_asked_time(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    write_video(path, numbered(40))
    whole = list(iter_frames(path))
    part = list(iter_frames(path, start=whole[25].time))
    assert [frame.pts for frame in part] == [frame.pts for frame in whole[25:]]
    assert np.array_equal(part[0].image, whole[25].image)


def test_broken_videos_are_refused_with_their_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 300)
    cv2.imwrite(str(tmp_path / "image.jpg"), corners())
    (tmp_path / "image.jpg").rename(tmp_path / "image.mp4")
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    reasons = {
        "empty.mp4": "empty file",
        "text.mp4": "cannot be decoded",
        "image.mp4": "a still image, not a video",
        "audio.mp4": "no video stream",
        "missing.mp4": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(MediaError, match=f"{name}: {reason}") as caught:
            probe(tmp_path / name)
        assert caught.value.path.endswith(name)
        assert caught.value.reason.startswith(reason)


def test_names_with_colons_quotes_and_percents_are_files(tmp_path):
    path = tmp_path / "a: b's %03d http.mp4"
    write_video(path, numbered(3))
    assert len(list(iter_frames(path))) == 3


@needs_shared
def test_shared_videos_open_at_the_size_that_the_manifest_displays():
    import csv

    for row in csv.DictReader((SHARED / "MANIFEST.csv").read_text().splitlines()):
        if row["kind"] == "video":
            with VideoReader(str(SHARED / row["file"]), square=False) as reader:
                info = reader.info
            size = (int(row["width"]), int(row["height"]))
            assert (info.width, info.height) in (size, size[::-1]), row["file"]
            assert (info.rotation in (90, 270)) == ((info.width, info.height) != size), row["file"]
