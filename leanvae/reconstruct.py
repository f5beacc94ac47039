"""Reconstruction of clips and images: what a trained autoencoder makes of a user's own files, with measures."""

import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.checkpoint import load_vae
from leanvae.inference.plan import PIXELS_AT_ONCE, plan_reconstruction
from leanvae.media.errors import MediaError
from leanvae.media.folder import ClipReader, open_clip
from leanvae.media.image import read_image
from leanvae.media.info import Frame
from leanvae.media.item import local_path
from leanvae.media.naming import NamedItem, find_inputs
from leanvae.media.writer import VideoWriter, write_png
from leanvae.metrics.frames import FrameMetrics
from leanvae.model import LeanVAE
from litevae.errors import NotFinite, WorkIncomplete, extra
from litevae.files import write_text
from litevae.memory import parse_bytes
from litevae.model import LiteVAE

with extra("video"):
    import av
    import av.error
    from tqdm import tqdm

logger = logging.getLogger("leanvae")

METRICS_FILE = "metrics.json"
_IMAGES_AT_ONCE = 4  # frames that an image model gets at a time
_SECONDS_BETWEEN_LINES = 30.0


@dataclass
class Result:
    """What became of a file; the fields as they stand in `metrics.json`.

    Attributes:
        input: the file's path relative to the input folder.
        kind: `video` or `image`.
        reconstruction, side_by_side: the files written, relative to the output folder.
        width, height: size of the source and the reconstruction in pixels, upright.
        frames: number of frames of both.
        fps: average frames per second, None for images and where the source does not say.
        psnr: in decibels, the mean over frames; None where infinite.
        ssim: the mean over frames; None for a side under 11 pixels.
        notes: what could not be kept of the source.
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
    """Encodes and decodes a clip, an image, or every clip and image of a folder and those in it.

    For each file it writes `NAME.recon.mp4` (or `.png`), `NAME.side_by_side.mp4` with the source on the left,
    and for all of them one `metrics.json`. Clips keep their timestamps, size, number of frames and sound, and
    stand upright; they are streamed, so a clip's length takes no memory. PSNR and SSIM are those of the
    decoder's output, clamped to [0, 1], before it is rounded to 8 bits or coded. Latents are the posterior's
    mean.

    Args:
        checkpoint: what `load_vae` reads.
        inputs: a file, or a folder whose clips and images are taken in the order of their names.
        output: folder for the results, made if missing.
        device: where the model runs.
        dtype: its type; as stored if None.
        chunk: most frames to encode at a time; as memory allows if None.
        memory_limit: bytes, or such as `"6GiB"`, that the model, its streams and their frames may take besides the
            weights. The coders of video, which run on the host, are not counted: about 600 bytes for each pixel of a
            frame. If None, a device's free memory is the limit, and on CPUs 6 GiB where so little suffices.
        strict: a file that cannot be reconstructed is an error, raised after the others are done.

    Returns:
        The content of `metrics.json`: `files` (a `Result` each), `skipped` (`input` and `reason` each) and
        `total` (`files`, `skipped`, `frames`, and `psnr` and `ssim` as means over the frames of the files that
        have a finite value, with the number of those that do not).

    Raises:
        FileNotFoundError: there is no such input or checkpoint.
        ValueError: the input holds no clip or image, the output folder is the input folder, or the memory limit
            is wrong or cannot be kept.
        WorkIncomplete: no file could be reconstructed, or not all with `strict`.
        NotFinite: the model's output is infinite or NaN.
    """
    inputs, output = Path(inputs), Path(output)
    jobs = find_inputs(inputs, output)
    if memory_limit is not None:
        memory_limit = parse_bytes(memory_limit)
    vae = load_vae(checkpoint, device, dtype)
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    skipped: list[dict[str, str]] = []
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "input": str(inputs)}
    try:
        for number, job in enumerate(jobs, start=1):
            label = f"[{number}/{len(jobs)}] {job.name}"
            try:
                result = reconstruct_file(vae, job, output, label, chunk, memory_limit)
            except MediaError as error:
                skipped.append({"input": job.name, "reason": error.reason})
                logger.warning("%s: skipped: %s", label, error.reason)
                continue
            results.append(result)
            logger.info("%s: %s", label, _describe(result))
    finally:  # also when it is interrupted
        files = [asdict(result) for result in results]
        report.update(total=_total(results, len(skipped)), files=files, skipped=skipped)
        write_text(output / METRICS_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if skipped and (strict or not results):
        raise WorkIncomplete(f"{len(skipped)} of {len(jobs)} files could not be reconstructed: {_list(skipped)}")
    return report


def _total(results: list[Result], num_skipped: int) -> dict[str, Any]:
    """Totals of all files; the measures are means over the frames of the files that have them."""
    total: dict[str, Any] = {"files": len(results), "skipped": num_skipped}
    total["frames"] = sum(result.frames for result in results)
    for name in ("psnr", "ssim"):
        measured = [(getattr(result, name), result.frames) for result in results if getattr(result, name) is not None]
        num_frames = sum(frames for _, frames in measured)
        total[name] = sum(value * frames for value, frames in measured) / num_frames if measured else None
        total[f"files_without_{name}"] = len(results) - len(measured)
    return total


def _list(skipped: list[dict[str, str]], shown: int = 5) -> str:
    """The first of the skipped files with their reasons, and how many more there are."""
    names = "; ".join(f"{entry['input']}: {entry['reason']}" for entry in skipped[:shown])
    return names + (f"; and {len(skipped) - shown} more" if len(skipped) > shown else "")


def reconstruct_file(
    vae: LeanVAE | LiteVAE,
    job: NamedItem,
    output: Path,
    label: str,
    chunk: int | None = None,
    memory_limit: int | None = None,
) -> Result:
    """Reconstructs one file and writes its outputs; `label` stands before its progress, the rest as in `reconstruct`.

    Raises:
        MediaError: the file cannot be read, or mp4 cannot hold it.
        NotFinite: the model's output is not finite.
        ValueError: the memory limit cannot be kept.
    """
    (output / job.target).parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        if not job.is_video:
            return _reconstruct_image(vae, job, output, memory_limit)
        try:
            return _reconstruct_clip(vae, job, output, label, chunk, memory_limit)
        except (av.error.InvalidDataError, av.error.ArgumentError) as error:
            raise MediaError(job.item.name, f"cannot be written as mp4: {error.strerror}") from error


def _reconstruct_image(vae: LeanVAE | LiteVAE, job: NamedItem, output: Path, memory_limit: int | None) -> Result:
    source = read_image(job.item)
    height, width = source.shape[:2]
    x = _to_unit([source], vae)
    latent = vae.encode(_to_model(x, vae), memory_limit=memory_limit).mode()
    decoded = vae.decode(latent, size=(height, width), memory_limit=memory_limit)
    y = _from_model(decoded, job.name)
    metrics = FrameMetrics()
    metrics.update(y, x)
    recon = _to_uint8(y)[0]
    names = _output_names(job, ".png")
    write_png(output / names[0], recon)
    write_png(output / names[1], np.concatenate((source, recon), axis=1))
    return Result(job.name, "image", *names, width, height, 1, None, metrics.psnr, metrics.ssim)


def _reconstruct_clip(
    vae: LeanVAE | LiteVAE, job: NamedItem, output: Path, label: str, chunk: int | None, memory_limit: int | None
) -> Result:
    with open_clip(job.item, square=False, threads=0) as reader:
        return _reconstruct_frames(vae, job, reader, output, label, chunk, memory_limit)


def _reconstruct_frames(
    vae: LeanVAE | LiteVAE,
    job: NamedItem,
    reader: ClipReader,
    output: Path,
    label: str,
    chunk: int | None,
    memory_limit: int | None,
) -> Result:
    info = reader.info
    audio_from = local_path(job.item.address) if info.has_audio else None
    names = _output_names(job, ".mp4")
    metrics = FrameMetrics()
    waiting: deque[Frame] = deque()  # read, and not decoded yet
    at_once = max(1, PIXELS_AT_ONCE // (info.width * info.height))
    shared: dict[str, Any] = {
        "time_base": info.time_base,
        "rate": info.fps,
        "pixel_aspect": info.pixel_aspect if info.pixel_aspect != 1 else None,
        "origin": info.clock_offset,
    }
    with (
        _Progress(label, info.num_frames) as progress,
        VideoWriter(
            output / names[0],
            info.width,
            info.height,
            audio_from=audio_from,
            **shared,
        ) as recon,
        VideoWriter(output / names[1], 2 * info.width, info.height, **shared) as side_by_side,
    ):
        for decoded in _decoded(vae, reader, chunk, memory_limit, waiting):
            # The last frame was repeated to fill its group; what it decodes to has no source.
            frames = [waiting.popleft() for _ in range(min(decoded.shape[2], len(waiting)))]
            decoded = decoded[:, :, : len(frames), : info.height, : info.width]
            for start in range(0, len(frames), at_once):
                some = frames[start : start + at_once]
                y = _from_model(decoded[0, :, start : start + at_once].transpose(0, 1), job.name)
                metrics.update(y, _to_unit([frame.image for frame in some], vae))
                for frame, image in zip(some, _to_uint8(y), strict=True):
                    recon.write(image, frame.pts)
                    side_by_side.write(np.concatenate((frame.image, image), axis=1), frame.pts)
            progress.update(len(frames))
        assert not waiting
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


def _decoded(
    vae: LeanVAE | LiteVAE, reader: ClipReader, chunk: int | None, memory_limit: int | None, waiting: deque[Frame]
) -> Iterator[Tensor]:
    """Yields what the model makes of a clip, `(1, 3, t, H, W)`; the frames that this is of are left in `waiting`."""
    if isinstance(vae, LiteVAE):
        for frames in _read_chunks(vae, reader, chunk or _IMAGES_AT_ONCE, 1, waiting):
            images = frames[0].transpose(0, 1)  # an image model knows no time
            latent = vae.encode(images, memory_limit=memory_limit).mode()
            yield vae.decode(latent, memory_limit=memory_limit).transpose(0, 1)[None]
        return
    encoding, decoding = plan_reconstruction(vae, reader.info.width, reader.info.height, chunk, memory_limit)
    group, *patch = vae.config.patch_size
    tiles = [plan.tile and (plan.tile[0] * patch[0], plan.tile[1] * patch[1]) for plan in (encoding, decoding)]
    frames = _read_chunks(vae, reader, group * (encoding.latent_frames or 1), group, waiting)
    latents = (posterior.mode() for posterior in vae.encode_stream(frames, tile=tiles[0]))
    yield from vae.decode_stream(latents, tile=tiles[1])


def _read_chunks(
    vae: LeanVAE | LiteVAE, reader: ClipReader, chunk: int, group: int, waiting: deque[Frame]
) -> Iterator[Tensor]:
    """Yields a clip's frames for the model, `(1, 3, t, H, W)` in [-1, 1], and leaves them in `waiting`.

    The first chunk is shorter, so that after the first frame, which stands alone, groups stay whole.
    """
    images: list[Tensor] = []
    wanted = max(1, chunk - group + 1)
    for frame in reader.frames():
        images.append(_to_model(_to_unit([frame.image], vae), vae))
        waiting.append(frame)
        if len(images) == wanted:
            yield torch.stack(images, dim=2)
            images, wanted = [], chunk
    if images:
        yield torch.stack(images, dim=2)


def _output_names(job: NamedItem, suffix: str) -> tuple[str, str]:
    return f"{job.target}.recon{suffix}", f"{job.target}.side_by_side{suffix}"


def _to_unit(images: list[NDArray[np.uint8]], vae: LeanVAE | LiteVAE) -> Tensor:
    """Frames as float32 `(N, 3, H, W)` in [0, 1] on the model's device."""
    device = next(vae.parameters()).device
    return torch.from_numpy(np.stack(images)).to(device).movedim(-1, 1).float() / 255


def _to_model(unit: Tensor, vae: LeanVAE | LiteVAE) -> Tensor:
    """[0, 1] to the model's [-1, 1], in its own type."""
    return (2 * unit - 1).to(next(vae.parameters()).dtype)


def _from_model(decoded: Tensor, name: str) -> Tensor:
    """The decoder's `(N, 3, H, W)` in about [-1, 1] as float32, clamped to [0, 1].

    Raises:
        NotFinite: it is not finite.
    """
    decoded = decoded.float()
    if not decoded.isfinite().all():
        raise NotFinite(
            f"{name}: the decoder's output is not finite: the weights are broken, or need another dtype (float32)"
        )
    return ((decoded + 1) / 2).clamp(0, 1)


def _to_uint8(unit: Tensor) -> NDArray[np.uint8]:
    """`(N, 3, H, W)` in [0, 1] as `(N, H, W, 3)` bytes."""
    return (255 * unit).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def _describe(result: Result) -> str:
    """One line on a result."""
    psnr = "infinite" if result.psnr is None else f"{result.psnr:.2f} dB"
    ssim = "undefined" if result.ssim is None else f"{result.ssim:.4f}"
    notes = "".join(f" ({note})" for note in result.notes)
    frames = "image" if result.kind == "image" else f"{result.frames} frames"
    return f"{frames} of {result.width}x{result.height}, PSNR {psnr}, SSIM {ssim}{notes}"


class _Progress:
    """A bar of a clip's frames on a terminal, and a line now and then elsewhere."""

    def __init__(self, label: str, num_frames: int | None) -> None:
        self._label = label
        self._bar = tqdm(desc=label, total=num_frames, unit="frame", disable=None, leave=False)
        self._num_frames = 0
        self._last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, num_frames: int) -> None:
        """Counts frames."""
        self._num_frames += num_frames
        self._bar.update(num_frames)
        if self._bar.disable and time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logger.info("%s: %d frames so far", self._label, self._num_frames)
