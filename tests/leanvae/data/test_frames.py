"""Which frames of a file a clip takes: evenly spaced by number, or by the file's own timestamps."""

import os
from dataclasses import astuple
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig
from leanvae.data.samples import Cut, frames_at_stride, points_at_rate, read_sample, usable_frames
from leanvae.data.schedule import list_training_items
from leanvae.data.shapes import measure_shapes, read_shape
from leanvae.media.errors import MediaError
from leanvae.media.item import Item
from leanvae.media.timeline import Timeline
from leanvae.training.build import make_schedule
from leanvae.training.config import TrainVideoConfig


@pytest.mark.parametrize("seed", range(20))
def test_strides_stay_in_their_range_and_inside_the_file(seed):
    generator = np.random.default_rng(seed)
    count, frames = int(generator.integers(17, 200)), int(generator.integers(2, 17))
    cut = Cut(window=generator.random(), pace=generator.random())
    indices = list(frames_at_stride("a", count, frames, (1, 4), cut))
    assert len(indices) == frames
    assert 0 <= indices[0] <= indices[-1] < count
    (stride,) = set(np.diff(indices))
    assert 1 <= stride <= 4


def test_strides_are_as_large_as_the_length_allows():
    drawn = {
        frames_at_stride("a", 11, 5, (1, 4), Cut(pace=pace))[1]
        - frames_at_stride("a", 11, 5, (1, 4), Cut(pace=pace))[0]
        for pace in np.linspace(0, 0.999, 20)
    }
    assert drawn == {1, 2}
    with pytest.raises(MediaError, match=r"too short: 11 frames, 13 needed \(5 at stride 3\)"):
        frames_at_stride("a", 11, 5, (3, 4), Cut())


def timeline(times):
    return Timeline(len(times), times[0], times[-1])


@pytest.mark.parametrize("seed", range(20))
def test_rates_stay_in_their_range_and_inside_the_file(seed):
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.uniform(0.01, 0.08, 120))  # a variable rate of about 22 frames a second
    cut = Cut(window=generator.random(), pace=generator.random())
    start, rate = points_at_rate("a", timeline(times), 9, (5, 12), cut)
    assert rate == pytest.approx(5 + cut.pace * 7)
    assert times[0] <= start
    assert start + 8 / rate <= times[-1] + 1e-9
    assert start == pytest.approx(times[0] + cut.window * (times[-1] - times[0] - 8 / rate))


def test_rates_say_what_a_file_lacks():
    times = np.arange(30) / 10
    with pytest.raises(MediaError, match="10 frames a second, at least 24 needed"):
        points_at_rate("a", timeline(times), 9, (24, 30), Cut())
    with pytest.raises(MediaError, match=r"too short: 2\.9 s, 4 s needed"):
        points_at_rate("a", timeline(times), 33, (8, 8), Cut())
    with pytest.raises(MediaError, match="at least 8 needed"):
        points_at_rate("a", timeline(times[:1]), 5, (8, 8), Cut())
    # The highest rate is the file's own, the lowest as its length asks for.
    assert points_at_rate("a", timeline(times), 9, (1, 60), Cut(window=0.0, pace=1.0)) == (0.0, pytest.approx(10))
    assert points_at_rate("a", timeline(times), 30, (1, 60), Cut(pace=0.0)) == (0.0, pytest.approx(28.5 / 2.9))


def write_variable(path, times):
    """A clip whose frames show their number in red, at the given times in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            image = np.full((64, 96, 3), (10 * index, 90, 60), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_clips_of_variable_rate_are_read_by_their_timestamps(tmp_path):
    """Frames at 0, 50, 100, ... ms, then one every 200 ms: at 8 a second those are held."""
    times = [*range(0, 500, 50), *range(500, 2500, 200)]
    write_variable(tmp_path / "variable.mp4", times)
    config = ClipDataConfig(fps=8, flip=False)
    clip = Item(str(tmp_path / "variable.mp4"), "clip")
    (sample,) = read_sample(clip, config, Shape(17, 64, 96), None)
    shown = np.rint(sample.frames[..., 0].mean(axis=(1, 2)) / 10).astype(int)
    assert np.abs(np.asarray(times)[shown] / 1000 - sample.times).max() < 2e-3
    start = sample.times[0]
    assert np.abs(sample.times - (start + np.arange(17) / 8)).max() <= 0.1 + 1e-3
    assert len(set(shown)) < 17


@pytest.mark.parametrize(
    ("config", "frames"),
    [({}, 41), ({"stride": [2, 5]}, 21), ({"fps": 5}, 11), ({"fps": [5, 100]}, 41)],
)
def test_usable_frames(config, frames):
    assert usable_frames(41, 2.0, ClipDataConfig(**config)) == frames


def test_shapes_are_measured_once_and_again_when_files_change(tmp_path, write_clip, monkeypatch):
    (tmp_path / "data").mkdir()
    write_clip(tmp_path / "data" / "a.mp4", num_frames=20, height=48, width=64)
    (tmp_path / "data" / "bad.mp4").write_bytes(b"no video")
    cv2.imwrite(str(tmp_path / "data" / "b.png"), np.zeros((30, 50, 3), np.uint8))
    folder = str(tmp_path / "data")
    config = ClipDataConfig(
        sources=[folder, {"path": folder, "kind": "images"}], cache_dir=str(tmp_path / "cache"), num_workers=1
    )
    items = list_training_items(config)
    assert [item.kind for item in items] == ["clip", "clip", "image"]
    assert measure_shapes(items, config) == [Shape(20, 48, 64), None, Shape(1, 30, 50)]
    monkeypatch.setattr("leanvae.data.shapes.read_shape", None)  # nothing is measured again but what failed
    assert measure_shapes([items[2], items[0]], config) == [Shape(1, 30, 50), Shape(20, 48, 64)]
    monkeypatch.undo()
    write_clip(tmp_path / "data" / "a.mp4", num_frames=9, height=64, width=48)
    assert measure_shapes(items[:1], config.model_copy(update={"stride": (2, 2)})) == [Shape(5, 64, 48)]


def test_shapes_of_names_that_are_not_utf8_and_of_long_files(tmp_path, write_clip, monkeypatch):
    write_clip(tmp_path / os.fsdecode(b"caf\xe9.mp4"), num_frames=20, height=48, width=64)
    config = ClipDataConfig(sources=[str(tmp_path)], cache_dir=str(tmp_path / "cache"), num_workers=1)
    items = list_training_items(config)
    for _ in range(2):
        assert measure_shapes(items, config) == [Shape(20, 48, 64)]
    # Of a long file, the header will do: its packets are not read.
    monkeypatch.setattr("leanvae.data.shapes._MOST_COUNTED", 10)
    monkeypatch.setattr("leanvae.media.video.VideoReader.measure", None)
    assert [astuple(shape) for shape in read_shape(items[0])] == [(20, pytest.approx(19 / 25), 48, 64)]


def test_a_run_keeps_the_shapes_that_it_began_with(tmp_path, write_clip):
    """A file that breaks between two starts of a run stays in its bucket, where it will be replaced."""
    (tmp_path / "data").mkdir()
    for number, size in enumerate([(48, 64), (64, 48), (48, 64)]):
        write_clip(tmp_path / "data" / f"{number}.mp4", 20, *size)
    data = {"sources": [str(tmp_path / "data")], "buckets": ["5x32x48", "5x48x32"], "held_out": 0.0, "num_workers": 1}
    config = TrainVideoConfig.model_validate({"data": {**data, "cache_dir": str(tmp_path / "cache")}})
    items, kept = list_training_items(config.data), tmp_path / "shapes.json"

    def buckets(schedule):
        return [str(schedule.at(step).bucket) for step in range(50)]

    before = buckets(make_schedule(config, items, kept))
    (tmp_path / "data" / "1.mp4").write_bytes(b"broken")
    assert buckets(make_schedule(config, items, kept)) == before
    other = config.data.model_copy(update={"stride": (2, 2)})
    make_schedule(config.model_copy(update={"data": other}), items, kept)
    assert "(2, 2)" in kept.read_text()
