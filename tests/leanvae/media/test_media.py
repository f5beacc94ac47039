"""Videos and images come out upright, in full-range RGB by their own tags, or are refused with the reason."""

import io
import struct
import zlib
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from leanvae.media.video import MediaError, decode_image, iter_frames, probe, read_image

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
            context.colorspace = context.color_primaries = matrix
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


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, name):
    write_planes(tmp_path / "hdr.mp4", patches(64, 64), matrix=9, transfer=transfer, pix_fmt="yuv420p10le")
    assert probe(tmp_path / "hdr.mp4").is_hdr
    with pytest.raises(MediaError, match=f"HDR \\({name}"):
        next(iter_frames(tmp_path / "hdr.mp4"))


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


def test_iter_frames_keeps_variable_timestamps(tmp_path):
    pts = [0, 1, 2, 5, 9, 10]
    write_video(tmp_path / "vfr.mp4", numbered(6), pts=pts)
    info = probe(tmp_path / "vfr.mp4")
    frames = list(iter_frames(tmp_path / "vfr.mp4"))
    assert np.allclose([frame.time for frame in frames], np.array(pts) / 30)
    assert np.allclose([float(frame.pts * info.time_base) for frame in frames], np.array(pts) / 30)
    assert info.num_frames == 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_iter_frames_starts_at_the_asked_time(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    write_video(path, numbered(40))
    whole = list(iter_frames(path))
    part = list(iter_frames(path, start=whole[25].time))
    assert [frame.pts for frame in part] == [frame.pts for frame in whole[25:]]
    assert np.array_equal(part[0].image, whole[25].image)


def test_iter_frames_says_after_how_many_frames_a_cut_file_ends(tmp_path):
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(30)]
    write_video(tmp_path / "whole.mp4", noise, options={"movflags": "faststart"})
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    frames = iter_frames(tmp_path / "cut.mp4", threads=1)
    with pytest.raises(MediaError, match=r"cut\.mp4: truncated.*after \d+ frames"):
        list(frames)


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


def png_data(png: bytes) -> bytes:
    """The compressed data of a PNG."""
    chunks, position = b"", 8
    while position < len(png):
        (size,) = struct.unpack_from(">I", png, position)
        if png[position + 4 : position + 8] == b"IDAT":
            chunks += png[position + 8 : position + 8 + size]
        position += 12 + size
    return chunks


def with_data(png: bytes, data: bytes) -> bytes:
    """A PNG with other compressed data, in one chunk with a correct checksum."""
    chunk = b"IDAT" + data
    return png[:33] + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[-12:]


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Inserts an EXIF segment with tag 0x0112 behind the start of a JPEG."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]


def test_images_are_turned_by_exif_and_read_by_content(tmp_path):
    jpeg = cv2.imencode(".jpg", corners()[..., ::-1])[1].tobytes()
    (tmp_path / "photo.png").write_bytes(with_orientation(jpeg, 6))
    image = read_image(tmp_path / "photo.png")
    assert image.shape == (64, 48, 3)
    assert corner_colours(image) == ["blue", "red", "white", "green"]


def test_images_of_other_depths_and_channels_become_rgb(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    cv2.imwrite(str(tmp_path / "grey.png"), ramp)
    cv2.imwrite(str(tmp_path / "deep.png"), np.repeat(ramp[..., None], 3, 2).astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "opaque.png"), np.dstack([ramp, ramp, ramp, np.full_like(ramp, 255)]))
    for name in ("grey", "deep", "opaque"):
        image = read_image(tmp_path / f"{name}.png")
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.repeat(ramp[..., None], 3, axis=2))


@pytest.mark.parametrize(("suffix", "depth"), [(".png", np.uint8), (".png", np.uint16), (".webp", np.uint8)])
def test_transparent_images_are_laid_over_white(depth, suffix):
    alpha = np.repeat(np.array([[0, 51, 204, 255]]), 4, axis=0)
    colour = np.broadcast_to([10, 110, 210], (4, 4, 3))
    scale = np.iinfo(depth).max // 255
    bgra = np.dstack([colour[..., ::-1], alpha]) * scale
    data = cv2.imencode(suffix, bgra.astype(depth), [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else [])[1]
    expected = np.rint((colour * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255)
    assert np.array_equal(decode_image(data.tobytes(), "photo"), expected)


def test_transparent_palettes_and_grey_are_laid_over_white():
    image_module = pytest.importorskip("PIL.Image")
    rgba = image_module.fromarray(np.dstack([corners(), np.where(corners()[..., :1] > 0, 255, 0)]).astype(np.uint8))
    expected = np.where(corners()[..., :1] > 0, corners(), 255)
    assert np.array_equal(decode_image(encoded(rgba.quantize(8), "PNG"), "palette"), expected)
    grey = np.asarray(rgba.convert("RGB").convert("L"))
    expected = np.where(corners()[..., 0] > 0, grey, 255)
    assert np.array_equal(decode_image(encoded(rgba.convert("LA"), "PNG"), "grey")[..., 0], expected)


def encoded(image, file_format, **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_other_formats_are_turned_by_exif_transparent_or_not(file_format, orientation):
    image_module = pytest.importorskip("PIL.Image")
    ops_module = pytest.importorskip("PIL.ImageOps")
    exif = image_module.Exif()
    exif[0x010E] = "an entry before"
    exif[0x0112] = orientation
    almost = np.full((30, 40), 255, np.uint8)
    almost[0, 0] = 254
    for pixels in (corners(30, 40), np.dstack([corners(30, 40), almost])):
        image = image_module.fromarray(pixels)
        seen = decode_image(encoded(image, file_format, lossless=True, exif=exif), "photo")
        image.getexif()[0x0112] = orientation
        expected = np.asarray(ops_module.exif_transpose(image).convert("RGB"))
        assert seen.shape == expected.shape
        assert np.abs(seen.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("exif", [b"", b"MM", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff\xff\xff"])
def test_broken_exif_of_transparent_images_turns_nothing(exif):
    rgba = np.dstack([corners(), np.full((48, 64), 200, np.uint8)])
    png = cv2.imencode(".png", rgba)[1].tobytes()
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    png = png[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + png[33:]
    assert decode_image(png, "photo").shape == (48, 64, 3)


def test_cmyk_becomes_the_rgb_that_pillow_makes_of_it():
    image_module = pytest.importorskip("PIL.Image")
    data = encoded(image_module.fromarray(corners()).convert("CMYK"), "JPEG", quality=95)
    reference = np.asarray(image_module.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_image(data, "photo").astype(int) - reference).mean() < 1
    assert corner_colours(decode_image(data, "photo")) == ["red", "green", "blue", "white"]


def test_broken_images_are_refused_with_their_reason(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    jpeg = with_orientation(cv2.imencode(".jpg", noise)[1].tobytes(), 1)
    progressive = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    png = cv2.imencode(".png", noise)[1].tobytes()
    transparent = cv2.imencode(".png", np.dstack([noise, noise[..., :1]]))[1].tobytes()
    webp = cv2.imencode(".webp", noise)[1].tobytes()
    contents = {
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half_progressive.jpg": (progressive[: len(progressive) // 2], "truncated"),
        "no_end.jpg": (jpeg[:-2], "truncated"),
        "half.png": (png[: len(png) // 2], "no image"),
        "no_end.png": (png[:-12], "no image"),
        "short.png": (with_data(png, zlib.compress(zlib.decompress(png_data(png))[:-100])), "no image"),
        "bad_sum.png": (png[:5000] + bytes([png[5000] ^ 1]) + png[5001:], "no image"),
        "half_alpha.png": (transparent[: len(transparent) // 2], "no image"),
        "half.webp": (webp[: len(webp) - 10], "no image"),
        "text.png": (b"not an image " * 100, "no image"),
        "empty.jpg": (b"", "empty file"),
    }
    for name, (data, reason) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=f"{name}: {reason}"):
            read_image(tmp_path / name)
    (tmp_path / "whole.jpg").write_bytes(progressive + b"trailing data")
    assert read_image(tmp_path / "whole.jpg").shape == (64, 64, 3)


@needs_shared
def test_shared_videos_open_at_the_size_that_the_manifest_displays():
    import csv

    for row in csv.DictReader((SHARED / "MANIFEST.csv").read_text().splitlines()):
        if row["kind"] == "video":
            info = probe(SHARED / row["file"])
            size = (int(row["width"]), int(row["height"]))
            assert (info.width, info.height) in (size, size[::-1]), row["file"]
            assert (info.rotation in (90, 270)) == ((info.width, info.height) != size), row["file"]


@needs_shared
def test_shared_images_are_read_and_broken_ones_refused():
    for path in sorted((SHARED / "dev" / "images").iterdir()):
        assert read_image(path).ndim == 3, path
    readable = {"jpeg_named.mp4", "png_named.jpg"}
    for path in sorted((SHARED / "bad").iterdir()):
        if path.name in readable:
            assert read_image(path).ndim == 3
        else:
            with pytest.raises(MediaError, match=path.name):
                read_image(path)
