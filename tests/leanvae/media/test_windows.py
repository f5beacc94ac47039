"""Windows and parts hold the frames of a full decode, whatever the container."""

import struct
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from leanvae.media.errors import MediaError
from leanvae.media.folder import PictureReader, open_clip
from leanvae.media.image import read_image
from leanvae.media.item import Item
from leanvae.media.video import VideoReader
from leanvae.media.writer import write_png

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared clips are not beside the checkout")


def scene(count=40, height=64, width=96):
    """Smooth frames, each with its number in its brightness and a bright left edge."""
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    images = [(ramp + 4 * index + np.array([20, 10, 0])).clip(0, 255).astype(np.uint8) for index in range(count)]
    for image in images:
        image[:, : width // 8] = 255
    return images


def write_video(
    path,
    images,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    pts=None,
    matrix=1,
    rotation=None,
    aspect=None,
    options=None,
    layout="rgb24",
    container_options=None,
):
    """Write images, all of which are shown."""
    height, width = images[0].shape[:2]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        if codec in ("libx264", "libx265"):
            stream.options = {"crf": "5", "g": "12", "bf": "2", "x265-params": "log-level=none", **(options or {})}
        elif codec in ("libvpx", "libvpx-vp9"):
            stream.options = {"b:v": "2M", "deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "16"}
        if matrix is not None:
            context.colorspace = matrix
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=layout)
            if layout == "rgb24":
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix or 5, src_color_range=2, dst_color_range=1)
            frame.pts = pts[index] if pts else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


VARIANTS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264_709_untagged.mp4": {"matrix": None},
    "h264_601.mp4": {"matrix": 6},
    "h264_444.mp4": {"pix_fmt": "yuv444p"},
    "h264_10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264_vfr.mp4": {"pts": np.cumsum([0] + [1, 3, 2, 1, 1] * 8)[:40].tolist()},
    "h264_fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264.flv": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "matrix": None},
    "hevc.mp4": {"codec": "libx265"},
    "mpeg4.avi": {"codec": "mpeg4", "matrix": None},
    "h264_no_timestamps.avi": {},
    "vp8.webm": {"codec": "libvpx", "matrix": None},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "rotated_90.mp4": {"rotation": {"degrees": -90}},
    "mirrored.mp4": {"rotation": {"degrees": 0, "hflip": True}},
    "anamorphic.mkv": {"aspect": Fraction(3, 2)},
    "interlaced.mkv": {"options": {"x264-params": "tff=1", "flags": "+ildct+ilme"}},
}


def read_whole(path, **options):
    with VideoReader(path, **options) as reader:
        return list(reader.frames())


def assert_same(found, expected):
    assert [frame.time for frame in found] == [frame.time for frame in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.image, theirs.image)


def nearest(whole, points):
    times = np.array([frame.time for frame in whole])
    after = np.searchsorted(times, points).clip(1, len(times) - 1)
    return [whole[index] for index in after - (points - times[after - 1] <= times[after] - points)]


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_and_parts_are_those_of_a_full_decode(tmp_path, name):
    path = write_video(tmp_path / name, scene(), **VARIANTS[name])
    whole = read_whole(path)
    assert len(whole) == 40
    times = [frame.time for frame in whole]
    with VideoReader(path) as reader:
        counted = reader.measure()
        assert counted.count == reader.count() == 40
        if name != "h264_no_timestamps.avi":
            assert (counted.first, counted.last) == pytest.approx((times[0], times[-1]), abs=2e-3)
        for start, stride in ((13, 1), (0, 2), (35, 1), (7, 3), (1, 1)):
            begin = reader.before(reader.expect() or counted, start)
            assert_same(reader.window(begin, 5, stride=stride), whole[start : start + 4 * stride + 1 : stride])
        assert len(reader.window(reader.before(reader.expect() or counted, 37), 5)) == 3
        for begin, fps in ((times[3] + 0.01, 7.0), (times[20] + 0.02, 30.0), (0.0, 90.0)):
            assert_same(reader.window(begin, 6, fps=fps), nearest(whole, begin + np.arange(6) / fps))
        assert_same(list(reader.frames(times[11], times[19])), whole[11:19])
        assert reader.count(times[11], times[19]) == 8
        part = reader.expect((times[11], times[19]))
        assert part is None or part.count == 8
        assert_same(list(reader.frames()), whole)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "mpeg4.avi"])
def test_files_in_memory_are_read_as_those_on_disk(tmp_path, name):
    path = write_video(tmp_path / name, scene(), **VARIANTS[name])
    whole = read_whole(path)
    with open(path, "rb") as file, VideoReader(file, name) as reader:
        assert_same(list(reader.frames()), whole)
        assert_same(reader.window(reader.before(reader.expect(), 20), 5), whole[20:25])
        assert reader.count() == 40


class CountedFile:
    """A file that counts the bytes that are read of it."""

    def __init__(self, file):
        self.file, self.num_bytes = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size):
        data = self.file.read(size)
        self.num_bytes += len(data)
        return data


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_window_of_a_long_film_reads_no_more_than_it_needs(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (8, 64, 96, 3), np.uint8)
    path = write_video(tmp_path / f"film.{suffix}", [noise[index % 8] for index in range(1200)])
    size = Path(path).stat().st_size
    with open(path, "rb") as opened:
        file = CountedFile(opened)
        with VideoReader(file, "film") as reader:
            timeline = reader.expect()
            assert timeline.count == 1200
            frames = reader.window(reader.before(timeline, 800), 17)
    assert [round(30 * frame.time) for frame in frames] == list(range(800, 817))
    assert file.num_bytes < 0.1 * size


def test_alpha_is_laid_over_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[...] = (200, 40, 40, 0)
    rgba[:, 24:44, 3] = 51
    rgba[:, 44:, 3] = 255
    images = [np.ascontiguousarray(rgba)] * 3
    path = write_video(tmp_path / "alpha.mkv", images, codec="ffv1", pix_fmt="bgra", layout="rgba", matrix=None)
    with VideoReader(path) as reader:
        assert reader.info.has_alpha
        assert reader.info.notes == ("transparent parts are laid over white",)
        image = next(reader.frames()).image
    assert image[:, :20].min() == 255
    assert np.abs(image[:, 26:42].astype(int) - (244, 212, 212)).max() <= 1
    assert np.abs(image[:, 46:].astype(int) - (200, 40, 40)).max() <= 1


@pytest.mark.parametrize(
    ("size", "aspect", "rotation", "shown"),
    [
        ((180, 144), Fraction(64, 45), 0, (256, 144)),
        ((180, 144), Fraction(45, 64), 0, (180, 205)),
        ((180, 144), Fraction(64, 45), 90, (144, 256)),
        ((180, 144), Fraction(1), 0, (180, 144)),
        ((854, 480), Fraction(853, 854), 0, (854, 480)),  # a rounding, not a shape
    ],
)
def test_pixels_become_square_by_enlarging_the_short_side(tmp_path, size, aspect, rotation, shown):
    images = scene(2, size[1], size[0])
    path = write_video(tmp_path / "a.mkv", images, aspect=aspect, rotation={"degrees": rotation})
    if rotation:  # Matroska keeps none
        path = write_video(tmp_path / "a.mp4", images, aspect=aspect, rotation={"degrees": rotation})
    with VideoReader(path) as reader:
        info, frame = reader.info, next(reader.frames())
    assert (info.width, info.height) == (frame.image.shape[1], frame.image.shape[0]) == shown
    assert info.pixel_aspect == (1 / aspect if rotation else aspect)
    assert bool(info.notes) == (shown not in (size, size[::-1]))
    with VideoReader(path, square=False) as reader:
        assert next(reader.frames()).image.shape[:2] in (size, size[::-1])
        assert not reader.info.notes


def put_into(boxes, path, box):
    """Put a box at the end of the box that a path of names leads to; returns the place."""
    place = 0
    while boxes[place + 4 : place + 8] != path[0]:
        place += int.from_bytes(boxes[place : place + 4], "big")
    length = int.from_bytes(boxes[place : place + 4], "big")
    begin = place + (16 if path[0] == b"stsd" else 8)
    inner = boxes[begin : place + length]
    inner = put_into(inner, path[1:], box) if path[1:] else inner + box
    head = (length + len(box)).to_bytes(4, "big") + boxes[place + 4 : begin]
    return boxes[:place] + head + inner + boxes[place + length :]


@pytest.mark.parametrize(("suffix", "rotation"), [("mp4", 0), ("mp4", 90), ("mov", 0)])
def test_frames_are_cropped_to_their_clean_aperture(tmp_path, suffix, rotation):
    images = scene(4, 48, 64)
    path = write_video(tmp_path / f"a.{suffix}", images, rotation={"degrees": -rotation})
    whole = read_whole(path)
    box = struct.pack(">I4s8i", 40, b"clap", 40, 1, 41, 2, 8, 2, -6, 1)
    names = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
    data = put_into(Path(path).read_bytes(), names, box)
    with VideoReader(BytesIO(data), "a") as reader:
        frames, info = list(reader.frames()), reader.info
        assert_same(reader.window(0.05, 2), frames[2:])
    for frame, full in zip(frames, whole, strict=True):
        # 40 pixels across and 20.5 down, whose centre lies 4 to the right and 6 above that of the picture.
        upright = np.rot90(full.image, rotation // 90)
        assert np.array_equal(frame.image, np.rot90(upright[8:28, 16:56], -rotation // 90))
    assert (info.width, info.height) == ((20, 40) if rotation else (40, 20))
    assert info.notes == (f"cropped to the clean aperture: {info.width}x{info.height}",)


def test_interlaced_videos_are_deinterlaced(tmp_path):
    """A bar that moves between the fields of a frame shows no comb."""
    images = []
    for index in range(12):
        image = np.full((64, 96, 3), 40, np.uint8)
        for field in (0, 1):
            left = 10 + 6 * index + 3 * field
            image[field::2, left : left + 20] = 220
        images.append(image)
    path = write_video(tmp_path / "a.mkv", images, **VARIANTS["interlaced.mkv"])
    with VideoReader(path) as reader:
        assert reader.info.interlaced
        assert reader.info.notes == ("deinterlaced (bwdif)",)
        frames = list(reader.frames())
    assert [round(30 * frame.time) for frame in frames] == list(range(12))
    for image, frame in zip(images, frames, strict=True):
        comb = np.abs(np.diff(image.astype(int), axis=0)).mean()
        assert np.abs(np.diff(frame.image.astype(int), axis=0)).mean() < 0.35 * comb


def write_change(path, sizes=((64, 64), (96, 64))):
    """Ten frames of each size in one Matroska file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for part, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 20), Fraction(20)
            encoder.options = {"bf": "0", "g": "10"}
            packets = []
            for index in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 9 * index, np.uint8), format="rgb24")
                frame.pts, frame.time_base = 10 * part + index, Fraction(1, 20)
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode(None):
                packet.stream = stream
                container.mux(packet)
    return str(path)


def test_size_changes_are_refused_with_the_frame_number(tmp_path):
    path = write_change(tmp_path / "change.mkv")
    message = "the size changes from 64x64 to 96x64 at frame 10"
    with VideoReader(path) as reader, pytest.raises(MediaError, match=message):
        list(reader.frames())
    for start in (0.2, 0.5, 0.7):  # across the change, at it, and behind it
        with VideoReader(path) as reader, pytest.raises(MediaError, match=r"from 64x64 to 96x64 at frame 1[0-4]"):
            reader.window(start, 9)
    with VideoReader(path) as reader:
        assert len(reader.window(0.0, 9)) == 9


def test_a_last_frame_that_stands_long_is_no_damage(tmp_path):
    """As screen recorders write."""
    path = tmp_path / "screen.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        packets = []
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * index, np.uint8), format="rgb24")
            frame.pts = index
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration = int(60 / packets[-1].time_base)
        for packet in packets:
            container.mux(packet)
    with VideoReader(str(path)) as reader:
        assert reader.info.duration == pytest.approx(64)
        assert (reader.expect().count, reader.expect().last) == (5, 4.0)
        assert [frame.time for frame in reader.frames()] == [0, 1, 2, 3, 4]


def test_open_gop_and_long_distances_between_key_frames_are_decoded_exactly(tmp_path):
    for options in ({"g": "1000"}, {"x264-params": "open-gop=1:bframes=3", "g": "10"}):
        path = write_video(tmp_path / "a.mp4", scene(), options=options)
        whole = read_whole(path)
        with VideoReader(path) as reader:
            for start in range(0, 36, 5):
                assert_same(reader.window(reader.before(reader.expect(), start), 5), whole[start : start + 5])


def test_folders_of_images_are_read_as_videos_are(tmp_path):
    images = scene(12, 16, 24)
    names = tuple(f"{index:03}.png" for index in range(12))
    for name, image in zip(names, images, strict=True):
        write_png(tmp_path / name, image)
    with PictureReader(Item(str(tmp_path), "clip", frames=names, columns={"fps": 10})) as reader:
        assert (reader.info.width, reader.info.height, reader.info.num_frames, reader.info.fps) == (24, 16, 12, 10)
        found = list(reader.frames())
        assert np.array_equal([frame.image for frame in found], images)
        assert [frame.time for frame in found] == pytest.approx(np.arange(12) / 10)
        assert [frame.pts for frame in reader.frames(0.3, 0.6)] == [3, 4, 5]
        assert (reader.count(), reader.count(0.3, 0.6), reader.expect((0.3, 0.6)).count) == (12, 3, 3)
        assert [frame.pts for frame in reader.window(reader.before(reader.expect(), 2), 3, stride=2)] == [2, 4, 6]
        assert [frame.pts for frame in reader.window(0.5, 4, fps=20)] == [5, 5, 6, 6]
        assert [frame.pts for frame in reader.window(1.0, 5, part=(0.0, 1.1))] == [10]
    with pytest.raises(MediaError, match="fps: expected frames per second, above 0, got 'fast'"):
        PictureReader(Item("a", "clip", frames=names, columns={"fps": "fast"}))
    write_png(tmp_path / names[5], images[0][:8])
    with (
        PictureReader(Item(str(tmp_path), "clip", frames=names)) as reader,
        pytest.raises(MediaError, match="the size changes from 24x16 to 24x8 at frame 5"),
    ):
        list(reader.frames())


@pytest.mark.parametrize("layout", ["rgb24", "rgba"])
def test_clips_and_images_of_one_content_agree(tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, len(layout.removesuffix("24"))), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    pix_fmt = "bgra" if layout == "rgba" else "bgr0"
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        frame = av.VideoFrame.from_ndarray(pixels, format=layout).reformat(format=pix_fmt)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (frame,) = read_whole(str(tmp_path / "clip.mkv"))
    assert np.abs(frame.image.astype(int) - read_image(tmp_path / "image.png")).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_are_clips_with_their_own_times(tmp_path, suffix):
    images = [np.full((16, 24, 3), 20 * index, np.uint8) for index in range(8)]
    images[0][:8] = 255
    pictures = [Image.fromarray(image) for image in images]
    path, durations = tmp_path / f"a.{suffix}", [40, 40, 80, 40, 120, 40, 40, 400]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    times = np.cumsum([0, *durations[:-1]]) / 1000
    with open_clip(Item(str(path), "clip")) as reader:
        found = list(reader.frames())
        assert [frame.time for frame in found] == pytest.approx(times)
        assert np.array_equal([frame.image for frame in found], images)
        assert (reader.info.num_frames, reader.count(0.08, 0.33)) == (8, 4)
        assert_same(reader.window(0.07, 3, stride=2), found[2:7:2])
        assert_same(reader.window(0.0, 5, fps=12.5), [found[n] for n in (0, 2, 3, 4, 5)])
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MediaError), open_clip(Item(str(cut), "clip")) as reader:
        list(reader.frames())


@needs_shared
def test_shared_clips_of_awkward_kinds_are_read_exactly():
    names = {
        "exo_bear_odd_161x121.webm": 30,
        "exo_roadtrip_vp9_10bit.webm": 72,
        "mdn_stream_of_water.webm": 90,
        "mdn_stream_of_water_theora.ogv": 20,
        "exo_desk_h263.3gp": 71,
        "nasa_13013.mp4": 65,
        "streamio_toys_rot90_14f.mov": 14,
        "mp4parser_hand_vfr.mp4": 245,
    }
    for name, count in names.items():
        path = str(SHARED / "dev" / "videos" / name)
        whole = read_whole(path)
        with VideoReader(path) as reader:
            assert len(whole) == reader.count() == reader.expect().count == count
            for start in (count // 3, count - 5):
                found = reader.window(reader.before(reader.expect(), start), 5)
                assert_same(found, whole[start : start + 5])


@needs_shared
def test_shared_clips_are_refused_by_their_header_only_if_they_are_damaged():
    videos = sorted((SHARED / "dev" / "videos").iterdir())
    for path in videos:
        with VideoReader(str(path)) as reader:
            assert reader.info.width > 0
