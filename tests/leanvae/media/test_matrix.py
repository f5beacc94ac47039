"""What is read of videos made on the fly equals the arrays that went in, over containers, codecs and what they say."""

import itertools
import time
from collections import Counter
from fractions import Fraction

import av
import cv2
import numpy as np

from leanvae.media.errors import MediaError
from leanvae.media.video import VideoReader

COUNT, SIZE = 16, 64
CODECS = {  # pixel format, options, whether it keeps RGB exactly
    "ffv1": ("bgr0", {}, True),
    "libx264rgb": ("rgb24", {"qp": "0", "g": "6", "bf": "2"}, True),
    "libx264": ("yuv444p", {"crf": "4", "g": "6", "bf": "2", "preset": "veryfast"}, False),
    "mpeg4": ("yuv420p", {"q": "2", "g": "6", "flags": "+qscale", "global_quality": "236"}, False),
    "mpeg2video": ("yuv422p", {"g": "6", "flags": "+qscale", "global_quality": "236"}, False),
    "libvpx-vp9": ("yuv444p", {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8", "g": "6"}, False),
    "mjpeg": ("yuv444p", {"flags": "+qscale", "global_quality": "118"}, False),
}
CONTAINERS = {
    "mp4": ("libx264", "libx264rgb", "mpeg4", "libvpx-vp9"),
    "mov": ("libx264", "libx264rgb", "mpeg4", "mjpeg"),
    "mkv": ("ffv1", "libx264", "libx264rgb", "mpeg4", "mpeg2video", "libvpx-vp9"),
    "webm": ("libvpx-vp9",),
    "avi": ("ffv1", "mpeg4"),
    "ts": ("libx264", "mpeg2video"),
    "flv": ("libx264",),
    "nut": ("ffv1",),
}
ROTATIONS, ASPECTS, FULL, RATES = (0, 90, 180, 270), (Fraction(1), Fraction(4, 3)), (False, True), {
    "constant": list(range(COUNT)),
    "variable": np.cumsum([0, *([1, 3, 2, 1, 1] * 3)]).tolist(),
    "late": list(range(5, 5 + COUNT)),
}  # fmt: skip
TICK = Fraction(1, 25)


def why_not(container, codec, rotation, aspect, full, rate):
    """Say why a cell cannot be written; None if it can."""
    if rotation and container not in ("mp4", "mov", "mkv"):
        return "the container holds no display matrix"
    if aspect != 1 and codec in ("ffv1", "libvpx-vp9") and container != "mp4":
        return "PyAV leaves the shape of pixels to the codec, which has no place for it"
    if full and (CODECS[codec][2] or codec in ("mpeg4", "mpeg2video")):
        return "the codec has one range"
    if rate != "constant" and (container == "avi" or codec == "mpeg2video"):
        return "the format has one rate"
    return None


def scene():
    """Smooth frames that differ by 10 levels from each other, and by their sides."""
    across, down = np.meshgrid(np.linspace(0, 40, SIZE), np.linspace(0, 30, SIZE))
    ramp = np.stack([across, down, 40 - across], -1)
    return [(ramp + 10 * index + 20).astype(np.uint8) for index in range(COUNT)]


def write(path, images, codec, rotation, aspect, full, pts):
    pix_fmt, options, _ = CODECS[codec]
    pix_fmt = {"yuv444p": "yuvj444p"}.get(pix_fmt, pix_fmt) if codec == "mjpeg" and full else pix_fmt
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pix_fmt
        stream.time_base = stream.codec_context.time_base = TICK
        context = stream.codec_context
        context.sample_aspect_ratio = aspect
        if pix_fmt.startswith("yuv"):
            context.colorspace, context.color_range = 5, 2 if full else 1
            if codec == "mjpeg" and not full:
                context.options = {**options, "strict": "unofficial"}
        if rotation:
            stream.set_display_rotation(degrees=-rotation)
        for image, stamp in zip(images, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(
                format=pix_fmt,
                dst_colorspace=5,
                src_color_range=2,
                dst_color_range=2 if full else 1,
                interpolation=0x40004,
            )
            frame.pts, frame.time_base = stamp, TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shown(image, rotation, aspect):
    """What a player shows of an image."""
    image = np.rot90(image, -rotation // 90)
    if aspect != 1:
        long = round(SIZE * aspect)
        size = (SIZE, long) if rotation in (90, 270) else (long, SIZE)
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)
    return image


def differences(path, expected, seconds, exact):
    """Compare decoding whole, by window, by rate and by part with what went in; say where they differ."""
    with VideoReader(str(path)) as reader:
        whole = list(reader.frames())
        start = whole[0].time
        points = start + 0.05 + np.arange(5) / 10
        found = {
            "whole": (whole, range(COUNT)),
            "window": (reader.window(start + seconds[7] - 0.01, 4, stride=2), range(7, 14, 2)),
            "rate": (
                reader.window(points[0], 5, fps=10),
                [
                    int(np.argmin(np.abs(seconds + start - point) - 1e-6 * (seconds + start < point)))
                    for point in points
                ],
            ),
            "part": (list(reader.frames(start + seconds[3], start + seconds[9])), range(3, 9)),
        }
    for name, (frames, indices) in found.items():
        if len(frames) != len(indices):
            yield f"{name}: {len(frames)} frames, not {len(indices)}"
            continue
        for frame, index in zip(frames, indices, strict=True):
            if abs(frame.time - start - seconds[index]) > 0.0015:
                yield f"{name}: {frame.time} s, not {start + seconds[index]}"
            elif frame.image.shape != expected[index].shape:
                yield f"{name}: {frame.image.shape}, not {expected[index].shape}"
            else:
                error = (frame.image.astype(float) - expected[index]) ** 2
                if error.max() > 0 if exact else error.mean() > 255**2 / 10**3.4:
                    yield f"{name}: frame {index} differs by {error.mean() ** 0.5:.2f} levels"


def test_every_cell_gives_what_went_in(tmp_path):
    images, began = scene(), time.process_time()
    run, refused, skipped, wrong = 0, {}, Counter(), {}
    for container, codecs in CONTAINERS.items():
        for cell in itertools.product(codecs, ROTATIONS, ASPECTS, FULL, RATES):
            codec, rotation, aspect, full, rate = cell
            if reason := why_not(container, codec, rotation, aspect, full, rate):
                skipped[reason] += 1
                continue
            path = tmp_path / f"clip.{container}"
            write(path, images, codec, rotation, aspect, full, RATES[rate])
            seconds = (np.array(RATES[rate]) - RATES[rate][0]) * float(TICK)
            expected = [shown(image, rotation, aspect) for image in images]
            run += 1
            try:
                if found := list(differences(path, expected, seconds, CODECS[codec][2])):
                    wrong[container, *cell] = found[0]
            except MediaError as error:
                refused[container, *cell] = error.reason
    print(
        f"{run} cells in {time.process_time() - began:.0f} s, {len(refused)} refused, {sum(skipped.values())} skipped:"
    )
    for reason, count in skipped.items():
        print(f"  {count} skipped: {reason}")
    for name, reason in {**refused, **wrong}.items():
        print(f"  {' '.join(map(str, name))}: {reason}")
    assert not refused
    assert not wrong
    assert run >= 300
