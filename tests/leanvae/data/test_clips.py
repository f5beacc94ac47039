"""Clips are the frames that the file shows, whichever decoder reads them; unusable files say why."""

from pathlib import Path

import av
import numpy as np
import pytest

from leanvae.data import decoding
from leanvae.data.buckets import Shape
from leanvae.data.clips import read_clip
from leanvae.data.config import ClipDataConfig
from leanvae.data.sources import Clip
from leanvae.media.errors import MediaError
from leanvae.media.video import iter_frames, probe

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared clips are not beside the checkout")


def scene(count=40, height=64, width=96):
    """Smooth frames, each with its number in its brightness and a bright left edge."""
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    images = [(ramp + 4 * index + np.array([20, 10, 0])).clip(0, 255).astype(np.uint8) for index in range(count)]
    for image in images:
        image[:, : width // 8] = 255
    return images


def write_video(path, images, *, codec="libx264", pix_fmt="yuv420p", pts=None, matrix=1, rotation=None, bframes=2):
    height, width = images[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        if codec in ("libx264", "libx265"):
            stream.options = {"crf": "5", "g": "12", "bf": str(bframes), "x265-params": "log-level=none"}
        elif codec in ("libvpx", "libvpx-vp9"):
            stream.options = {"b:v": "2M", "deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "16"}
        if matrix is not None:
            context.colorspace = matrix
        if rotation is not None:
            stream.set_display_rotation(**rotation)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix or 5, src_color_range=2, dst_color_range=1)
            frame.pts = pts[index] if pts else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Clip(str(path))


BUCKET = Shape(5, 64, 96)


def config(**changes):
    return ClipDataConfig(**{"num_frames": 5, "flip": False, **changes})


def windows(clip, count, span=5, places=3):
    """What every way of decoding gives for windows inside, at the start and at the end."""
    table = decoding.read_frame_table(clip)
    assert len(table.times) == count
    for start in (count // 3, 0, count - span)[:places]:
        found = {}
        for name, images in decoding.decode_window(clip, table, lambda _, s=start: range(s, s + span)):
            try:
                found[name] = list(images)
            except decoding.DecoderDisagrees:
                continue
        yield start, found


VARIANTS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264_709_untagged.mp4": {"matrix": None},
    "h264_601.mp4": {"matrix": 6},
    "h264_444.mp4": {"pix_fmt": "yuv444p"},
    "h264_10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264_vfr.mp4": {"pts": np.cumsum([0] + [1, 3, 2, 1, 1] * 8)[:40].tolist()},
    "h264.flv": {},
    "mpeg2.mpg": {"codec": "mpeg2video", "matrix": None},
    "hevc.mp4": {"codec": "libx265"},
    "mpeg4.avi": {"codec": "mpeg4", "matrix": None},
    "h264_no_timestamps.avi": {},
    "vp8.webm": {"codec": "libvpx", "matrix": None},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "rotated_90.mp4": {"rotation": {"degrees": -90}},
    "rotated_180.mp4": {"rotation": {"degrees": 180}},
    "rotated_270.mp4": {"rotation": {"degrees": 90}},
    "mirrored.mp4": {"rotation": {"degrees": 0, "hflip": True}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_decoder_gives_the_frames_of_a_full_decode(tmp_path, name):
    clip = write_video(tmp_path / name, scene(), **VARIANTS[name])
    whole = list(iter_frames(clip.path))
    assert len(whole) == 40
    for start, found in windows(clip, 40):
        for backend, frames in found.items():
            for (image, time), frame in zip(frames, whole[start : start + 5], strict=True):
                assert image.shape == frame.image.shape, backend
                if name != "h264_no_timestamps.avi":
                    assert time == pytest.approx(frame.time, abs=2e-3), backend
                error = np.abs(image.astype(int) - frame.image).mean()
                # decord's colours are rounded otherwise; a wrong frame would differ by 4, a wrong turn by more.
                assert error < (2.2 if backend == "decord" else 1e-9), backend
        assert "pyav counting" in found
        assert "pyav" in found or name == "h264_no_timestamps.avi"


@pytest.mark.parametrize(
    ("name", "changes", "agrees"),
    [
        ("plain.mp4", {}, True),
        ("rotated.mp4", {"rotation": {"degrees": -90}}, True),
        ("mirrored.mp4", {"rotation": {"degrees": 0, "hflip": True}}, False),
        ("10bit.mp4", {"pix_fmt": "yuv420p10le"}, False),
        ("vp8.webm", {"codec": "libvpx"}, False),
        ("stream.ts", {}, False),
        ("untagged.mp4", {"matrix": None}, True),
    ],
)
def test_decord_is_taken_where_it_is_known_to_agree(tmp_path, name, changes, agrees):
    pytest.importorskip("decord")
    clip = write_video(tmp_path / name, scene(8), **changes)
    assert decoding.decord_agrees(clip, probe(clip.path)) is agrees
    assert read_clip(clip, config(), BUCKET, None).backend == ("decord" if agrees else "pyav")
    part = Clip(clip.path, start=0.05)
    assert not decoding.decord_agrees(part, probe(clip.path))


def test_decord_is_not_taken_for_large_untagged_pictures(tmp_path):
    images = [np.full((720, 32, 3), (200, 40, 40), np.uint8)] * 6
    for name, matrix, agrees in [("tagged.mp4", 1, True), ("untagged.mp4", None, False)]:
        clip = write_video(tmp_path / name, images, matrix=matrix)
        assert decoding.decord_agrees(clip, probe(clip.path)) is agrees


def test_pyav_takes_over_where_decord_is_missing_or_fails(tmp_path, monkeypatch):
    clip = write_video(tmp_path / "clip.mp4", scene(8))
    with_decord = read_clip(clip, config(), BUCKET, None)
    monkeypatch.setattr(decoding, "_decord", lambda: None)
    without = read_clip(clip, config(), BUCKET, None)
    assert without.backend == "pyav"
    assert np.abs(without.frames.astype(int) - with_decord.frames).mean() < 2.2

    class Broken:
        @staticmethod
        def cpu(_):
            raise RuntimeError("broken")

    monkeypatch.setattr(decoding, "_decord", lambda: Broken)
    assert read_clip(clip, config(), BUCKET, None).backend == "pyav"


def test_narrow_pictures_whose_padding_decord_miscounts_go_to_pyav(tmp_path):
    clip = write_video(tmp_path / "tiny.mp4", scene(8, 16, 16))
    sample = read_clip(clip, config(), Shape(5, 16, 16), None)
    assert sample.backend == "pyav"
    assert sample.frames.shape == (5, 16, 16, 3)


def frame_numbers(sample, whole):
    return [int(np.argmin([np.abs(f.astype(int) - image.image).mean() for image in whole])) for f in sample.frames]


def test_read_clip_takes_the_central_window_without_a_generator(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(20))
    whole = list(iter_frames(clip.path))
    sample = read_clip(clip, config(), BUCKET, None)
    assert frame_numbers(sample, whole) == [8, 9, 10, 11, 12]
    assert sample.times == pytest.approx([frame.time for frame in whole[8:13]], abs=1e-6)
    assert frame_numbers(read_clip(clip, config(stride=3), BUCKET, None), whole) == [4, 7, 10, 13, 16]


def test_read_clip_draws_all_windows_and_flips_from_the_generator(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(8))
    whole = list(iter_frames(clip.path))
    starts, flips = set(), set()
    for seed in range(24):
        sample = read_clip(clip, config(flip=True), BUCKET, np.random.default_rng(seed))
        again = read_clip(clip, config(flip=True), BUCKET, np.random.default_rng(seed))
        assert np.array_equal(sample.frames, again.frames)
        flipped = sample.frames[0, 32, -2].min() > 200
        frames = sample.frames[:, :, ::-1] if flipped else sample.frames
        starts.add(int(np.argmin([np.abs(frames[0].astype(int) - f.image).mean() for f in whole])))
        flips.add(bool(flipped))
    assert starts == {0, 1, 2, 3}
    assert flips == {False, True}


@pytest.mark.parametrize("resolution", [(64, 96), (32, 32), (24, 96), (130, 130), (7, 5)])
def test_read_clip_covers_any_resolution_without_borders(tmp_path, resolution):
    clip = write_video(tmp_path / "clip.mp4", [np.full((64, 96, 3), 180, np.uint8)] * 6)
    for generator in (None, np.random.default_rng(0)):
        sample = read_clip(clip, config(), Shape(5, *resolution), generator)
        assert sample.frames.shape == (5, *resolution, 3)
        assert sample.frames.dtype == np.uint8
        assert np.abs(sample.frames.astype(int) - 180).max() <= 4


def test_read_clip_keeps_to_a_csvs_start_and_end(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(40))
    whole = list(iter_frames(clip.path))
    part = Clip(clip.path, start=10 / 30, end=15 / 30)
    assert frame_numbers(read_clip(part, config(), BUCKET, np.random.default_rng(0)), whole) == [10, 11, 12, 13, 14]
    with pytest.raises(MediaError, match="too short: 4 frames, 5 needed"):
        read_clip(Clip(clip.path, start=11 / 30, end=15 / 30), config(), BUCKET, None)
    tail = read_clip(Clip(clip.path, start=35 / 30), config(), BUCKET, None)
    assert frame_numbers(tail, whole) == [35, 36, 37, 38, 39]
    with pytest.raises(MediaError, match="too short: 0 frames"):
        read_clip(Clip(clip.path, start=100.0), config(), BUCKET, None)


def test_read_clip_refuses_what_is_too_short_or_ends_early(tmp_path):
    clip = write_video(tmp_path / "short.mp4", scene(4))
    with pytest.raises(MediaError, match=r"short\.mp4: too short: 4 frames, 5 needed"):
        read_clip(clip, config(), BUCKET, None)
    with pytest.raises(MediaError, match=r"too short: 4 frames, 9 needed \(5 at stride 2\)"):
        read_clip(clip, config(stride=2), BUCKET, None)
    noise = np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), np.uint8)
    write_video(tmp_path / "whole.webm", list(noise), codec="libvpx")
    data = (tmp_path / "whole.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 3])
    with pytest.raises(MediaError, match=r"truncated: the data end at 0\.\d s of 3\.0 s"):
        read_clip(Clip(str(tmp_path / "cut.webm")), config(), BUCKET, None)


REASONS = {
    "audio_only.mp4": "no video stream",
    "bad_crc.png": "a still image",
    "corrupt_header.mp4": "cannot be decoded: Invalid data",
    "corrupt_middle.mp4": "cannot be decoded: Invalid data",
    "half.jpg": "a still image",
    "half.png": "a still image",
    "jpeg_named.mp4": "a still image",
    "png_named.jpg": "a still image",
    "single_frame.mp4": "too short: 1 frames, 5 needed",
    "text_renamed.mp4": "cannot be decoded: Invalid data",
    "text_renamed.png": "a still image",
    "truncated.webm": "truncated: the data end at 1.5 s of 5.1 s",
    "truncated_faststart.mp4": "truncated: the file ends inside a frame",
    "truncated_no_moov.mp4": "cannot be decoded: Invalid data",
    "zero_byte.jpg": "empty file",
    "zero_byte.mp4": "empty file",
}


@needs_shared
def test_shared_bad_files_are_refused_with_their_reasons():
    for path in sorted((SHARED / "bad").iterdir()):
        if path.name == "tiny_16x16.mp4":
            assert read_clip(Clip(str(path)), config(), BUCKET, None).frames.shape == (5, 64, 96, 3)
        else:
            with pytest.raises(MediaError) as caught:
                read_clip(Clip(str(path)), config(), BUCKET, None)
            assert caught.value.reason.startswith(REASONS[path.name]), path.name


@needs_shared
def test_shared_clips_of_awkward_kinds_are_read_exactly():
    names = {
        "exo_bear_odd_161x121.webm": (30, {"pyav", "pyav counting"}),
        "exo_roadtrip_vp9_10bit.webm": (72, {"pyav", "pyav counting"}),
        "mdn_stream_of_water.webm": (90, {"pyav", "pyav counting"}),
        "mdn_stream_of_water_theora.ogv": (20, {"pyav", "pyav counting"}),
        "exo_desk_h263.3gp": (71, {"decord", "pyav", "pyav counting"}),
        "nasa_13013.mp4": (65, {"decord", "pyav", "pyav counting"}),
        "streamio_toys_rot90_14f.mov": (14, {"decord", "pyav", "pyav counting"}),
    }
    for name, (count, backends) in names.items():
        clip = Clip(str(SHARED / "dev" / "videos" / name))
        whole = list(iter_frames(clip.path))
        assert len(whole) == count
        for start, found in windows(clip, count, places=1):
            assert set(found) == backends, name
            for backend, frames in found.items():
                for (image, time), frame in zip(frames, whole[start : start + 5], strict=True):
                    assert time == pytest.approx(frame.time, abs=2e-3)
                    assert np.abs(image.astype(int) - frame.image).mean() < (2 if backend == "decord" else 1e-9)
