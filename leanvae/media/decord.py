"""Decoding through decord, for those who ask for it: files on which it is known to agree with PyAV, and no others."""

import numpy as np

from leanvae.media.convert import MATRIX_UNSPECIFIED
from leanvae.media.info import Frame, VideoInfo

_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_EIGHT_BITS = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}


def read_window(
    path: str, info: VideoInfo, first: float, start: float, count: int, stride: int, fps: float | None
) -> list[Frame] | None:
    """Read what `VideoReader.window` does of a file whose first frame lies at `first` seconds; None if it may differ.

    decord miscounts VP8 and VP9, rounds 10 bits wrongly, guesses untagged colours otherwise, and mirrors nothing.
    """
    plain = not (info.rotation or info.mirrored or info.interlaced or info.notes or info.num_video_streams > 1)
    tagged = info.matrix != MATRIX_UNSPECIFIED and info.codec not in ("vp8", "vp9")
    if not (plain and tagged and info.container in _CONTAINERS and info.pix_fmt in _EIGHT_BITS):
        return None
    try:  # decord's errors share no base class, and any of them only means that PyAV has to read the file
        import cv2  # noqa: F401  # imported after decord, it could no longer read PNG files
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(float)
        times += first - times[0]
        if fps is None:
            indices = int(np.searchsorted(times, start - 1e-4)) + stride * np.arange(count)
        else:
            indices = np.abs(times[:, None] - (start + np.arange(count) / fps)).argmin(axis=0)
        images = reader.get_batch(indices[indices < len(times)].tolist()).asnumpy()
        # It takes the padding of narrow pictures for channels.
        frames = [Frame(image, None, float(times[n])) for image, n in zip(images, indices, strict=False)]
        return frames if images.shape[1:] == (info.height, info.width, 3) else None
    except Exception:
        return None
