"""Held-out clips and images during training: measures and pictures of the averaged weights' reconstructions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.checkpoint import build_vae
from leanvae.coder import FrameCoder
from leanvae.data.loader import read_held_out
from leanvae.data.samples import Sample
from leanvae.media.info import Frame
from leanvae.media.item import Item
from leanvae.metrics.clips import measure_clip, picture_row
from leanvae.metrics.networks import FeatureNetworks
from leanvae.training.comparison import Comparison
from leanvae.training.config import TrainConfig
from litevae.errors import NotFinite
from litevae.perceptual import PerceptualDistance
from litevae.pixels import from_bytes, to_bytes

_NUM_SHOWN = 8  # reconstructions to keep per evaluation
METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "flicker")  # those of `leanvae evaluate` that training shows
_DEFAULT_RATE = 25.0  # frames per second, if a file's timestamps give none


@dataclass(frozen=True)
class ValidationResults:
    """Figures of one evaluation.

    Attributes:
        figures: figures by metric (of `METRICS`; `lpips` if its weights are available) and file; `None` if one is not
            finite or undefined.
        comparisons: the first few files beside their reconstructions.
    """

    figures: Mapping[str, Mapping[str, float | None]]
    comparisons: Sequence[Comparison]

    def mean(self, metric: str) -> float | None:
        """Return the mean over the files with a figure; None if none has one."""
        values = [value for value in self.figures[metric].values() if value is not None]
        return sum(values) / len(values) if values else None

    def __str__(self) -> str:
        shown = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "lpips": "LPIPS {:.4f}"}
        found = {metric: mean for metric, mean in self.means.items() if metric in shown and mean is not None}
        means = [shown[metric].format(mean) for metric, mean in found.items()]
        return f"{', '.join(means) or 'nothing finite'} ({len(self.figures['psnr'])} files)"

    @property
    def means(self) -> dict[str, float | None]:
        """The mean of each metric."""
        return {metric: self.mean(metric) for metric in self.figures}


def read_validation_samples(config: TrainConfig, items: Sequence[Item]) -> list[Sample]:
    """Decode the first usable held-out clips and images, in the largest shapes of the run's last phase.

    Args:
        config: the run's configuration; `training.validation_clips` of each kind are used.
        items: the held-out clips and images.
    """
    samples = []
    for is_image in (False, True):
        buckets = [bucket for bucket in config.curriculum.phases[-1].batches if bucket.is_image == is_image]
        of_kind = [item for item in items if (item.kind == "image") == is_image]
        if buckets and of_kind:
            largest = max(buckets, key=lambda bucket: bucket.frames * bucket.height * bucket.width)
            samples += read_held_out(of_kind, config.data, largest, config.training.validation_clips)
    return samples


class Validation:
    """An evaluation of weights on the same held-out samples each time, one at a time.

    Args:
        config: the run's configuration.
        samples: decoded held-out clips and images.
        lpips: the distance, on the device; `None` leaves it out.
        device: device to compute on.
    """

    def __init__(
        self, config: TrainConfig, samples: Sequence[Sample], lpips: PerceptualDistance | None, device: torch.device
    ) -> None:
        self._config = config
        self._samples = {_label(sample.item): sample for sample in samples}
        self._networks = FeatureNetworks(lpips, None, None, [])
        self._device = device

    @torch.inference_mode()
    def run(self, weights: dict[str, Tensor]) -> ValidationResults | None:
        """Reconstruct the held-out files with the given weights; return None if there are none."""
        if not self._samples:
            return None
        with torch.device("meta"):
            vae = build_vae(self._config.model)
        vae.load_state_dict(weights, strict=True, assign=True)
        coder = FrameCoder(vae.eval())
        figures: dict[str, dict[str, float | None]] = {}
        comparisons = []
        for name, sample in self._samples.items():
            images = sample.frames[None] if sample.times is None else sample.frames  # T H W 3
            target = from_bytes(images, self._device)
            output = _reconstruct(coder, images, target)
            for metric, value in self._measure(output, target, coder.patch).items():
                figures.setdefault(metric, {})[name] = value
            if len(comparisons) < _NUM_SHOWN:
                comparisons.append(_compare(name, sample, images, output, target))
        return ValidationResults(figures, comparisons)

    def _measure(self, output: Tensor, target: Tensor, patch: int) -> dict[str, float | None]:
        """Return the figures of a clip or an image, `(T, 3, H, W)` in [0, 1]."""
        row = measure_clip(output.transpose(0, 1), target.transpose(0, 1), patch, self._networks)
        return {name: row[name] for name in METRICS if name != "lpips" or self._networks.lpips}


def _label(item: Item) -> str:
    """Return the file's name and, unless it is the beginning, the clip's start."""
    return f"{item.name} at {item.start:g} s" if item.start else item.name


def _reconstruct(coder: FrameCoder, images: NDArray[np.uint8], target: Tensor) -> Tensor:
    """Reconstruct frames in the shape of `target`; NaN if the output is not finite."""
    frames = [Frame(image, None, 0.0) for image in images]
    try:
        return torch.cat([part.output for part in coder.reconstruct(frames)])
    except NotFinite:
        return torch.full_like(target, torch.nan)


def _compare(name: str, sample: Sample, images: NDArray[np.uint8], output: Tensor, target: Tensor) -> Comparison:
    """Return a sample's frames beside their reconstruction, `(T, 3, H, W)` in [0, 1]."""
    frames = np.concatenate((images, to_bytes(output)), axis=2)  # (T, H, 2W, 3)
    row = picture_row(output.transpose(0, 1), target.transpose(0, 1))
    if sample.times is None:
        return Comparison(name, frames, None, row)
    seconds = float(sample.times[-1] - sample.times[0])
    return Comparison(name, frames, (len(frames) - 1) / seconds if seconds > 0 else _DEFAULT_RATE, row)
