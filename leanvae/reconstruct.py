"""Reconstruction of clips and images: a model's output for a user's own files, with measures."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanvae.checkpoint import load_vae
from leanvae.coder import FrameCoder
from leanvae.media.errors import MediaError
from leanvae.media.folder import ClipReader, open_clip
from leanvae.media.image import read_image
from leanvae.media.info import Frame
from leanvae.media.naming import NamedItem, find_inputs, first_skipped
from leanvae.media.writer import VideoWriter, write_png
from leanvae.metrics.frames import FrameMetrics
from leanvae.named import weights_line
from leanvae.progress import Progress
from litevae.errors import NotFinite, WorkIncomplete, extra
from litevae.files import write_text
from litevae.pixels import to_bytes

with extra("video"):
    import av
    import av.error

logger = logging.getLogger("leanvae")

METRICS_FILE = "metrics.json"


@dataclass
class Result:
    """The result for a file, with the fields of `metrics.json`.

    Attributes:
        input: the file's path relative to the input folder.
        kind: `video` or `image`.
        reconstruction, side_by_side: the files written, relative to the output folder.
        width, height: upright size of the source and the reconstruction in pixels.
        frames: number of frames of both.
        fps: average frames per second; None for images and if the source does not say.
        psnr: in decibels, the mean over frames; None if infinite.
        ssim: the mean over frames; None for a side under 11 pixels.
        notes: properties of the source that could not be kept.
    """

    input: str
    kind: str
    reconstruction: str
    side_by_side: str
    width: int
    height: int
    frames: int
    fps: float | None
    psnr: float | None
    ssim: float | None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        psnr = "infinite" if self.psnr is None else f"{self.psnr:.2f} dB"
        ssim = "undefined" if self.ssim is None else f"{self.ssim:.4f}"
        notes = "".join(f" ({note})" for note in self.notes)
        frames = "image" if self.kind == "image" else f"{self.frames} frames"
        return f"{frames} of {self.width}x{self.height}, PSNR {psnr}, SSIM {ssim}{notes}"


def reconstruct(
    checkpoint: str | Path,
    inputs: str | Path,
    output: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    memory_limit: str | int | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Encode and decode a clip, an image, or all clips and images below a folder.

    For each file it writes `NAME.recon.mp4` (or `.png`) and `NAME.side_by_side.mp4`, with the source on the left, and
    for all of them one `metrics.json`. Clips are turned upright and keep their timestamps, size, number of frames and
    sound. They are streamed, so memory does not grow with their length. PSNR and SSIM measure the decoder's output,
    clamped to [0, 1], before it is rounded to 8 bits or coded. Latents are the posterior's mean.

    Args:
        checkpoint: anything that `load_vae` reads.
        inputs: a file, or a folder, whose clips and images are sorted by name.
        output: folder for the results, created if missing.
        device: device of the model.
        dtype: type of the model; None uses the stored one.
        chunk: most frames to encode at a time; None takes as many as memory allows.
        memory_limit: bytes, or such as `"6GiB"`, for the model, its streams and their frames, without the weights.
            Video
            coding on the host is not counted: about 600 bytes per pixel of a frame. None means a device's free memory,
            and on CPUs 6 GiB if that suffices.
        strict: whether a file that cannot be reconstructed is an error, raised after the others are done.

    Returns:
        The content of `metrics.json`: `files` (a `Result` each), `skipped` (`input` and `reason` each) and `total`
        (`files`, `skipped`, `frames`, and `psnr` and `ssim` as means over the frames of files with a finite value, with
        the number of files without one).

    Raises:
        FileNotFoundError: the input or checkpoint does not exist.
        ValueError: the input holds no clip or image, the output folder is the input folder, or the memory limit is
            wrong or cannot be kept.
        WorkIncomplete: no file could be reconstructed or, with `strict`, not all of them.
        NotFinite: the model's output is infinite or NaN.
    """
    inputs, output = Path(inputs), Path(output)
    jobs = find_inputs(inputs, output)
    logger.info(weights_line(checkpoint))
    coder = FrameCoder(load_vae(checkpoint, device, dtype), chunk=chunk, memory_limit=memory_limit)
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    skipped: list[dict[str, str]] = []
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "input": str(inputs)}
    try:
        for number, job in enumerate(jobs, start=1):
            label = f"[{number}/{len(jobs)}] {job.name}"
            try:
                result = _reconstruct_file(coder, job, output, label)
            except MediaError as error:
                skipped.append({"input": job.name, "reason": error.reason})
                logger.warning("%s: skipped: %s", label, error.reason)
                continue
            except NotFinite as error:
                raise NotFinite(f"{job.name}: {error}") from error
            results.append(result)
            logger.info("%s: %s", label, result)
    finally:  # even if interrupted
        files = [asdict(result) for result in results]
        report.update(total=_total(results, len(skipped)), files=files, skipped=skipped)
        write_text(output / METRICS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if skipped and (strict or not results):
        raise WorkIncomplete(
            f"{len(skipped)} of {len(jobs)} files could not be reconstructed: {first_skipped(skipped)}"
        )
    return report


def _total(results: list[Result], num_skipped: int) -> dict[str, Any]:
    """Sum up all files; the measures are means over the frames of files that have them."""
    total: dict[str, Any] = {"files": len(results), "skipped": num_skipped}
    total["frames"] = sum(result.frames for result in results)
    for name in ("psnr", "ssim"):
        measured = [(getattr(result, name), result.frames) for result in results if getattr(result, name) is not None]
        num_frames = sum(frames for _, frames in measured)
        total[name] = sum(value * frames for value, frames in measured) / num_frames if measured else None
        total[f"files_without_{name}"] = len(results) - len(measured)
    return total


def _reconstruct_file(coder: FrameCoder, job: NamedItem, output: Path, label: str) -> Result:
    """Reconstruct a file and write its outputs; `label` precedes its progress.

    Raises:
        MediaError: the file cannot be read, or mp4 cannot hold it.
        NotFinite: the model's output is not finite.
        ValueError: the memory limit cannot be kept.
    """
    (output / job.target).parent.mkdir(parents=True, exist_ok=True)
    if not job.is_video:
        return _reconstruct_image(coder, job, output)
    try:
        with open_clip(job.item, square=False, threads=0) as reader:
            return _reconstruct_clip(coder, job, reader, output, label)
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        raise MediaError(job.item.name, f"cannot be written as mp4: {error.strerror}") from error


def _reconstruct_image(coder: FrameCoder, job: NamedItem, output: Path) -> Result:
    source = read_image(job.item)
    (part,) = coder.reconstruct([Frame(source, None, 0.0)])
    metrics = FrameMetrics()
    metrics.update(part.output, part.reference)
    recon = to_bytes(part.output)[0]
    names = _output_names(job, ".png")
    write_png(output / names[0], recon)
    write_png(output / names[1], np.concatenate((source, recon), axis=1))
    height, width = source.shape[:2]
    return Result(job.name, "image", *names, width, height, 1, None, metrics.psnr, metrics.ssim)


def _reconstruct_clip(coder: FrameCoder, job: NamedItem, reader: ClipReader, output: Path, label: str) -> Result:
    info, item = reader.info, job.item
    is_whole_file = not (item.member or item.start or item.end)
    sound = item.address if info.has_audio and is_whole_file else None
    names = _output_names(job, ".mp4")
    metrics = FrameMetrics()
    shared: dict[str, Any] = {
        "time_base": info.time_base,
        "rate": info.fps,
        "pixel_aspect": info.pixel_aspect if info.pixel_aspect != 1 else None,
        "origin": info.clock_offset,
    }
    with (
        Progress(label, "frame", info.num_frames, stays=False) as progress,
        VideoWriter(output / names[0], info.width, info.height, audio_from=sound, **shared) as recon,
        VideoWriter(output / names[1], 2 * info.width, info.height, **shared) as side_by_side,
    ):
        for part in coder.reconstruct(reader.frames(item.start, item.end)):
            metrics.update(part.output, part.reference)
            for frame, image in zip(part.frames, to_bytes(part.output), strict=True):
                recon.write(image, frame.pts)
                side_by_side.write(np.concatenate((frame.image, image), axis=1), frame.pts)
            progress.add(len(part.frames))
    notes = [*info.notes, *recon.notes]
    return Result(
        job.name,
        "video",
        *names,
        info.width,
        info.height,
        metrics.num_frames,
        float(info.fps) if info.fps else None,
        metrics.psnr,
        metrics.ssim,
        notes,
    )


def _output_names(job: NamedItem, suffix: str) -> tuple[str, str]:
    return f"{job.target}.recon{suffix}", f"{job.target}.side_by_side{suffix}"
