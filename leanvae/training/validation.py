"""Held-out clips during training: PSNR and side-by-side pictures of the averaged weights."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leanvae.data.loader import read_held_out
from leanvae.data.sources import Clip
from leanvae.metrics import psnr
from leanvae.model import LeanVAE
from leanvae.training.config import TrainVideoConfig


@dataclass(frozen=True)
class ValidationResults:
    """Figures of one evaluation.

    Attributes:
        psnr: in dB by clip, the mean over frames.
        picture: uint8 `(H', W', 3)`; a row a clip: first, middle and last frame, source beside reconstruction.
    """

    psnr: dict[str, float]
    picture: np.ndarray

    @property
    def mean_psnr(self) -> float:
        """Mean over the clips, in dB."""
        return sum(self.psnr.values()) / len(self.psnr)


class Validation:
    """Evaluates weights on the same held-out clips each time.

    Args:
        config: the run's configuration.
        clips: the held-out clips; the first usable `training.validation_clips` are taken.
        device: where to compute.
    """

    def __init__(self, config: TrainVideoConfig, clips: list[Clip], device: torch.device) -> None:
        self._config = config
        self._device = device
        samples = read_held_out(clips, config.data, config.training.validation_clips)
        self._clips = {
            _label(sample.clip): torch.from_numpy(sample.frames).permute(3, 0, 1, 2)[None] for sample in samples
        }

    @torch.inference_mode()
    def run(self, weights: dict[str, Tensor]) -> ValidationResults | None:
        """Reconstructs the held-out clips with the given weights; `None` if there are none."""
        if not self._clips:
            return None
        with torch.device("meta"):
            vae = LeanVAE(self._config.model)
        vae.load_state_dict(weights, strict=True, assign=True)
        vae.eval()
        values, rows = {}, []
        for name, clip in self._clips.items():
            target = clip.to(self._device).float() / 255.0
            output = vae.decode(vae.encode(target * 2.0 - 1.0).mode(), tuple(clip.shape[2:]))
            output = (output.float() / 2.0 + 0.5).clamp(0.0, 1.0)
            values[name] = psnr(output, target).mean().item()
            rows.append(_picture_row(target[0], output[0]))
        return ValidationResults(values, np.concatenate(rows, axis=0))


def _label(clip: Clip) -> str:
    """The file, and where in it the clip starts unless that is the beginning."""
    return clip.path if not clip.start else f"{clip.path} at {clip.start:g} s"


def _picture_row(target: Tensor, output: Tensor) -> np.ndarray:
    """First, middle and last frame of two clips `(3, T, H, W)` in [0, 1], side by side."""
    pieces = []
    for frame in sorted({0, target.shape[1] // 2, target.shape[1] - 1}):
        pieces += [target[:, frame], output[:, frame]]
    row = torch.cat(pieces, dim=2).permute(1, 2, 0)
    return (row * 255.0).round().to(torch.uint8).cpu().numpy()
