"""HDR and wide gamut as sRGB, against scalar computations from the standards' own text."""

import math
from functools import partial

import av
import numpy as np
import pytest

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig
from leanvae.data.samples import read_sample
from leanvae.media.colour import to_srgb
from leanvae.media.errors import MediaError
from leanvae.media.item import Item
from leanvae.media.video import VideoReader

# ITU-R BT.2087-0, and SMPTE EG 432-1 with BT.709.
BT2020_TO_BT709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
P3_TO_BT709 = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]
PATCHES = [(nits,) * 3 for nits in (0, 1, 100, 203, 1000, 4000)] + [(203, 100, 50), (1000, 20, 20), (20, 300, 700)]


def pq_code(nits):
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def nits_of(code):
    power = code ** (1 / 78.84375)
    return 10000 * (max(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def tone_mapped(nits):
    """BT.2390-11, section 5.4.1, from 0 to 1,000 nits to 0 to 203."""
    e1 = min(1.0, pq_code(nits) / pq_code(1000))
    max_lum = pq_code(203) / pq_code(1000)
    ks = 1.5 * max_lum - 0.5
    if e1 >= ks:
        t = (e1 - ks) / (1 - ks)
        p = (2 * t**3 - 3 * t**2 + 1) * ks + (t**3 - 2 * t**2 + t) * (1 - ks) + (-2 * t**3 + 3 * t**2) * max_lum
        e1 = p
    return nits_of(e1 * pq_code(1000))


def srgb(light):
    light = min(1.0, max(0.0, light))
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


def linear(code):
    return code / 12.92 if code <= 0.04045 else ((code + 0.055) / 1.055) ** 2.4


def hlg_codes(nits):
    """The code of each of R, G, B that a display of 1,000 nits shows as these nits (BT.2100, table 5)."""
    display = 0.2627 * nits[0] + 0.6780 * nits[1] + 0.0593 * nits[2]
    scene = [n / 1000 * (display / 1000) ** ((1 - 1.2) / 1.2) if display else 0.0 for n in nits]
    return [math.sqrt(3 * e) if e <= 1 / 12 else 0.17883277 * math.log(12 * e - 0.28466892) + 0.55991073 for e in scene]


def expected(nits):
    return [srgb(sum(m * tone_mapped(n) / 203 for m, n in zip(row, nits, strict=True))) for row in BT2020_TO_BT709]


@pytest.mark.parametrize("nits", PATCHES)
def test_hdr_is_mapped_by_the_stated_curve(nits):
    codes = np.uint16(np.round(65535 * np.array([[[pq_code(n) for n in nits]]])))
    assert np.abs(to_srgb(codes, 65535, 16, 9)[0, 0] - np.array(expected(nits))).max() <= 1
    if max(hlg_codes(nits)) <= 1:
        codes = np.uint16(np.round(65535 * np.array([[hlg_codes(nits)]])))
        assert np.abs(to_srgb(codes, 65535, 18, 9)[0, 0] - np.array(expected(nits))).max() <= 1


def test_reference_white_is_light_and_dark_parts_are_kept():
    grey = [round(expected((nits,) * 3)[0]) for nits in (0, 100, 203, 1000)]
    assert grey == [0, 186, 229, 255]
    assert srgb(50 / 203) == pytest.approx(expected((50, 50, 50))[0], abs=0.1)


def write_patches(path, codes, transfer, primaries, matrix=9):
    """Write full-range R'G'B' codes from 0 to 1, a column of 16 pixels each, as limited 10-bit YUV, lossless."""
    red, blue = {9: (0.2627, 0.0593), 1: (0.2126, 0.0722)}[matrix]
    r, g, b = np.array(codes).T
    luma = red * r + (1 - red - blue) * g + blue * b
    planes = [64 + 876 * luma, 512 + 896 * (b - luma) / (2 - 2 * blue), 512 + 896 * (r - luma) / (2 - 2 * red)]
    width = 16 * len(codes)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, 32, "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = matrix, primaries, transfer
        context.color_range = 1
        for index in range(6):
            frame = av.VideoFrame(width, 32, "yuv444p10le")
            for plane, values in zip(frame.planes, planes, strict=True):
                data = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                data[:, :width] = np.repeat(np.round(values), 16)
                plane.update(data.tobytes())
            frame.pts, frame.color_range = index, 1
            frame.colorspace, frame.color_primaries, frame.color_trc = matrix, primaries, transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize("primaries", [9, 2])
def test_hdr_files_are_tone_mapped_and_say_so(tmp_path, transfer, primaries):
    nits = [patch for patch in PATCHES if max(hlg_codes(patch)) <= 1]
    codes = [[pq_code(n) for n in patch] if transfer == 16 else hlg_codes(patch) for patch in nits]
    write_patches(tmp_path / "hdr.mkv", codes, transfer, primaries)
    with VideoReader(str(tmp_path / "hdr.mkv")) as reader:
        frames = list(reader.frames())
        assert reader.info.is_hdr
        assert any(note.startswith("HDR, ") and "BT.2390" in note for note in reader.info.notes)
    wanted = np.array([expected(patch) for patch in nits])
    # A 10-bit code is up to three levels wide, most of all in saturated dark colours.
    assert np.abs(frames[3].image[8, 8::16] - wanted).max() <= 3
    greys = [index for index, patch in enumerate(nits) if len(set(patch)) == 1]
    assert np.abs(frames[3].image[8, 8::16] - wanted)[greys].max() <= 1


def test_hdr_is_refused_where_the_configuration_says_so(tmp_path):
    write_patches(tmp_path / "hdr.mkv", [(0.5, 0.5, 0.5)] * 2, 16, 9)
    item, shape = Item(str(tmp_path / "hdr.mkv"), "clip"), Shape(5, 32, 32)
    read = partial(read_sample, item, bucket=shape, seed=None)
    (sample,) = read(config=ClipDataConfig(sources=("x",), num_frames=5))
    assert np.abs(sample.frames.astype(int) - round(expected((nits_of(0.5),) * 3)[0])).max() <= 1
    with pytest.raises(MediaError, match=r"HDR \(PQ .*, which data\.hdr refuses"):
        list(read(config=ClipDataConfig(sources=("x",), num_frames=5, hdr="refuse")))


@pytest.mark.parametrize(("primaries", "matrix"), [(9, BT2020_TO_BT709), (12, P3_TO_BT709), (11, P3_TO_BT709)])
def test_wide_primaries_are_converted(tmp_path, primaries, matrix):
    codes = [(0.5, 0.5, 0.5), (1, 1, 1), (0.6, 0.4, 0.3), (0.2, 0.5, 0.4)]
    write_patches(tmp_path / "wide.mkv", codes, 1, primaries)
    with VideoReader(str(tmp_path / "wide.mkv")) as reader:
        image = next(reader.frames()).image
        assert any("primaries are converted to BT.709" in note for note in reader.info.notes)
    wanted = [[srgb(sum(m * linear(c) for m, c in zip(row, code, strict=True))) for row in matrix] for code in codes]
    assert np.abs(image[8, 8::16] - np.array(wanted)).max() <= 1


@pytest.mark.parametrize(
    ("transfer", "primaries", "message"), [(8, 1, "linear transfer"), (10, 1, "logarithmic"), (1, 10, "CIE XYZ")]
)
def test_colours_that_cannot_be_converted_are_refused(tmp_path, transfer, primaries, message):
    write_patches(tmp_path / "odd.mkv", [(0.5, 0.5, 0.5)] * 2, transfer, primaries)
    with VideoReader(str(tmp_path / "odd.mkv")) as reader, pytest.raises(MediaError, match=message):
        next(reader.frames())
