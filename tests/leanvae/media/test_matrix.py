"""Containers x codecs x rotation x pixel aspect x range x frame rates, each cell compared with what went in.

Every file is made on the fly at 64x64 and read whole, by window, by rate and by part. `pytest -s` prints the cells that
ran, and why others were refused or skipped.
"""

import bisect
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product

import av
import cv2
import numpy as np
import pytest
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange

from leanvae.media.errors import MediaError
from leanvae.media.video import VideoReader

SIZE, COUNT, PATCH = 64, 20, 16
STEP = 8  # levels from frame to frame, so that none can be taken for its neighbour

# For each codec: its pixel formats, the fewest dB (None: lossless), and the ranges that its stream can state.
BOTH, LIMITED, FULL = ("limited", "full"), ("limited",), ("full",)
CODECS = {
    "libx264": (("yuv420p", "yuv444p", "yuv420p10le"), 30, BOTH),
    "libx264rgb": (("rgb24",), 30, FULL),
    "libx265": (("yuv420p", "yuv420p10le"), 30, BOTH),
    "libsvtav1": (("yuv420p",), 28, BOTH),
    "libvpx": (("yuv420p",), 28, LIMITED),
    "libvpx-vp9": (("yuv420p", "yuv444p"), 28, BOTH),
    "mpeg4": (("yuv420p",), 28, LIMITED),
    "mpeg2video": (("yuv420p", "yuv422p"), 28, LIMITED),
    "mpeg1video": (("yuv420p",), 28, LIMITED),
    "msmpeg4": (("yuv420p",), 28, LIMITED),
    "wmv2": (("yuv420p",), 28, LIMITED),
    "flv1": (("yuv420p",), 28, LIMITED),
    "mjpeg": (("yuvj420p", "yuvj444p"), 28, BOTH),
    "prores_ks": (("yuv422p10le", "yuv444p10le"), 32, LIMITED),
    "ffv1": (("yuv420p", "yuv444p", "yuv422p10le", "bgr0"), None, BOTH),
    "huffyuv": (("yuv422p", "rgb24"), None, LIMITED),
    "ffvhuff": (("yuv420p", "yuv444p"), None, LIMITED),
    "utvideo": (("yuv420p", "gbrp"), None, LIMITED),
    "magicyuv": (("yuv444p", "gbrp"), None, LIMITED),
    "rawvideo": (("yuv420p", "rgb24"), None, LIMITED),
    "png": (("rgb24",), None, FULL),
    "qtrle": (("rgb24",), None, FULL),
    "zlib": (("bgr24",), None, FULL),
    "jpeg2000": (("rgb24",), 30, FULL),
    "gif": (("rgb8",), 14, FULL),
    "apng": (("rgb24",), None, FULL),
    "y4m": (("yuv420p", "yuv444p"), None, LIMITED),
}
RGB = {"rgb24", "bgr0", "bgr24", "gbrp", "rgb8"}


@dataclass(frozen=True)
class Container:
    """What a container can state: its codecs, its clock in seconds, and what its header has no field for."""

    codecs: tuple[str, ...]
    clock: float
    rates: tuple[str, ...]
    rotates: bool = False
    has_aspect: bool = True


RATES = ("25", "ntsc", "variable", "late", "long-last", "millisecond")
FIXED = ("25", "ntsc")
NO_LENGTHS = ("25", "ntsc", "variable", "late", "millisecond")  # of single frames
# fmt: off
CONTAINERS = {
    "mp4": Container(
        ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4", "mpeg2video", "mjpeg"), 1e-4, RATES, rotates=True
    ),
    "mov": Container(
        ("libx264", "libx264rgb", "prores_ks", "mjpeg", "qtrle", "png", "jpeg2000"), 1e-4, RATES, rotates=True
    ),
    "mkv": Container(
        ("libx264", "libx265", "libsvtav1", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mjpeg", "prores_ks",
         "ffv1"), 1e-3, RATES, rotates=True,
    ),
    "webm": Container(("libvpx", "libvpx-vp9", "libsvtav1"), 1e-3, RATES, rotates=True),
    "avi": Container(
        ("libx264", "mpeg4", "msmpeg4", "mjpeg", "ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "zlib", "png"),
        1e-4, FIXED,
    ),
    "nut": Container(("libx264", "ffv1", "mpeg4", "rawvideo"), 1e-4, RATES),
    "ts": Container(("libx264", "libx265", "mpeg2video", "mpeg4"), 1e-4, NO_LENGTHS),
    "mpg": Container(("mpeg1video", "mpeg2video"), 1e-4, FIXED),
    "flv": Container(("libx264", "flv1", "libx265"), 1e-3, NO_LENGTHS, has_aspect=False),
    "ogv": Container(("libvpx",), 1e-4, FIXED, has_aspect=False),
    "mxf": Container(("mpeg2video", "libx264", "prores_ks"), 1e-4, FIXED),
    "asf": Container(("wmv2", "msmpeg4", "libx264"), 1e-3, ("25", "ntsc", "variable", "millisecond")),
    "3gp": Container(("libx264", "mpeg4"), 1e-4, RATES, rotates=True),
    "gif": Container(("gif",), 1e-2, ("25", "variable"), has_aspect=False),
    "apng": Container(("apng",), 1e-3, ("25", "variable", "millisecond"), has_aspect=False),
    "y4m": Container(("y4m",), 1e-4, FIXED),
}
# fmt: on
# Clockwise turns that bring the coded picture upright, with a mirror where the second is true.
TURNS = {"upright": (0, False), "quarter": (90, False), "half": (180, False), "mirrored": (0, True)}
ASPECTS = (Fraction(1), Fraction(4, 3), Fraction(3, 4))
# PyAV hands an aspect on to these containers only through the codec's own header, which only these have.
ASPECT_OF_CODEC = {"mkv", "webm", "avi", "nut", "asf", "mxf"}
STATES_ASPECT = {"libx264", "libx265", "mpeg4", "mpeg2video"}


@dataclass(frozen=True)
class Cell:
    container: str
    codec: str
    pix_fmt: str
    turn: str
    aspect: Fraction
    range: str
    rate: str

    def __str__(self) -> str:
        aspect = f"{self.aspect.numerator}:{self.aspect.denominator}"
        return f"{self.container} {self.codec} {self.pix_fmt} {self.turn} {aspect} {self.range} {self.rate}"

    def cannot_be(self) -> str:
        """Why the combination does not exist; empty if it does."""
        container = CONTAINERS[self.container]
        if self.turn != "upright" and not container.rotates:
            return f"{self.container} has no display matrix"
        if self.aspect != 1 and not container.has_aspect:
            return f"{self.container} has no pixel aspect"
        if self.aspect != 1 and self.container in ASPECT_OF_CODEC and self.codec not in STATES_ASPECT:
            return f"PyAV cannot write a pixel aspect for {self.codec} in {self.container}"
        if self.codec == "mpeg2video" and self.aspect == Fraction(3, 4):
            return "mpeg2video knows the shapes 4:3 and 16:9 only"
        if self.codec == "mpeg1video" and self.aspect != 1:
            return "mpeg1video knows a few aspects only"
        if self.codec == "mpeg2video" and self.rate in ("variable", "millisecond"):
            return "mpeg2video knows a few rates only"
        if self.container == "asf" and self.codec == "libx264" and self.rate == "variable":
            return "asf keeps decoding times alone, which are not those of reordered frames of variable rate"
        if self.container in ("nut", "avi") and self.codec == "ffv1" and self.range == "full":
            return f"{self.container} has no range for {self.codec}"
        if self.range not in CODECS[self.codec][2]:
            return f"{self.codec} has no way to state {self.range} range"
        if self.rate not in container.rates:
            return f"{self.container} has no times for {self.rate} frames"
        return ""


def cells():
    """A third of all combinations, such that each pair of properties is met."""
    for container, codec in ((c, codec) for c, about in CONTAINERS.items() for codec in about.codecs):
        formats = CODECS[codec][0]
        for number, combination in enumerate(product(TURNS, ASPECTS, BOTH, RATES)):
            if (number + number // 6 + number // 36) % 3 == 0:
                pix_fmt = formats[number % len(formats)]
                if "limited" in combination:
                    pix_fmt = pix_fmt.replace("yuvj", "yuv")
                yield Cell(container, codec, pix_fmt, *combination)


def tick_counts(rate):
    """Timestamps and their unit."""
    if rate == "ntsc":
        return list(range(COUNT)), Fraction(1001, 30000)
    if rate == "millisecond":
        return list(range(0, 33 * COUNT, 33)), Fraction(1, 1000)
    if rate == "variable":
        pauses = [1, 1, 2, 1, 5, 1, 1, 3, 1, 1]
        return [sum((2 * pauses)[:index]) for index in range(COUNT)], Fraction(1, 25)
    if rate == "late":
        return [35 + index for index in range(COUNT)], Fraction(1, 25)
    if rate == "long-last":  # all but the last frame come in one second; the last one stands for a minute
        return list(range(COUNT)), Fraction(1, 25)
    return list(range(COUNT)), Fraction(1, 25)


def pattern():
    """(4, 4) luma, Cb and Cr, without any symmetry."""
    generator = np.random.default_rng(7)
    return generator.permutation(16).reshape(4, 4) * 3, *generator.integers(-14, 15, (2, 4, 4))


def planes_of(index):
    """(64, 64) 8-bit Y, Cb and Cr of a frame in limited range."""
    luma, cb, cr = pattern()
    patches = (30 + STEP * index + luma, 128 + cb, 128 + cr)
    return [np.kron(patch, np.ones((PATCH, PATCH), int)) for patch in patches]


def rgb_of(planes, full):
    """(64, 64, 3) by ITU-R BT.601."""
    y, cb, cr = (plane.astype(float) for plane in planes)
    luma, blue, red = (
        (y / 255, (cb - 128) / 255, (cr - 128) / 255) if full else ((y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224)
    )
    r, b = luma + 1.402 * red, luma + 1.772 * blue
    g = (luma - 0.299 * r - 0.114 * b) / 0.587
    return np.clip(255 * np.stack([r, g, b], axis=-1), 0, 255)


def coded_picture(upright, turn):
    """The picture as it is coded, so that the display matrix brings it upright."""
    clockwise, is_mirrored = TURNS[turn]
    picture = np.flip(upright, 1) if is_mirrored else upright
    return np.rot90(picture, clockwise // 90)


def make_frame(index, cell):
    """A coded frame, and the picture that it has to be shown as."""
    planes = planes_of(index)
    if cell.pix_fmt in RGB:
        picture = np.round(rgb_of(planes, full=False)).astype(np.uint8)
        coded = np.ascontiguousarray(coded_picture(picture, cell.turn))
        frame = VideoFrame.from_ndarray(coded, format="rgb24")
        return (frame if cell.pix_fmt == "rgb24" else frame.reformat(format=cell.pix_fmt)), picture
    coded = [coded_picture(plane, cell.turn) for plane in planes]
    name = cell.pix_fmt.replace("yuvj", "yuv")
    frame = VideoFrame(SIZE, SIZE, cell.pix_fmt)
    deep = "10" in name
    across, down = (1 if "444" in name else 2), (2 if "420" in name else 1)
    for number, (plane, values) in enumerate(zip(frame.planes, coded, strict=True)):
        values = values[::down, ::across] if number else values
        data = np.zeros((plane.height, plane.line_size // (2 if deep else 1)), np.uint16 if deep else np.uint8)
        data[:, : values.shape[1]] = values << (2 if deep else 0)
        plane.update(data.tobytes())
    frame.color_range = ColorRange.JPEG if cell.range == "full" else ColorRange.MPEG
    frame.colorspace = 5
    return frame, rgb_of(planes, cell.range == "full")


def write_y4m(path, cell, frames):
    _, unit = tick_counts(cell.rate)
    kind = {"yuv420p": "420jpeg", "yuv444p": "444"}[cell.pix_fmt]
    aspect = f"{cell.aspect.numerator}:{cell.aspect.denominator}"
    with open(path, "wb") as file:
        header = f"YUV4MPEG2 W{SIZE} H{SIZE} F{unit.denominator}:{unit.numerator} Ip A{aspect} C{kind}\n"
        file.write(header.encode())
        for frame in frames:
            file.write(b"FRAME\n")
            for plane in frame.planes:
                file.write(np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].tobytes())


def write(path, cell):
    """Write a cell's file.

    Returns:
        The pictures to expect, and their seconds since the first one.
    """
    frames, pictures = zip(*(make_frame(index, cell) for index in range(COUNT)), strict=True)
    ticks, unit = tick_counts(cell.rate)
    times = [float((tick - ticks[0]) * unit) for tick in ticks]
    if cell.codec == "y4m":
        write_y4m(path, cell, frames)
        return pictures, times
    lossy = CODECS[cell.codec][1] is not None
    options = {
        "libx264": {"crf": "12", "preset": "veryfast", "g": "8"},
        "libx264rgb": {"crf": "8", "preset": "veryfast"},
        "libx265": {"crf": "12", "preset": "ultrafast", "x265-params": "log-level=none:keyint=8"},
        "libsvtav1": {"crf": "10", "preset": "12"},
        "libvpx": {"crf": "4", "b": "2M", "cpu-used": "8", "deadline": "realtime", "g": "8"},
        "libvpx-vp9": {"crf": "4", "b": "0", "cpu-used": "8", "deadline": "realtime", "g": "8"},
        "jpeg2000": {"pred": "1"},
        "mjpeg": {"qscale": "2", "flags": "+qscale", "global_quality": "236", "strict": "unofficial"},
    }.get(cell.codec, {"qscale": "2", "g": "8", "flags": "+qscale", "global_quality": "236"} if lossy else {})
    muxer = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "ogv": "ogg"}.get(cell.container, cell.container)
    fast = {"movflags": "faststart"} if cell.container in ("mp4", "mov") else {}
    with av.open(str(path), "w", format=muxer, options=fast) as container:
        stream = container.add_stream(cell.codec, rate=1 / unit if cell.rate == "ntsc" else 25, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, cell.pix_fmt
        context = stream.codec_context
        context.time_base = stream.time_base = unit
        context.sample_aspect_ratio = cell.aspect
        if cell.codec in ("mpeg4", "mpeg2video", "mpeg1video") and cell.container not in ("mpg",):
            context.max_b_frames = 2
        if cell.pix_fmt not in RGB:
            context.colorspace = 5
            context.color_range = ColorRange.JPEG if cell.range == "full" else ColorRange.MPEG
        clockwise, is_mirrored = TURNS[cell.turn]
        if clockwise or is_mirrored:
            stream.set_display_rotation(-clockwise, hflip=is_mirrored)
        for tick, frame in zip(ticks, frames, strict=True):
            frame.pts, frame.time_base = tick, unit
            if cell.rate == "long-last" and tick == ticks[-1]:
                frame.duration = 60 * 25
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return pictures, times


def shown(picture, cell):
    """The picture with square pixels."""
    quarter = TURNS[cell.turn][0] % 180 == 90
    aspect = 1 / cell.aspect if quarter else cell.aspect
    if aspect == 1:
        return picture
    width, height = (round(SIZE * aspect), SIZE) if aspect > 1 else (SIZE, round(SIZE / aspect))
    return cv2.resize(picture.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def check(path, cell, pictures, times):
    """Compare what is read with what was written; raises AssertionError where they differ."""
    expected = [shown(picture, cell) for picture in pictures]
    levels = [float(picture.mean()) for picture in expected]
    with VideoReader(str(path)) as reader:
        whole = list(reader.frames())
        info = reader.info
    assert len(whole) == COUNT, f"{len(whole)} frames of {COUNT}"
    assert whole[0].image.shape == expected[0].shape, f"{whole[0].image.shape} for {expected[0].shape}"
    found = [int(np.argmin([abs(frame.image.mean() - level) for level in levels])) for frame in whole]
    assert found == list(range(COUNT)), f"frames {found}"
    fewest = CODECS[cell.codec][1]
    for frame, picture in zip(whole, expected, strict=True):
        difference = np.abs(frame.image - np.clip(picture, 0, 255))
        if fewest is None and cell.aspect == 1 and ("420" in cell.pix_fmt or "422" in cell.pix_fmt):
            # Chroma of half the size is interpolated across the patches' edges.
            difference = difference.reshape(4, PATCH, 4, PATCH, 3)[:, 4:-4, :, 4:-4]
        elif fewest is None and cell.aspect != 1:
            difference = difference[8::16, 8::16] if cell.pix_fmt not in RGB else difference
        if fewest is None:
            # Resampling rounds before, and the arrays here are not rounded.
            allowed = (0.51 if cell.pix_fmt in RGB else 1.5) if cell.aspect == 1 else 3
            assert difference.max() <= allowed, f"off by {difference.max():.2f}"
        else:
            quality = 20 * np.log10(255 / max(1e-3, np.sqrt((difference**2).mean())))
            assert quality >= fewest, f"{quality:.1f} dB, {fewest} needed"
    clock = CONTAINERS[cell.container].clock
    off = max(abs(frame.time - whole[0].time - time) for frame, time in zip(whole, times, strict=True))
    assert off <= clock, f"times off by {off:.4f} s"
    assert info.pixel_aspect in (1, cell.aspect, 1 / cell.aspect) or abs(info.pixel_aspect / cell.aspect - 1) < 0.01

    stamps = [frame.time for frame in whole]
    between = [(a + b) / 2 for a, b in pairwise(stamps)]
    with VideoReader(str(path)) as reader:
        same(reader.window(between[10], 4, stride=2), whole[11:18:2], "window")
        same(reader.window(between[3], 3), whole[4:7], "window back")
    with VideoReader(str(path)) as reader:
        points = [stamps[5] + 0.013 + index / 12 for index in range(5)]
        points = [point for point in points if point <= stamps[-1]]
        nearest = [min(whole, key=lambda frame: (abs(frame.time - point), frame.time)) for point in points]
        same(reader.window(points[0], len(points), fps=12), nearest, "fps")
    with VideoReader(str(path)) as reader:
        part = (between[6], between[15])
        inside = whole[bisect.bisect_left(stamps, part[0]) : bisect.bisect_left(stamps, part[1])]
        same(list(reader.frames(*part)), inside, "part")
        assert reader.count(*part) == len(inside), f"counts {reader.count(*part)} of {len(inside)} in a part"
        assert reader.count() == COUNT, f"counts {reader.count()} of {COUNT}"


def same(found, wanted, what):
    assert [round(frame.time, 6) for frame in found] == [round(frame.time, 6) for frame in wanted], (
        f"{what}: at {[round(f.time, 3) for f in found]} instead of {[round(f.time, 3) for f in wanted]}"
    )
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found, wanted, strict=True)), f"{what}: other pixels"


@pytest.mark.filterwarnings("ignore")
def test_every_cell_of_the_matrix_gives_what_went_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    av.logging.set_level(av.logging.PANIC)
    run, skipped, refused, wrong = 0, Counter(), {}, {}
    for cell in cells():
        path = tmp_path / f"cell.{cell.container}"
        if reason := cell.cannot_be():
            skipped[reason] += 1
            continue
        try:
            pictures, times = write(path, cell)
        except (FFmpegError, ValueError) as error:
            skipped[f"FFmpeg cannot write {cell.container} {cell.codec}: {error}"] += 1
            continue
        run += 1
        try:
            check(path, cell, pictures, times)
        except MediaError as error:
            refused[str(cell)] = error.reason
        except AssertionError as error:
            wrong[str(cell)] = str(error).splitlines()[0]
    print(f"\n{run} cells run, {len(refused)} refused, {sum(skipped.values())} skipped")
    for reason, count in skipped.most_common():
        print(f"{count:5} skipped: {reason}")
    for cell, reason in refused.items():
        print(f"refused {cell}: {reason}")
    for cell, reason in wrong.items():
        print(f"WRONG {cell}: {reason}")
    assert not refused, f"{len(refused)} of {run} cells"
    assert not wrong, f"{len(wrong)} of {run} cells"
    assert run >= 300
