"""H.264 as a baseline: frames to a file and back, through x264."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from leanvae.media.video import VideoReader

_RATE = Fraction(25)  # guides x264's rate control only


def encode_h264(path: Path, images: Iterable[NDArray[np.uint8]], crf: int) -> tuple[int, int]:
    """Encodes frames in yuv420p with x264's preset `medium`; odd sides are made even by repeating the last line.

    Args:
        path: the mp4 file to write.
        images: `(H, W, 3)` full-range RGB, all of one size.
        crf: constant rate factor, 0 to 51.

    Returns:
        (height, width) of the frames.
    """
    size = None
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": str(crf), "preset": "medium"})
        stream.pix_fmt = "yuv420p"
        for image in images:
            even = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            if size is None:
                size = image.shape[:2]
                stream.height, stream.width = even.shape[:2]
                stream.codec_context.colorspace = Colorspace.ITU709
                stream.codec_context.color_range = ColorRange.MPEG
            frame = VideoFrame.from_ndarray(even, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert size is not None, "there is at least one frame"
    return size[0], size[1]


def decode_h264(path: Path, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Decodes what `encode_h264` wrote, cropped to (height, width)."""
    with VideoReader(str(path)) as reader:
        for frame in reader.frames():
            yield frame.image[: size[0], : size[1]]
