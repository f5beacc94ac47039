"""Samples are windows of the frames that files show, cut to cover the resolution; unusable files say why."""

import tarfile
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, ImageDataConfig
from leanvae.data.samples import Cut, cut_picture, read_sample
from leanvae.media import decord
from leanvae.media.errors import MediaError
from leanvae.media.image import read_image
from leanvae.media.item import Item
from leanvae.media.sources import list_items
from leanvae.media.timeline import Timeline
from leanvae.media.video import VideoReader


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared clips are not beside the checkout")


def read(item, config, bucket, generator):
    """A sample by the seed of a generator, or a central one."""
    (sample,) = read_sample(item, config, bucket, generator)
    return sample


def read_picture(item, resolution, flip, generator):
    return read(item, ImageDataConfig(flip=flip), Shape(1, *resolution), generator)


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
    return Item(str(path), "clip")


BUCKET = Shape(5, 64, 96)


def config(**changes):
    return ClipDataConfig(**{"num_frames": 5, "flip": False, **changes})


def frame_numbers(sample, whole):
    return [int(np.argmin([np.abs(f.astype(int) - image.image).mean() for image in whole])) for f in sample.frames]


def test_read_clip_takes_the_central_window_without_a_generator(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(20))
    whole = list(iter_frames(clip.address))
    sample = read(clip, config(), BUCKET, None)
    assert frame_numbers(sample, whole) == [8, 9, 10, 11, 12]
    assert sample.times == pytest.approx([frame.time for frame in whole[8:13]], abs=1e-6)
    assert frame_numbers(read(clip, config(stride=3), BUCKET, None), whole) == [4, 7, 10, 13, 16]


def test_read_clip_draws_all_windows_and_flips_from_the_generator(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(8))
    whole = list(iter_frames(clip.address))
    starts, flips = set(), set()
    for seed in range(24):
        sample = read(clip, config(flip=True), BUCKET, [seed])
        again = read(clip, config(flip=True), BUCKET, [seed])
        assert np.array_equal(sample.frames, again.frames)
        flipped = sample.frames[0, 32, -2].min() > 200
        frames = sample.frames[:, :, ::-1] if flipped else sample.frames
        starts.add(int(np.argmin([np.abs(frames[0].astype(int) - f.image).mean() for f in whole])))
        flips.add(bool(flipped))
    assert starts == {0, 1, 2, 3}
    assert flips == {False, True}


WINDOWS = {  # as the code before the renovation drew them, by settings and seed
    (): [[18, 19, 20, 21, 22], [24, 25, 26, 27, 28], [34, 35, 36, 37, 38], [5, 6, 7, 8, 9]],
    (("stride", (1, 4)),): [[18, 19, 20, 21, 22], [18, 21, 24, 27, 30], [23, 27, 31, 35, 39], [4, 6, 8, 10, 12]],
    (("fps", (6, 15)),): [[11, 15, 20, 25, 29], [20, 22, 24, 27, 29], [29, 31, 34, 36, 38], [4, 7, 10, 13, 16]],
}
WINDOWS_OF_PARTS = {
    (): [[22, 23, 24, 25, 26], [20, 21, 22, 23, 24]],
    (("stride", (1, 4)),): [[15, 19, 23, 27, 31], [18, 20, 22, 24, 26]],
    (("fps", (6, 15)),): [[19, 21, 24, 26, 28], [15, 19, 22, 25, 29]],
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_frames_that_a_seed_stands_for_are_what_they_were(tmp_path, suffix):
    clip = write_video(tmp_path / f"clip.{suffix}", scene())
    part = replace(clip, start=0.4, end=1.1)
    for changes, windows in WINDOWS.items():
        found = [read(clip, config(**dict(changes)), BUCKET, [seed, 2, 3]).times for seed in range(4)]
        assert [[round(30 * time) for time in times] for times in found] == windows
    for changes, windows in WINDOWS_OF_PARTS.items():
        found = [read(part, config(**dict(changes)), BUCKET, [seed]).times for seed in range(2)]
        assert [[round(30 * time) for time in times] for times in found] == windows


@pytest.mark.parametrize("changes", [{}, {"stride": 3}, {"fps": 10}])
def test_headers_that_promise_too_much_are_corrected_by_counting(tmp_path, monkeypatch, changes):
    clip = write_video(tmp_path / "clip.mkv", scene())
    honest = [read(clip, config(**changes), BUCKET, [seed]).times.tolist() for seed in range(8)]
    wrong = Timeline(4000, 0.0, 3999 / 30)
    asked = []

    def measure(self, part=(0.0, None), measure=VideoReader.measure):
        asked.append(part)
        return measure(self, part)

    monkeypatch.setattr(VideoReader, "measure", measure)
    for expected in (wrong, None, Timeline(3, 0.0, 0.1)):
        monkeypatch.setattr(VideoReader, "expect", lambda self, part, expected=expected: expected)
        found = [read(clip, config(**changes), BUCKET, [seed]).times.tolist() for seed in range(8)]
        assert np.allclose(found, honest, atol=1e-3)
    assert len(asked) == 24


@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"fps": (2, 5)}])
def test_windows_that_run_over_the_end_are_moved_to_it(tmp_path, changes):
    """A screen recording: busy at first, then a frame a second."""
    pts = [*range(30), *range(60, 360, 30)]
    clip = write_video(tmp_path / "clip.mp4", scene(40), pts=pts)
    for seed in range(30):
        sample = read(clip, config(**changes), BUCKET, [seed])
        assert sample.frames.shape == (5, 64, 96, 3)
        assert (np.diff(sample.times) >= 0).all()
        if not changes:
            shown = [pts.index(round(30 * time)) for time in sample.times]
            assert shown == list(range(shown[0], shown[0] + 5))


@pytest.mark.parametrize(
    ("name", "changes", "agrees"),
    [
        ("tagged.mp4", {}, True),
        ("tagged.mkv", {}, True),
        ("rotated.mp4", {"rotation": {"degrees": -90}}, False),
        ("10bit.mp4", {"pix_fmt": "yuv420p10le"}, False),
        ("vp8.webm", {"codec": "libvpx"}, False),
        ("stream.ts", {}, False),
        ("untagged.mp4", {"matrix": None}, False),
    ],
)
def test_decord_is_taken_if_asked_for_where_it_agrees(tmp_path, monkeypatch, name, changes, agrees):
    pytest.importorskip("decord")
    clip = write_video(tmp_path / name, scene(), **changes)
    taken = []

    def read_window(*args, read=decord.read_window):
        taken.append(read(*args))
        return taken[-1]

    monkeypatch.setattr(decord, "read_window", read_window)
    for setting in ({}, {"stride": 2}, {"fps": 10}):
        ours = read(clip, config(**setting), BUCKET, [3])
        assert not taken
        theirs = read(clip, config(decoder="decord", **setting), BUCKET, [3])
        assert (taken.pop() is not None) == agrees
        assert np.allclose(ours.times, theirs.times, atol=2e-3)
        # Its colours are rounded otherwise; a wrong frame would differ by 4.
        assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < (2.2 if agrees else 1e-9)
    read(replace(clip, start=0.1), config(decoder="decord"), BUCKET, None)
    assert not taken


@pytest.mark.parametrize("resolution", [(64, 96), (32, 32), (24, 96), (130, 130), (7, 5)])
def test_read_clip_covers_any_resolution_without_borders(tmp_path, resolution):
    clip = write_video(tmp_path / "clip.mp4", [np.full((64, 96, 3), 180, np.uint8)] * 6)
    for generator in (None, [0]):
        sample = read(clip, config(), Shape(5, *resolution), generator)
        assert sample.frames.shape == (5, *resolution, 3)
        assert sample.frames.dtype == np.uint8
        assert np.abs(sample.frames.astype(int) - 180).max() <= 4


def test_read_clip_keeps_to_a_csvs_start_and_end(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", scene(40))
    whole = list(iter_frames(clip.address))
    part = Item(clip.address, start=10 / 30, end=15 / 30, kind="clip")
    assert frame_numbers(read(part, config(), BUCKET, [0]), whole) == [10, 11, 12, 13, 14]
    with pytest.raises(MediaError, match="too short: 4 frames, 5 needed"):
        read(Item(clip.address, start=11 / 30, end=15 / 30, kind="clip"), config(), BUCKET, None)
    tail = read(Item(clip.address, start=35 / 30, kind="clip"), config(), BUCKET, None)
    assert frame_numbers(tail, whole) == [35, 36, 37, 38, 39]
    with pytest.raises(MediaError, match="too short: 0 frames"):
        read(Item(clip.address, start=100.0, kind="clip"), config(), BUCKET, None)


def test_read_clip_refuses_what_is_too_short_or_ends_early(tmp_path):
    clip = write_video(tmp_path / "short.mp4", scene(4))
    with pytest.raises(MediaError, match=r"short\.mp4: too short: 4 frames, 5 needed"):
        read(clip, config(), BUCKET, None)
    with pytest.raises(MediaError, match=r"too short: 4 frames, 9 needed \(5 at stride 2\)"):
        read(clip, config(stride=2), BUCKET, None)
    noise = np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), np.uint8)
    write_video(tmp_path / "whole.webm", list(noise), codec="libvpx")
    data = (tmp_path / "whole.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 3])
    with pytest.raises(MediaError, match=r"truncated: the last [\d,]+ bytes are missing"):
        read(Item(str(tmp_path / "cut.webm"), kind="clip"), config(), BUCKET, None)


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
    "truncated.webm": "truncated: the last 369,372 bytes are missing",
    "truncated_faststart.mp4": "truncated: the last 678,576 bytes are missing",
    "truncated_no_moov.mp4": "cannot be decoded: Invalid data",
    "zero_byte.jpg": "empty file",
    "zero_byte.mp4": "empty file",
}


@needs_shared
def test_shared_bad_files_are_refused_with_their_reasons():
    for path in sorted((SHARED / "bad").iterdir()):
        if path.name == "tiny_16x16.mp4":
            assert read(Item(str(path), kind="clip"), config(), BUCKET, None).frames.shape == (5, 64, 96, 3)
        else:
            with pytest.raises(MediaError) as caught:
                read(Item(str(path), kind="clip"), config(), BUCKET, None)
            assert caught.value.reason.startswith(REASONS[path.name]), path.name


def write(path, image):
    cv2.imwrite(str(path), image[..., ::-1])
    return Item(str(path), "image")


def ramp(height, width):
    """Red rises to the right and green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 255 / width, rows * 255 / height, np.full((height, width), 90)], -1).astype(np.uint8)


@pytest.mark.parametrize("resolution", [(64, 96), (32, 32), (24, 96), (130, 130), (7, 5)])
def test_read_picture_covers_any_resolution_without_borders(tmp_path, resolution):
    picture = write(tmp_path / "a.png", np.full((50, 70, 3), 180, np.uint8))
    for generator in (None, [0]):
        sample = read_picture(picture, resolution, True, generator)
        assert sample.item == picture
        assert sample.frames.shape == (*resolution, 3)
        assert sample.frames.dtype == np.uint8
        assert (sample.frames == 180).all()


def test_read_picture_takes_the_centre_without_a_generator(tmp_path):
    image = ramp(40, 100)
    frames = read_picture(write(tmp_path / "a.png", image), (40, 40), True, None).frames
    assert np.array_equal(frames, image[:, 30:70])


def test_read_picture_draws_crop_and_flip_from_the_generator(tmp_path):
    picture = write(tmp_path / "a.png", ramp(40, 50))
    lefts, flips = set(), set()
    for seed in range(60):
        frames, again, unflipped = (
            read_picture(picture, (40, 40), flip, [seed]).frames for flip in (True, True, False)
        )
        assert np.array_equal(frames, again)
        flipped = bool(frames[0, 0, 0] > frames[0, -1, 0])
        assert np.array_equal(frames[:, ::-1] if flipped else frames, unflipped)
        flips.add(flipped)
        lefts.add(round(int(unflipped[0, 0, 0]) * 50 / 255))
    assert flips == {False, True}
    assert lefts == set(range(11))


def test_members_of_tars_are_read_as_the_same_files_are(tmp_path):
    for name, height in (("a.png", 60), ("b.png", 80)):
        write(tmp_path / name, ramp(height, 70))
    (tmp_path / "c.jpg").write_bytes(b"not an image")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "b.png", "c.jpg"):
            tar.add(tmp_path / name, name)
    files = [Item(str(tmp_path / name), "image") for name in ("a.png", "b.png")]
    members = list_items([str(tmp_path / "x.tar")], "image", where="data.sources")
    for file, member in zip(files[:2], members[:2], strict=True):
        ours, theirs = (read_picture(p, (32, 48), True, [3]).frames for p in (file, member))
        assert np.array_equal(ours, theirs)
    with pytest.raises(MediaError, match=r"x\.tar/c\.jpg: not an image that can be decoded"):
        read_picture(members[2], (32, 48), True, None)


@needs_shared
def test_shared_images_of_awkward_kinds_look_as_pillow_shows_them():
    folder = SHARED / "dev" / "images"
    rotated = ["exif_Landscape_6.jpg", "immich_portrait-orientation-6.jpg", "rails_racecar_rotated.jpg"]
    for path in [*folder.glob("jxl_*"), folder / "immich_denali.webp", *(folder / name for name in rotated)]:
        with Image.open(path) as image:
            if path.name in rotated:
                image = image.transpose(Image.Transpose.ROTATE_270)
            if image.mode in ("LA", "RGBA"):
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            reference = np.asarray(image.convert("RGB"))
        error = np.abs(read_image(path).astype(int) - reference)
        assert error.max() <= 2, path
        assert read_picture(Item(str(path), "image"), (64, 64), True, None).frames.std() > 1


@needs_shared
@pytest.mark.parametrize("name", ["half.png", "bad_crc.png", "half.jpg", "zero_byte.jpg", "text_renamed.png"])
def test_shared_broken_images_are_refused(name):
    with pytest.raises(MediaError, match=name):
        read_picture(Item(str(SHARED / "bad" / name), "image"), (64, 64), True, None)


def test_short_side_sets_the_scale_of_small_crops():
    picture = np.arange(400 * 600 * 3, dtype=np.int64).reshape(400, 600, 3).astype(np.uint8)
    whole = cut_picture(picture, (200, 300), Cut())
    part = cut_picture(picture, (64, 96), Cut(), short_side=200)
    np.testing.assert_array_equal(part, whole[68 : 68 + 64, 102 : 102 + 96])
    # The crop is never larger than the picture, whatever the scale.
    np.testing.assert_array_equal(cut_picture(picture, (200, 300), Cut(), short_side=100), whole)
