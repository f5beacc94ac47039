"""The built-in clips come from installed photographs, one file each, and hold out a photograph of their own."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from leanvae.data.config import ClipDataConfig
from leanvae.data.schedule import list_training_items, split_held_out
from leanvae.media import builtin
from leanvae.media.builtin import PHOTOGRAPHS, find_photographs, make_builtin_clips, moving_views
from leanvae.media.image import read_image
from leanvae.media.item import Item
from leanvae.media.video import VideoReader


def probe(path):
    with VideoReader(str(path)) as reader:
        return reader.info


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


def frames_of(path):
    return np.array([frame.image for frame in iter_frames(path)], float)


@pytest.fixture
def few_frames(monkeypatch):
    monkeypatch.setattr(builtin, "NUM_FRAMES", 13)
    monkeypatch.setattr(builtin, "PHOTOGRAPHS", {name: PHOTOGRAPHS[name] for name in ("coffee", "brick")})


def test_photographs_are_found_in_the_installed_packages():
    found = find_photographs()
    assert {"astronaut", "chelsea", "coffee", "flower", "hubble_deep_field"} <= set(found)
    for path in found.values():
        assert min(read_image(path).shape[:2]) >= 300


def test_default_share_holds_out_natural_colour_photographs_of_their_own():
    clips = [Item(f"photo_{name}.mp4", "clip") for name in PHOTOGRAPHS]
    training, held_out = split_held_out(clips, ClipDataConfig().held_out)
    assert [clip.path for clip in held_out] == ["photo_flower.mp4", "photo_hubble_deep_field.mp4"]
    assert len(training) == len(PHOTOGRAPHS) - 2


def test_clips_are_written_once_and_look_like_the_views(few_frames, tmp_path):
    paths = make_builtin_clips(tmp_path)
    assert [path.name for path in paths] == ["photo_brick.mp4", "photo_coffee.mp4"]
    written = [path.stat().st_mtime_ns for path in paths]
    info = probe(paths[1])
    assert (info.width, info.height, info.fps, info.codec, info.matrix) == (320, 320, 30, "h264", 1)
    frames = frames_of(paths[1])
    views = list(moving_views(read_image(find_photographs()["coffee"]), "photo_coffee"))
    assert len(frames) == len(views) == 13
    error = np.mean((frames - np.array(views)) ** 2)
    assert 10 * np.log10(255**2 / error) > 33
    assert make_builtin_clips(tmp_path) == paths
    assert [path.stat().st_mtime_ns for path in paths] == written
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_missing_clip_is_made_again_and_the_source_lists_them(few_frames, tmp_path):
    config = ClipDataConfig(sources=["builtin"], cache_dir=str(tmp_path))
    clips = list_training_items(config)
    others = [Path(clip.path) for clip in clips if "coffee" not in clip.path]
    before = [path.read_bytes() for path in others]
    missing = tmp_path / "builtin-v1" / "photo_coffee.mp4"
    frames = frames_of(missing)
    missing.unlink()
    assert list_training_items(config) == clips
    assert [path.read_bytes() for path in others] == before
    assert np.abs(frames_of(missing) - frames).mean() < 2  # x264 does not always choose the same bytes


def test_views_never_show_a_border_and_move_smoothly(monkeypatch):
    monkeypatch.setattr(cv2, "BORDER_REFLECT_101", cv2.BORDER_CONSTANT)
    monkeypatch.setattr(builtin, "NUM_FRAMES", 33)
    for name in ("one", "two", "three"):
        assert min(view.min() for view in moving_views(np.full((300, 451, 3), 200, np.uint8), name)) == 200
    monkeypatch.undo()
    rows, columns = np.mgrid[:400, :600]
    ramp = np.stack([rows * 0.5, columns * 0.4, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    views = [view[::8, ::8].astype(float) for view in moving_views(ramp, "four")]
    steps = np.abs(np.diff(views, axis=0)).mean(axis=(1, 2, 3))
    assert steps.mean() > 0.05
    assert steps.max() < 6


def test_an_unwritable_cache_names_the_setting(few_frames, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"data\.cache_dir: .*cannot be written"):
        make_builtin_clips(tmp_path / "file")
