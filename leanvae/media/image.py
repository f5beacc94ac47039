"""Reading of images through Pillow: upright 8-bit sRGB, opaque; free of torch."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvae.media.errors import MediaError
from leanvae.media.item import Item, read_item
from litevae.errors import extra

with extra("video"):
    from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

ANIMATION_SUFFIX = ".webp"  # of clips as well as images, by their content
_MOST_PIXELS = 2**30
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
_END_OF_JPEG = b"\xff\xd9"
_PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ROUNDING = 2  # levels; a profile that changes no colour by more is sRGB
_opening = threading.Lock()


def read_image(source: Item | str | Path | bytes) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3) uint8 sRGB, by its content whatever its name says.

    EXIF rotation is applied and ICC profiles are converted to sRGB. Grey becomes RGB, 16 bits become 8, CMYK becomes
    RGB. Transparent images are laid over white: what stands under transparent pixels is arbitrary. Of an animation,
    this is the first frame.

    Args:
        source: an item, a file, or the bytes of one.

    Raises:
        MediaError: no such file, not an image, damaged, cut, or with values whose range is not known.
        OSError: a remote file cannot be read.
    """
    if isinstance(source, bytes):
        name, data = "image", source
    else:
        item = source if isinstance(source, Item) else Item(str(source), "image")
        name, data = item.name, read_item(item)
    if not data:
        raise MediaError(name, "empty file")
    with _tolerant_pillow():
        return np.array(_to_rgb(name, _turned(_load(name, data))))


def is_animation(header: bytes) -> bool:
    """Tell whether the first 21 bytes of a file are those of an animated WebP."""
    return len(header) > 20 and header[:4] == b"RIFF" and header[8:16] == b"WEBPVP8X" and bool(header[20] & 2)


def open_animation(name: str, data: bytes) -> tuple[list[float], Callable[[int], NDArray[np.uint8]]]:
    """Open an animated WebP, which FFmpeg does not decode.

    Returns:
        The seconds that each frame stands, and what reads the frame of an index as `read_image` does.

    Raises:
        MediaError: not an animated WebP, or cut.
    """
    if not is_animation(data[:21]):
        raise MediaError(name, "a still image, not a video")
    durations, place, end = [], 12, 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise MediaError(name, f"truncated: the last {end - len(data):,} bytes are missing")
    while place + 8 <= end:  # the chunks of RIFF
        if data[place : place + 4] == b"ANMF":
            durations.append(max(1, int.from_bytes(data[place + 20 : place + 23], "little")) / 1000)
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    with _tolerant_pillow():
        image = _load(name, data)

    def read(index: int) -> NDArray[np.uint8]:
        try:
            with _tolerant_pillow():
                image.seek(index)
                return np.array(_to_rgb(name, image.copy()))
        except (OSError, EOFError, ValueError) as error:
            raise MediaError(name, f"cannot be decoded: {error}") from error

    return durations, read


@contextmanager
def _tolerant_pillow() -> Iterator[None]:
    """Keep Pillow from warning about what it repairs, such as EXIF data that are wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load(name: str, data: bytes) -> Image.Image:
    """Decode the pixels; whatever Pillow raises is the file's fault."""
    try:
        image = _open(data)
        if image.width * image.height > _MOST_PIXELS:
            raise MediaError(name, f"{image.width}x{image.height} pixels, more than {_MOST_PIXELS}")
        if isinstance(image, PngImagePlugin.PngImageFile):
            _open(data).verify()  # checksums, which decoding passes over
        # Pillow stops reading the header where the pixels begin.
        if image.format == "JPEG" and image.fp and data.find(_END_OF_JPEG, image.fp.tell()) < 0:
            raise MediaError(name, "truncated: the JPEG data end before the end-of-image marker")
        image.load()
        return image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        missing = missing_plugin(_plugin_suffix(data))
        reason = f"its format needs a package: pip install {missing}" if missing else "not an image that can be decoded"
        raise MediaError(name, reason) from error
    except Exception as error:
        cut = "truncated" in str(error).lower()
        raise MediaError(name, "truncated: the data end early" if cut else f"cannot be decoded: {error}") from error


def missing_plugin(suffix: str) -> str | None:
    """Name the package that images of an ending need and that is not installed; None if there is none."""
    package = _PLUGINS.get(suffix)
    return package if package and not _has_plugin(package) else None


@lru_cache
def _has_plugin(package: str) -> bool:
    """Register a plugin with Pillow, if it is installed."""
    try:
        if package == "pillow-heif":
            import_module("pillow_heif").register_heif_opener()
        else:
            import_module("pillow_jxl")  # registers itself
    except ImportError:
        return False
    return True


def _plugin_suffix(data: bytes) -> str:
    """Find the ending of the plugin's format as which data begin; empty if there is none."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return ".heic"
    return ".jxl" if data[:2] == b"\xff\x0a" or data[4:12] == b"JXL \r\n\x87\n" else ""


def _open(data: bytes) -> ImageFile.ImageFile:
    missing_plugin(_plugin_suffix(data))
    with _opening:  # Pillow's own limit is one for the whole process, and lies below what phones take
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _turned(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of broken EXIF data, which say nothing
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    """Convert any mode to opaque 8-bit sRGB."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(name, image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode in ("1", "P", "HSV", "YCbCr"):
        image = image.convert("RGB")
    rgb = _to_srgb(name, image)
    return rgb if alpha is None else _over_white(rgb, alpha)


def _to_8_bits(name: str, image: Image.Image) -> Image.Image:
    """Bring grey levels of up to 16 bits to 8.

    Raises:
        MediaError: other numbers, whose black and white are not known.
    """
    tags = getattr(image, "tag_v2", {})
    # Pillow brings all deep portable grey maps to 16 bits.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit numbers"
        raise MediaError(name, f"pixels are {kind}, whose range is not known; save them with 8 or 16 bits")
    peak = 2 ** min(16, int(tags.get(_BITS_PER_SAMPLE, (16,))[0])) - 1
    values = np.asarray(image).astype(np.uint32)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = peak - values
    grey = Image.fromarray(((values * 255 + peak // 2) // peak).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return grey


def _to_srgb(name: str, image: Image.Image) -> Image.Image:
    """Convert by the image's own ICC profile; without one, pixels are taken as sRGB."""
    profile = image.info.get("icc_profile")
    rgb = image if image.mode == "RGBA" else None
    if rgb is not None:
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        return ImageCms.applyTransform(image, transform) or image
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, _SRGB, outputMode="RGB") or image
    return image.convert("RGB")


_SRGB = ImageCms.createProfile("sRGB")


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build what brings a mode to sRGB; None if that changes nothing, or the profile is not one for the mode."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            _SRGB,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode not in ("L", "RGB"):
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    colours = Image.fromarray(probe if mode == "RGB" else probe[..., 0])
    seen = np.asarray(ImageCms.applyTransform(colours, transform), np.int16)
    return None if np.abs(seen - np.asarray(colours.convert("RGB"))).max() <= _ROUNDING else transform


def _over_white(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.fromarray(lay_over_white(np.asarray(rgb), np.asarray(alpha)))


def lay_over_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay pixels (H, W, 3) with opacities (H, W) over white."""
    opacity = alpha[..., None].astype(np.uint32)
    return ((rgb * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
