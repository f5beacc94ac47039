"""An analysis's measures of one image autoencoder, batch by batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.coder import finite_frames, to_model
from leanvae.metrics.frames import FrameMetrics, psnr
from leanvae.model import LeanVAE
from litevae.analysis import RBF_SIGMAS, Imbalance, feature_imbalance, latents_as_rgb, mmd
from litevae.config import DOWNSAMPLING
from litevae.errors import InvalidInput, NotFinite
from litevae.model import LiteVAE
from litevae.perceptual import PerceptualDistance
from litevae.pixels import from_bytes
from litevae.posterior import DiagonalGaussian

Autoencoder = LeanVAE | LiteVAE

RESOLUTIONS = (32, 64, 128, 256, 512)  # LiteVAE, Figure 5
_MAX_LATENTS = 2048  # images whose latents are kept for MMD
_MMD_DRAWS = 5  # Gaussian samples to average each MMD over
_MIN_LPIPS_SIZE = 16  # pixels
# Two seeds, because latents must be independent of the noise that they are compared with.
_POSTERIOR_SEED, _GAUSSIAN_SEED = 0, 1


@dataclass(frozen=True)
class Study:
    """What an analysis measures.

    Attributes:
        resolutions: sides in pixels of the squares for reconstructions.
        size: side of the squares for latents, feature maps and pictures, a multiple of 8.
        sigmas: bandwidths of the MMD's kernels.
        num_pictures: number of images to show, the first ones of at least `size`.

    Raises:
        ValueError: a number is out of its range.
    """

    resolutions: Sequence[int] = RESOLUTIONS
    size: int = 256
    sigmas: Sequence[float] = RBF_SIGMAS
    num_pictures: int = 4

    def __post_init__(self) -> None:
        resolutions = list(self.resolutions)
        if not resolutions or min(resolutions) < 1 or len(set(resolutions)) < len(resolutions):
            raise InvalidInput(f"resolutions are {resolutions}: expected different, positive numbers of pixels")
        if self.size < 1 or self.size % DOWNSAMPLING:
            raise InvalidInput(f"size is {self.size}: expected a positive multiple of {DOWNSAMPLING} pixels")
        if not self.sigmas or min(self.sigmas) <= 0:
            raise InvalidInput(f"sigmas are {list(self.sigmas)}: expected positive bandwidths")
        if self.num_pictures < 1:
            raise InvalidInput(f"num_pictures is {self.num_pictures}: expected at least 1")

    @property
    def sides(self) -> list[int]:
        """All sides that images are resized to, ascending."""
        return sorted({*self.resolutions, self.size})


class ModelRecord:
    """The measures of a model, accumulated over batches of images.

    Args:
        name: name of the model in errors.
        vae: the model.
        study: what to measure.
        lpips: LPIPS on the model's device, or None to leave it out.

    Raises:
        ValueError: the model does not work at the study's size.
    """

    def __init__(self, name: str, vae: Autoencoder, study: Study, lpips: PerceptualDistance | None = None) -> None:
        if not _takes(vae, study.size):
            raise InvalidInput(f"size is {study.size}: the transformer in {name} works only at another one (vit_grid)")
        self.name = name
        self.vae = vae
        self._study = study
        self._lpips = lpips
        self._metrics = {side: FrameMetrics() for side in sorted(study.resolutions)}
        self._lpips_sums = dict.fromkeys(study.resolutions, 0.0)
        self._latents: list[Tensor] = []
        self._peak_ratios: list[float] = []
        self._top_shares: list[float] = []
        self._generator = torch.Generator().manual_seed(_POSTERIOR_SEED)

    def update(self, images: list[NDArray[np.uint8]]) -> None:
        """Add a batch of square images `(side, side, 3)`, of one of the study's sides.

        Raises:
            NotFinite: the model's output is not finite.
        """
        side = len(images[0])
        if not _takes(self.vae, side):
            return
        x, posterior, y = self._reconstruct(images)
        if side in self._metrics:
            self._metrics[side].update(y, x)
            if self._lpips is not None and side >= _MIN_LPIPS_SIZE:
                self._lpips_sums[side] += self._lpips(2 * y - 1, 2 * x - 1).double().sum().item()
        if side == self._study.size:
            latents = posterior.sample(self._generator).flatten(1).float().cpu()
            self._latents.append(latents[: _MAX_LATENTS - sum(map(len, self._latents))])
            imbalance = self._imbalance(posterior.mode())
            if imbalance is not None:
                self._peak_ratios += imbalance.peak_ratio.tolist()
                self._top_shares += imbalance.top_share.tolist()

    def picture(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Return the content of the plots for one image: arrays for matplotlib, and the numbers beside them."""
        x, posterior, y = self._reconstruct([image])
        latent = posterior.mode()
        imbalance = self._imbalance(latent)
        return {
            "reconstruction": y[0].movedim(0, -1).cpu().numpy(),
            "psnr": psnr(y, x).item(),
            # LeanVAE's latents of images have one frame.
            "latent": latents_as_rgb(latent.flatten(2, -2))[0].movedim(0, -1).cpu().numpy(),
            "magnitude": None if imbalance is None else imbalance.magnitude[0].cpu().numpy(),
            "peak_ratio": None if imbalance is None else imbalance.peak_ratio.item(),
            "top_share": None if imbalance is None else imbalance.top_share.item(),
        }

    def summary(self) -> dict[str, Any]:
        """Return the model's numbers in `analysis.json`; None if one is infinite or undefined."""
        latents = torch.cat(self._latents)
        imbalance = {
            "images": len(self._peak_ratios),
            "peak_ratio": _finite_mean(self._peak_ratios),
            "top_share": _finite_mean(self._top_shares),
        }
        return {
            "kind": type(self.vae).__name__,
            "resolution": [self._row(side) for side in self._metrics],
            "mmd": {
                "images": len(latents),
                "dimension": latents.shape[1],
                "draws": _MMD_DRAWS,
                "values": _mmd_to_gaussian(latents, self._study.sigmas),
            },
            "imbalance": imbalance if self._peak_ratios else None,
        }

    def _row(self, side: int) -> dict[str, Any]:
        metrics = self._metrics[side]
        row = {"resolution": side, "images": metrics.num_frames, "psnr": metrics.psnr, "ssim": metrics.ssim}
        if self._lpips is not None:
            measured = metrics.num_frames and side >= _MIN_LPIPS_SIZE
            row["lpips"] = self._lpips_sums[side] / metrics.num_frames if measured else None
        return row

    def _reconstruct(self, images: list[NDArray[np.uint8]]) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """Return images as `(N, 3, H, W)` in [0, 1], their posterior, and its mean decoded and clamped, in float32."""
        x = from_bytes(np.stack(images), next(self.vae.parameters()).device)
        posterior = self.vae.encode(to_model([images], self.vae)[0].transpose(0, 1))
        decoded = self.vae.decode(posterior.mode(), size=tuple(x.shape[2:]))
        try:
            return x, posterior, torch.cat(list(finite_frames(decoded)))
        except NotFinite as error:
            raise NotFinite(f"{self.name}: {error}") from error

    def _imbalance(self, latent: Tensor) -> Imbalance | None:
        """Measure the decoder's last feature maps; return None for a model without them."""
        if not isinstance(self.vae, LiteVAE):
            return None
        return feature_imbalance(self.vae.decoder.features(self.vae.before_decoder(latent)))


def _takes(vae: Autoencoder, side: int) -> bool:
    """Tell whether a model works at this size; a transformer in the encoder has a fixed size."""
    if isinstance(vae, LiteVAE) and vae.config.encoder == "wavelet" and vae.config.aggregation == "vit":
        return vae.config.vit_grid == (-(-side // DOWNSAMPLING),) * 2
    return True


def _mmd_to_gaussian(latents: Tensor, sigmas: Sequence[float]) -> list[dict[str, float]]:
    """Compute the squared MMD to as many Gaussian samples, over several draws; a single image has none."""
    if len(latents) < 2:
        return []
    generator = torch.Generator().manual_seed(_GAUSSIAN_SEED)
    draws = [mmd(latents, torch.randn(latents.shape, generator=generator), sigmas) for _ in range(_MMD_DRAWS)]
    return [
        {"sigma": float(sigma), "mean": fmean(values), "std": stdev(values)}
        for sigma, values in zip(sigmas, torch.stack(draws).T.tolist(), strict=True)
    ]


def _finite_mean(values: list[float]) -> float | None:
    mean = fmean(values) if values else math.inf
    return mean if math.isfinite(mean) else None
