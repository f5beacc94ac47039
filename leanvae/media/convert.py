"""Conversion of decoded video frames to pictures: upright, opaque, square-pixel, full-range RGB; free of torch."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from leanvae.media.boxes import Aperture
from leanvae.media.colour import HDR_TRANSFERS, WIDE_PRIMARIES, to_srgb
from leanvae.media.errors import MediaError
from leanvae.media.image import lay_over_white
from leanvae.media.item import Hdr
from litevae.errors import extra

with extra("video"):
    import av
    import cv2
    from av.filter import Graph
    from av.video.frame import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

# ITU-T H.273 code points, as FFmpeg reports them.
MATRIX_UNSPECIFIED = 2
_OTHER_TRANSFERS = {8: "linear", 9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428-1"}
_XYZ_PRIMARIES = 10
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
# Without these flags swscale is off by 1.0 to 1.9 levels on average instead of 0.2, and repeats chroma.
_INTERPOLATION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_FORMATS = {  # by whether more than 8 bits and opacities are needed
    (False, False): "rgb24",
    (False, True): "rgba",
    (True, False): "rgb48le",
    (True, True): "rgba64le",
}
_SQUARE_ENOUGH = 0.005  # encoders round sizes, and state the rounding as the pixels' shape
_LARGEST_ASPECT = 16


def has_alpha(frame: VideoFrame) -> bool:
    """Tell whether a frame can be transparent."""
    return any(component.is_alpha for component in frame.format.components)


def frame_to_rgb(
    name: str, frame: VideoFrame, hdr: Hdr = "tonemap", aperture: Aperture | None = None
) -> NDArray[np.uint8]:
    """Convert a decoded frame to (H, W, 3) uint8 sRGB, upright, by its own matrix, range, transfer and primaries.

    Untagged frames are taken as BT.601 below 720 coded lines and BT.709 from there; an untagged range as limited,
    unless the pixel format says otherwise. HDR is tone-mapped by the rule of `leanvae.media.colour`. Transparent parts
    are laid over white.

    Args:
        name: what errors call the file.
        hdr: what happens to PQ and HLG.
        aperture: the part of the frame that is shown; None means all.

    Raises:
        MediaError: HDR that is to be refused, or a colour matrix, transfer or primaries that cannot be converted.
    """
    check_colours(name, frame.color_trc, frame.color_primaries, hdr)
    is_hdr = frame.color_trc in HDR_TRANSFERS
    if frame.format.is_rgb or len(frame.format.components) < 3:
        matrix = None
    elif frame.colorspace == MATRIX_UNSPECIFIED:
        matrix = Colorspace.BT2020 if is_hdr else Colorspace.ITU601 if frame.height < 720 else Colorspace.ITU709
    elif frame.colorspace in _MATRICES:
        matrix = _MATRICES[frame.colorspace]
    else:
        raise MediaError(name, f"the colour matrix with H.273 code {frame.colorspace} is not supported")
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    transparent = has_alpha(frame)
    is_converted = is_hdr or frame.color_primaries in WIDE_PRIMARIES
    pixels = frame.to_ndarray(
        format=_FORMATS[is_converted, transparent],
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_INTERPOLATION,
        threads=1,
    )
    if is_converted:
        # swscale shifts up instead of scaling, and converts limited range as if to 8 bits.
        bits = max(component.bits for component in frame.format.components) if full else 8
        white = (2**bits - 1) << (16 - bits)
        image = to_srgb(np.asarray(pixels[..., :3], np.uint16), white, frame.color_trc, frame.color_primaries)
    else:
        image = np.asarray(pixels[..., :3], np.uint8)
    if transparent:
        alpha = np.asarray(pixels[..., 3], np.uint16)
        image = lay_over_white(image, (alpha >> (8 if is_converted else 0)).astype(np.uint8))
    shown = aperture and aperture.place_in(frame.width, frame.height)
    return _turn(image[shown] if shown else image, *orientation(frame))


def check_colours(name: str, transfer: int, primaries: int, hdr: Hdr = "tonemap") -> None:
    """Raise MediaError for colours that cannot be converted, and for HDR that is to be refused."""
    if transfer in HDR_TRANSFERS and hdr == "refuse":
        raise MediaError(name, f"HDR ({HDR_TRANSFERS[transfer]}), which data.hdr refuses")
    if transfer in _OTHER_TRANSFERS:
        raise MediaError(name, f"the {_OTHER_TRANSFERS[transfer]} transfer function is not supported; convert it first")
    if primaries == _XYZ_PRIMARIES:
        raise MediaError(name, "its colours are CIE XYZ, which is not supported; convert it first")


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Read a display matrix as (transpose, then flip x, then flip y); angles go to the nearest right one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y with the matrix stored as a b u c d v x y w (ISO/IEC 14496-12).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _turn(image: NDArray[np.uint8], transpose: bool, flip_x: bool, flip_y: bool) -> NDArray[np.uint8]:
    if transpose:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def square_size(name: str, width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Compute the (width, height) that shows pixels of an aspect as square ones; the short side grows.

    Raises:
        MediaError: the pixels are absurdly long.
    """
    if not aspect or abs(aspect - 1) <= _SQUARE_ENOUGH:
        return width, height
    if not 1 / _LARGEST_ASPECT <= aspect <= _LARGEST_ASPECT:
        raise MediaError(name, f"its pixels are {aspect.numerator}:{aspect.denominator}, which cannot be meant")
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def resample(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Enlarge a picture to (width, height); one of that size is returned as it is."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), np.uint8)


def deinterlace(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Deinterlace frames that consist of two fields by FFmpeg's bwdif, a frame for each; leave others as they are."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _make_graph(frame)
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _make_graph(frame: VideoFrame) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
