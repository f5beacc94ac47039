"""Decoding by an NVIDIA GPU's own decoder, through torchcodec, where CPUs do not keep up with the model."""

from collections.abc import Iterator

from leanvae.media.info import Frame, VideoInfo
from leanvae.media.timeline import TIME_SLACK
from leanvae.media.worker import show_life
from litevae.errors import MissingPackage

try:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
except (ImportError, RuntimeError) as error:  # it raises RuntimeError without the libraries of FFmpeg
    reason = str(error).splitlines()[0]
    raise MissingPackage(
        f"--nvdec needs torchcodec with CUDA and FFmpeg: pip install 'leanvae[nvdec]': {reason}"
    ) from error


def iter_frames_on_gpu(
    path: str, info: VideoInfo, device: str, start: float = 0.0, end: float | None = None
) -> Iterator[Frame]:
    """Decode a video in display order, as `leanvae.media.video.VideoReader`; colours may differ by a level or two.

    Args:
        info: what the reader says of the file.
        device: `cuda`, `cuda:1`, ...
        start: seconds since the container's start; frames before it are passed over.
        end: seconds at which to stop; None reads to the end of the file.

    Raises:
        RuntimeError: the file cannot be decoded.
    """
    decoder = VideoDecoder(path, device=device, dimension_order="NHWC")
    for index in range(len(decoder)):
        show_life()
        frame = decoder.get_frame_at(index)
        time = frame.pts_seconds - info.start_time
        if end is not None and time >= end - TIME_SLACK:
            return
        if start <= 0 or time >= start - TIME_SLACK:
            yield Frame(frame.data.cpu().numpy(), None, time)
