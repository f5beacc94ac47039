"""Conversion of decoded video frames to pictures: upright, opaque, square-pixel, full-range RGB; free of torch."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from leanvae.media.errors import MediaError
from leanvae.media.image import lay_over_white
from litevae.errors import extra

with extra("video"):
    import av
    import cv2
    from av.filter import Graph
    from av.video.frame import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

# ITU-T H.273 code points, as FFmpeg reports them.
MATRIX_UNSPECIFIED = 2
HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
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
_SQUARE_ENOUGH = 0.005  # encoders round sizes, and state the rounding as the pixels' shape
_LARGEST_ASPECT = 16


def has_alpha(frame: VideoFrame) -> bool:
    """Tell whether a frame can be transparent."""
    return any(component.is_alpha for component in frame.format.components)


def frame_to_rgb(name: str, frame: VideoFrame) -> NDArray[np.uint8]:
    """Convert a decoded frame to (H, W, 3) uint8 full-range RGB, upright, by its own matrix and range.

    Untagged frames are taken as BT.601 below 720 coded lines and BT.709 from there; an untagged range as limited,
    unless the pixel format says otherwise. Transparent parts are laid over white.

    Args:
        name: what errors call the file.

    Raises:
        MediaError: PQ or HLG transfer, or a colour matrix that cannot be converted.
    """
    refuse_hdr(name, frame.color_trc)
    if frame.format.is_rgb or len(frame.format.components) < 3:
        matrix = None
    elif frame.colorspace == MATRIX_UNSPECIFIED:
        matrix = Colorspace.ITU601 if frame.height < 720 else Colorspace.ITU709
    elif frame.colorspace in _MATRICES:
        matrix = _MATRICES[frame.colorspace]
    else:
        raise MediaError(name, f"the colour matrix with H.273 code {frame.colorspace} is not supported")
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    transparent = has_alpha(frame)
    pixels = frame.to_ndarray(
        format="rgba" if transparent else "rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=_INTERPOLATION,
        threads=1,
    )
    image = np.asarray(pixels, np.uint8)
    if transparent:
        image = lay_over_white(image[..., :3], image[..., 3])
    return _turn(image, *orientation(frame))


def refuse_hdr(name: str, transfer: int) -> None:
    """Raise MediaError for the transfer functions PQ and HLG, whose values would be misread as SDR."""
    if transfer in HDR_TRANSFERS:
        raise MediaError(name, f"HDR ({HDR_TRANSFERS[transfer]}) is not supported; convert it to SDR first")


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
