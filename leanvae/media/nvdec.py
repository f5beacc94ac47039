"""Decoding by an NVIDIA GPU's own decoder, through torchcodec, where CPUs do not keep up with the model."""

from collections.abc import Iterator

from leanvae.media.video import TIME_SLACK, Frame, VideoInfo
from litevae.errors import MissingPackage

try:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
except (ImportError, RuntimeError) as error:  # it raises RuntimeError without the libraries of FFmpeg
    reason = str(error).splitlines()[0]
    raise MissingPackage(
        f"--nvdec needs torchcodec with CUDA and FFmpeg: pip install 'leanvae[nvdec]': {reason}"
    ) from error


def iter_frames_on_gpu(info: VideoInfo, device: str, start: float = 0.0) -> Iterator[Frame]:
    """Decodes a video in display order, as `leanvae.media.video.iter_frames`; colours may differ by a level or two.

    Args:
        info: what `leanvae.media.video.probe` said of the file.
        device: `cuda`, `cuda:1`, ...
        start: seconds since the container's start; frames before it are passed over.

    Raises:
        RuntimeError: the file cannot be decoded.
    """
    decoder = VideoDecoder(info.path, device=device, dimension_order="NHWC")
    for index in range(len(decoder)):
        frame = decoder.get_frame_at(index)
        time = frame.pts_seconds - info.start_time
        if start <= 0 or time >= start - TIME_SLACK:
            yield Frame(frame.data.cpu().numpy(), None, time)
