"""PSNR and SSIM of what models with weights make of the clips and images of a folder."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leanvae.bench.settings import DEFAULT_FRAMES
from leanvae.jobs import Job, find_jobs
from leanvae.media.video import MediaError, iter_frames, read_image
from leanvae.metrics.frames import FrameMetrics
from leanvae.peers.models import Model, Size, decode, encode

logger = logging.getLogger("leanvae")

_LARGEST_SIDE = 512  # pixels; of larger frames the centre is taken


def judge(model: Model, folder: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Reconstructs the first frames of each file, at most the centre of each.

    Args:
        model: one with weights.
        folder: clips and images.
        device: where it runs.
        dtype: its type.

    Returns:
        `model`, `files`, `skipped`, `frames`, and `psnr` and `ssim` as means over frames.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no clip or image.
    """
    vae = model.build().to(device, dtype).eval()
    metrics = FrameMetrics()
    jobs = find_jobs(folder, folder / "nothing is written")
    num_skipped = 0
    for job in jobs:
        try:
            frames = _read_frames(job)
        except MediaError as error:
            num_skipped += 1
            logger.warning("%s: skipped: %s", job.name, error.reason)
            continue
        with torch.inference_mode():
            recon, _ = reconstruct_frames(model, vae, (2 * frames - 1).to(device, dtype))
        metrics.update(((recon.float().cpu() + 1) / 2).clamp(0, 1), frames)
    return {
        "model": model.name,
        "files": len(jobs) - num_skipped,
        "skipped": num_skipped,
        "frames": metrics.num_frames,
        "psnr": metrics.psnr,
        "ssim": metrics.ssim,
    }


def _read_frames(job: Job) -> Tensor:
    """The first frames of a clip, or an image, `(N, 3, H, W)` in [0, 1]."""
    if job.is_video:
        images = [frame.image for frame in itertools.islice(iter_frames(job.source), DEFAULT_FRAMES)]
    else:
        images = [read_image(job.source)]
    height, width = (min(length, _LARGEST_SIDE) for length in images[0].shape[:2])
    top, left = (images[0].shape[0] - height) // 2, (images[0].shape[1] - width) // 2
    crops = np.stack([image[top : top + height, left : left + width] for image in images])
    return torch.from_numpy(crops).movedim(-1, 1).float() / 255


def reconstruct_frames(model: Model, vae: torch.nn.Module, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames through a model; padded by replication to what it takes, and cropped back.

    Args:
        model: what the module is.
        vae: its module.
        frames: `(N, 3, H, W)` in [-1, 1], in the module's type and on its device.

    Returns:
        The reconstruction, of the frames' shape and about [-1, 1], and the latent `(Z, T', H', W')` of the padded
        frames; an image model has one latent frame for each.
    """
    count, _, height, width = frames.shape
    fitted = model.fit(Size(count, height, width))
    padded = F.pad(frames, (0, fitted.width - width, 0, fitted.height - height), mode="replicate")
    if model.kind == "image":
        latents = [encode(model, vae, image) for image in padded.split(1)]
        recon = torch.cat([decode(vae, latent) for latent in latents])
        latent = torch.cat(latents).transpose(0, 1)  # N Z H' W' -> Z N H' W'
    else:
        padded = torch.cat([padded, padded[-1:].expand(fitted.frames - count, -1, -1, -1)])
        clip = padded.transpose(0, 1).unsqueeze(0)  # N C H W -> 1 C T H W
        encoded = encode(model, vae, clip)
        recon, latent = decode(vae, encoded)[0].transpose(0, 1), encoded[0]
    return recon[:count, :, :height, :width], latent
