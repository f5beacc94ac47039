"""Written clips: their timestamps, colours, sound and completeness."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from leanvae.media.image import read_image
from leanvae.media.video import VideoReader
from leanvae.media.writer import VideoWriter, write_png


def probe(path):
    with VideoReader(str(path)) as reader:
        return reader.info


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


def _frames(count: int, height: int = 32, width: int = 48) -> list[NDArray[np.uint8]]:
    """A smooth pattern that moves, `(height, width, 3)` each."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin((x + 3 * t) / 9), np.cos((y - 2 * t) / 7), np.sin((x + y) / 11)]
    return [*(127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)]


def _write(
    path: Path, frames: Sequence[NDArray[np.uint8]], pts: list[int], time_base: Fraction, **options: object
) -> list[str]:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, time_base=time_base, **options) as writer:  # pyright: ignore
        for frame, stamp in zip(frames, pts, strict=True):
            writer.write(frame, stamp)
    return writer.notes


def _times(path: Path) -> list[Fraction]:
    time_base = probe(path).time_base
    return [frame.pts * time_base for frame in iter_frames(path) if frame.pts is not None]


def _sound(path: Path) -> tuple[float, NDArray[np.float64]]:
    """Start in seconds and samples of the first channel."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    return float(frames[0].time or 0), np.concatenate([frame.to_ndarray()[0] for frame in frames]).astype(np.float64)


def _write_sound(path: Path, codec: str, start: float = 0.0, seconds: float = 1.0, silence: float = 0.5) -> None:
    """A small clip with a tone that begins after some silence; the sound's clock begins at `start`."""
    rate = 48000
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    tone[: int(rate * silence)] = 0
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264" if path.suffix != ".webm" else "libvpx", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="mono")
        for image in _frames(int(25 * seconds), 32, 32):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        for index in range(0, len(tone), 960):
            samples = (32767 * tone[None, index : index + 960]).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = rate
            frame.pts = index + int(start * rate)
            frame.time_base = Fraction(1, rate)
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


@pytest.mark.parametrize(
    ("time_base", "pts"),
    [
        (Fraction(1, 1000), [33, 66, 100, 250, 251, 900, 1400]),
        (Fraction(1, 90000), [0, 1501, 3003, 3004, 90000, 90001, 200000]),
        (Fraction(1001, 30000), [1, 2, 3, 4, 6, 7, 50]),
        (Fraction(1, 23040000), [7, 768000, 1535999, 2304000, 3072000, 3840000, 23040001]),
    ],
)
def test_video_writer_keeps_timestamps_exactly(tmp_path: Path, time_base: Fraction, pts: list[int]) -> None:
    path = tmp_path / "clip.mp4"
    assert _write(path, _frames(7), pts, time_base) == []
    assert _times(path) == [stamp * time_base for stamp in pts]


def test_video_writer_moves_timestamps_that_do_not_increase(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    notes = _write(path, _frames(5), [0, 10, 10, 5, 30], Fraction(1, 1000))
    assert _times(path) == [Fraction(stamp, 1000) for stamp in (0, 10, 11, 12, 30)]
    assert notes == ["2 timestamps did not increase and were moved"]


def test_video_writer_spaces_frames_without_timestamps_by_the_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 48, 32, time_base=Fraction(1, 1000), rate=Fraction(50)) as writer:
        for frame in _frames(4):
            writer.write(frame)
    assert _times(path) == [Fraction(20 * index, 1000) for index in range(4)]
    assert probe(path).duration == pytest.approx(0.08)


@pytest.mark.parametrize("count", [1, 2, 60])
def test_video_writer_writes_every_frame(tmp_path: Path, count: int) -> None:
    path = tmp_path / "clip.mp4"
    _write(path, _frames(count), list(range(count)), Fraction(1, 25), rate=Fraction(25))
    assert sum(1 for _ in iter_frames(path)) == count
    assert probe(path).duration == pytest.approx(count / 25)


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"), [(64, 96, "yuv420p"), (61, 97, "yuv444p"), (64, 33, "yuv444p")]
)
def test_video_writer_keeps_colours_and_tags_them(tmp_path: Path, height: int, width: int, pix_fmt: str) -> None:
    path = tmp_path / "clip.mp4"
    patches = np.zeros((height, width, 3), np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    for index, colour in enumerate(colours):
        patches[:, index * width // 6 : (index + 1) * width // 6] = colour
    _write(path, [patches], [0], Fraction(1, 25))
    info = probe(path)
    assert (info.width, info.height, info.pix_fmt) == (width, height, pix_fmt)
    assert (info.matrix, info.color_range, info.transfer, info.rotation) == (1, 1, 1, 0)
    (frame,) = iter_frames(path)
    centres = [(2 * index + 1) * width // 12 for index in range(6)]
    seen = frame.image[height // 2, centres].astype(int)
    assert np.abs(seen - np.array(colours)).max() <= 5


def test_video_writer_keeps_smooth_pictures_without_a_bias(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = _frames(9, 63, 85)
    _write(path, frames, list(range(9)), Fraction(1, 25))
    difference = np.stack([frame.image for frame in iter_frames(path)]).astype(float) - frames
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 0.3
    assert np.sqrt(np.square(difference).mean()) < 2.5


def test_video_writer_keeps_the_pixel_aspect(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    _write(path, _frames(2), [0, 1], Fraction(1, 25), pixel_aspect=Fraction(12, 11))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(12, 11)


def test_video_writer_leaves_nothing_behind_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with pytest.raises(ValueError, match=r"frame 1 is \(32, 46, 3\)"):
        _write(path, [_frames(1)[0], _frames(1, 32, 46)[0]], [0, 1], Fraction(1, 25))
    with pytest.raises(ValueError, match="no frame"), VideoWriter(path, 48, 32, time_base=Fraction(1, 25)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_video_writer_refuses_sizes_and_clocks_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0x32"):
        VideoWriter(tmp_path / "b.mp4", 0, 32, time_base=Fraction(1, 25))
    with pytest.raises(ValueError, match="time_base"):
        VideoWriter(tmp_path / "b.mp4", 48, 32, time_base=Fraction(0))


def test_video_writer_copies_aac_packet_by_packet(tmp_path: Path) -> None:
    source, path = tmp_path / "source.mp4", tmp_path / "clip.mp4"
    _write_sound(source, "aac", start=0.25)
    _write(path, _frames(25), list(range(25)), Fraction(1, 25), audio_from=source)

    def packets(file: Path) -> tuple[list[float], list[bytes]]:
        with av.open(str(file)) as container:
            found = [packet for packet in container.demux(audio=0) if packet.size]
            return [float((packet.pts or 0) * (packet.time_base or 0)) for packet in found], [*map(bytes, found)]

    times, data = packets(source)
    assert len(data) > 40
    assert packets(path)[1] == data
    assert packets(path)[0] == pytest.approx(times, abs=1.5 / 48000)


@pytest.mark.parametrize(("codec", "suffix"), [("libopus", ".webm"), ("pcm_s16le", ".mkv"), ("mp2", ".mkv")])
def test_video_writer_encodes_other_sound_as_aac_in_step(tmp_path: Path, codec: str, suffix: str) -> None:
    source, path = tmp_path / f"source{suffix}", tmp_path / "clip.mp4"
    _write_sound(source, codec, start=0.25)
    assert _write(path, _frames(25), list(range(25)), Fraction(1, 25), audio_from=source) == []
    with av.open(str(path)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    start, samples = _sound(path)
    onset = start + np.argmax(np.abs(samples) > 0.1) / 48000
    assert onset == pytest.approx(0.75, abs=0.01)
    assert start + len(samples) / 48000 == pytest.approx(1.25, abs=0.05)


def test_video_writer_takes_the_origin_off_picture_and_sound(tmp_path: Path) -> None:
    source, path = tmp_path / "source.mkv", tmp_path / "clip.mp4"
    _write_sound(source, "pcm_s16le", start=10.0)
    pts = [10000 + 40 * index for index in range(25)]
    _write(path, _frames(25), pts, Fraction(1, 1000), audio_from=source, origin=Fraction(10))
    assert _times(path) == [Fraction(40 * index, 1000) for index in range(25)]
    start, samples = _sound(path)
    assert start + np.argmax(np.abs(samples) > 0.1) / 48000 == pytest.approx(0.5, abs=0.01)


def test_video_writer_goes_on_where_the_sound_is_cut_off(tmp_path: Path) -> None:
    source, path = tmp_path / "source.mkv", tmp_path / "clip.mp4"
    _write_sound(source, "pcm_s16le")
    source.write_bytes(source.read_bytes()[:-20000])
    _write(path, _frames(25), list(range(25)), Fraction(1, 25), audio_from=source)
    assert len(_times(path)) == 25
    assert 0.5 < len(_sound(path)[1]) / 48000 < 1.0


def test_write_png_round_trip_is_exact(tmp_path: Path) -> None:
    image = _frames(1, 31, 17)[0]
    write_png(tmp_path / "image.png", image)
    assert np.array_equal(read_image(tmp_path / "image.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_write_png_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) uint8"):
        write_png(tmp_path / "image.png", np.zeros((4, 4), np.uint8))
