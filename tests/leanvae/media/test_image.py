"""Images come out upright, in opaque 8-bit sRGB, or are refused with the reason."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from leanvae.media.errors import MediaError
from leanvae.media.image import read_image

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared images are not beside the checkout")


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
    assert np.array_equal(read_image(data.tobytes()), expected)


def test_transparent_palettes_and_grey_are_laid_over_white():
    rgba = Image.fromarray(np.dstack([corners(), np.where(corners()[..., :1] > 0, 255, 0)]).astype(np.uint8))
    expected = np.where(corners()[..., :1] > 0, corners(), 255)
    assert np.array_equal(read_image(encoded(rgba.quantize(8), "PNG")), expected)
    grey = np.asarray(rgba.convert("RGB").convert("L"))
    expected = np.where(corners()[..., 0] > 0, grey, 255)
    assert np.array_equal(read_image(encoded(rgba.convert("LA"), "PNG"))[..., 0], expected)


def encoded(image, file_format, **options):
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_other_formats_are_turned_by_exif_transparent_or_not(file_format, orientation):
    exif = Image.Exif()
    exif[0x010E] = "an entry before"
    exif[0x0112] = orientation
    almost = np.full((30, 40), 255, np.uint8)
    almost[0, 0] = 254
    for pixels in (corners(30, 40), np.dstack([corners(30, 40), almost])):
        image = Image.fromarray(pixels)
        seen = read_image(encoded(image, file_format, lossless=True, exif=exif))
        image.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert seen.shape == expected.shape
        assert np.abs(seen.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("exif", [b"", b"MM", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff\xff\xff"])
def test_broken_exif_of_transparent_images_turns_nothing(exif):
    rgba = np.dstack([corners(), np.full((48, 64), 200, np.uint8)])
    png = cv2.imencode(".png", rgba)[1].tobytes()
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    png = png[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + png[33:]
    assert read_image(png).shape == (48, 64, 3)


def test_cmyk_becomes_the_rgb_that_pillow_makes_of_it():
    data = encoded(Image.fromarray(corners()).convert("CMYK"), "JPEG", quality=95)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(read_image(data).astype(int) - reference).mean() < 1
    assert corner_colours(read_image(data)) == ["red", "green", "blue", "white"]


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
        "half.png": (png[: len(png) // 2], "truncated"),
        "no_end.png": (png[:-12], "truncated"),
        "short.png": (with_data(png, zlib.compress(zlib.decompress(png_data(png))[:-100])), "truncated"),
        "bad_sum.png": (png[:5000] + bytes([png[5000] ^ 1]) + png[5001:], "cannot be decoded: .* checksum"),
        "half_alpha.png": (transparent[: len(transparent) // 2], "truncated"),
        "half.webp": (webp[: len(webp) - 10], "cannot be decoded"),
        "text.png": (b"not an image " * 100, "not an image"),
        "empty.jpg": (b"", "empty file"),
    }
    for name, (data, reason) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=f"{name}: {reason}"):
            read_image(tmp_path / name)
    (tmp_path / "whole.jpg").write_bytes(progressive + b"trailing data")
    assert read_image(tmp_path / "whole.jpg").shape == (64, 64, 3)
    with pytest.raises(MediaError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("file_format", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_cut_images_are_refused_wherever_they_end(file_format):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    assert read_image(data).shape == (64, 64, 3)
    for length in (len(data) // 10, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(MediaError):
            read_image(data[:length])


def display_p3():
    """An ICC profile with sRGB's curve and the primaries of Display P3, made from that of sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    columns = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    columns |= {b"bXYZ": (0.15710, 0.06657, 0.78407)}  # adapted to D50
    (count,) = struct.unpack_from(">I", profile, 128)
    for number in range(count):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if tag in columns:
            struct.pack_into(">3i", profile, offset + 8, *(round(65536 * value) for value in columns[tag]))
    return bytes(profile)


def from_display_p3(pixels):
    """The sRGB of Display P3 pixels, by the two spaces' definitions alone."""
    primaries = {"srgb": [(0.64, 0.33), (0.3, 0.6), (0.15, 0.06)], "p3": [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)]}
    white = np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
    matrices = {}
    for name, points in primaries.items():
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in points]).T
        matrices[name] = columns * np.linalg.solve(columns, white)
    encoded = pixels / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(matrices["srgb"]) @ matrices["p3"]).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("transparent", [False, True])
def test_icc_profiles_are_converted_to_srgb(file_format, transparent):
    pixels = np.random.default_rng(0).integers(60, 200, (32, 32, 3), np.uint8)
    expected = from_display_p3(pixels)
    image = Image.fromarray(pixels)
    if transparent:
        image.putalpha(51)
        expected = 0.2 * expected + 0.8 * 255
    data = encoded(image, file_format, icc_profile=display_p3(), **{"lossless": True} if file_format == "WEBP" else {})
    assert np.abs(read_image(data) - expected).max() <= 1.5
    assert np.abs(expected - pixels).max() > 10


def test_srgb_and_useless_profiles_change_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        assert np.array_equal(read_image(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile)), pixels)


def test_deep_grey_is_rounded_and_numbers_without_a_range_are_refused(tmp_path):
    deep = (np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)
    expected = np.rint(deep / 257)
    for file_format in ("PNG", "TIFF"):
        assert np.array_equal(read_image(encoded(Image.fromarray(deep), file_format))[..., 0], expected)
    (tmp_path / "deep.pgm").write_bytes(b"P5 64 64 65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "deep.pgm")[..., 0], expected)
    inverted = encoded(Image.fromarray(deep), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read_image(inverted)[..., 0], np.rint((65535 - deep) / 257))
    for pixels in (deep.astype(np.float32), deep.astype(np.int32)):
        with pytest.raises(MediaError, match="whose range is not known; save them with 8 or 16 bits"):
            read_image(encoded(Image.fromarray(pixels), "TIFF"))


def test_large_photographs_are_read_without_a_warning(tmp_path):
    """Phones take 200 megapixels; Pillow alone warns at 90 and refuses at 179."""
    Image.fromarray(np.zeros((12_000, 15_200), bool)).save(tmp_path / "large.png")
    limit = Image.MAX_IMAGE_PIXELS
    assert read_image(tmp_path / "large.png").shape == (12_000, 15_200, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


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
