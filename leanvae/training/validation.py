"""Held-out clips and images during training: PSNR and side-by-side pictures of the averaged weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leanvae.checkpoint import build_vae
from leanvae.data.loader import read_held_out
from leanvae.data.sources import Clip, Item
from leanvae.metrics import psnr
from leanvae.training.config import TrainConfig


@dataclass(frozen=True)
class ValidationResults:
    """Figures of one evaluation.

    Attributes:
        psnr: in dB by file, the mean over frames.
        picture: uint8 `(H', W', 3)`; a row a file: the image, or first, middle and last frame of the clip, source
            beside reconstruction.
    """

    psnr: dict[str, float]
    picture: np.ndarray

    @property
    def mean_psnr(self) -> float:
        """Mean over the files, in dB."""
        return sum(self.psnr.values()) / len(self.psnr)


class Validation:
    """Evaluates weights on the same held-out clips or images each time, at the resolution of the run's last phase.

    Args:
        config: the run's configuration.
        items: the held-out clips or images; the first usable `training.validation_clips` are taken.
        device: where to compute.
    """

    def __init__(self, config: TrainConfig, items: Sequence[Item], device: torch.device) -> None:
        self._config = config
        self._device = device
        resolution = config.curriculum.phases[-1].resolution
        samples = read_held_out(items, config.data, resolution, config.training.validation_clips)
        # (T, H, W, 3) or (H, W, 3) -> 1 3 T H W or 1 3 H W
        self._pixels = {_label(sample.item): torch.from_numpy(sample.frames).movedim(-1, 0)[None] for sample in samples}

    @torch.inference_mode()
    def run(self, weights: dict[str, Tensor]) -> ValidationResults | None:
        """Reconstructs the held-out files with the given weights; `None` if there are none."""
        if not self._pixels:
            return None
        with torch.device("meta"):
            vae = build_vae(self._config.model)
        vae.load_state_dict(weights, strict=True, assign=True)
        vae.eval()
        values, rows = {}, []
        for name, pixels in self._pixels.items():
            target = pixels.to(self._device).float() / 255.0
            output = vae.decode(vae.encode(target * 2.0 - 1.0).mode(), tuple(pixels.shape[2:]))
            output = (output.float() / 2.0 + 0.5).clamp(0.0, 1.0)
            values[name] = psnr(output, target).mean().item()
            rows.append(_picture_row(target[0], output[0]))
        return ValidationResults(values, np.concatenate(rows, axis=0))


def _label(item: Item) -> str:
    """The file, and where in it the clip starts unless that is the beginning."""
    return f"{item.path} at {item.start:g} s" if isinstance(item, Clip) and item.start else item.path


def _picture_row(target: Tensor, output: Tensor) -> np.ndarray:
    """Two images `(3, H, W)`, or first, middle and last frame of two clips `(3, T, H, W)`, in [0, 1], side by side."""
    if target.ndim == 3:
        target, output = target.unsqueeze(1), output.unsqueeze(1)
    pieces = []
    for frame in sorted({0, target.shape[1] // 2, target.shape[1] - 1}):
        pieces += [target[:, frame], output[:, frame]]
    row = torch.cat(pieces, dim=2).permute(1, 2, 0)
    return (row * 255.0).round().to(torch.uint8).cpu().numpy()
