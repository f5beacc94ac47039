"""PSNR and SSIM of a folder's clips and images, reconstructed by models with weights."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from leanvae.bench.settings import DEFAULT_FRAMES
from leanvae.media.errors import MediaError
from leanvae.media.folder import read_frames
from leanvae.media.info import Frame
from leanvae.media.naming import find_inputs
from leanvae.metrics.frames import FrameMetrics
from leanvae.peers.coder import make_reconstructor
from leanvae.peers.models import Model
from litevae.errors import NotFinite

logger = logging.getLogger("leanvae")

_LARGEST_SIDE = 512  # pixels; larger frames are cropped to their centre


def judge(model: Model, folder: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Reconstruct the first frames of each file, large ones only in the centre.

    Args:
        model: a model with weights.
        folder: folder of clips and images.
        device: device of the model.
        dtype: type of the model.

    Returns:
        `model`, `files`, `skipped`, `frames`, and `psnr` and `ssim` as means over frames; None if an output is not
        finite.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no clip or image.
    """
    coder = make_reconstructor(model, model.build().to(device, dtype).eval())
    metrics = FrameMetrics()
    jobs = find_inputs(folder, folder / "nothing is written")
    num_skipped, is_finite = 0, True
    for job in jobs:
        try:
            frames = [_centre(frame) for frame in read_frames(job.item, DEFAULT_FRAMES)]
        except MediaError as error:
            num_skipped += 1
            logger.warning("%s: skipped: %s", job.name, error.reason)
            continue
        try:
            for part in coder.reconstruct(frames):
                metrics.update(part.output, part.reference)
        except NotFinite as error:
            is_finite = False
            logger.warning("%s: %s: %s", model.name, job.name, error)
    return {
        "model": model.name,
        "files": len(jobs) - num_skipped,
        "skipped": num_skipped,
        "frames": metrics.num_frames,
        "psnr": metrics.psnr if is_finite else None,
        "ssim": metrics.ssim if is_finite else None,
    }


def _centre(frame: Frame) -> Frame:
    """Return the frame, or the centre of a large one."""
    height, width = (min(length, _LARGEST_SIDE) for length in frame.image.shape[:2])
    top, left = (frame.image.shape[0] - height) // 2, (frame.image.shape[1] - width) // 2
    return replace(frame, image=frame.image[top : top + height, left : left + width])
