"""One training step: forward passes, losses, backward passes and updates of both networks."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from leanvae.model import LeanVAE
from leanvae.patchify import analyse
from leanvae.training.config import GANConfig, TrainVideoConfig
from leanvae.training.engine import Engine, frozen
from leanvae.training.schedule import learning_rate, perceptual_frames, posterior_noise, ramp
from litevae.losses import (
    hinge_d_loss,
    hinge_g_loss,
    kl,
    l1,
    lecam_penalty,
    logistic_d_loss,
    logistic_g_loss,
)
from litevae.perceptual import PerceptualDistance

_GENERATOR_LOSSES = {"hinge": hinge_g_loss, "non_saturating": logistic_g_loss}
_DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "logistic": logistic_d_loss}


def band_l1(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error of the low and of the high Haar bands (published recipe of LeanVAE).

    Each is the mean over the image frame's bands plus the mean over the video frames' bands, in the published
    scale of the bands.

    Args:
        prediction: clip `(B, 3, T, H, W)`, T odd, H and W even.
        target: the same shape.

    Returns:
        Two scalars: low bands, high bands.
    """
    difference = analyse(prediction - target)
    parts = [part.abs() for part in (difference.image, difference.video) if part is not None]
    low = torch.stack([part[:, :3].mean() for part in parts]).sum()
    high = torch.stack([part[:, 3:].mean() for part in parts]).sum()
    return low, high


def select_frames(clip: Tensor, frames: Tensor) -> Tensor:
    """Frames `(B, n)` of a clip `(B, C, T, H, W)` as images `(B * n, C, H, W)`."""
    batch = torch.arange(len(clip), device=clip.device)[:, None]
    return rearrange(clip.movedim(2, 1)[batch, frames.to(clip.device)], "b n c h w -> (b n) c h w")


def as_images(clip: Tensor) -> Tensor:
    """All frames of a clip `(B, C, T, H, W)` as images `(B * T, C, H, W)`."""
    return rearrange(clip, "b c t h w -> (b t) c h w")


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Averages scalars over all ranks, in one reduction; every rank must pass the same names."""
    if not values:
        return {}
    packed = torch.stack([value.detach().double() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return dict(zip(values, packed.tolist(), strict=True))


@dataclass
class LeCamAverages:
    """Running means of the discriminator's logits over all ranks (LeCam regularisation).

    Attributes:
        real: of real images, one number an output of the discriminator; empty before the first step.
        fake: of reconstructions, likewise.
    """

    real: list[float] = field(default_factory=list)
    fake: list[float] = field(default_factory=list)

    def of_output(self, output: int) -> tuple[float, float]:
        """Averages `(real, fake)` of an output, 0 before the first step."""
        return (self.real[output], self.fake[output]) if self.real else (0.0, 0.0)

    def update(self, real: Sequence[float], fake: Sequence[float], decay: float) -> None:
        """Takes in a step's means by output, which must already be those of all ranks."""
        self.real = _moved(self.real, real, decay)
        self.fake = _moved(self.fake, fake, decay)


def _moved(averages: Sequence[float], values: Sequence[float], decay: float) -> list[float]:
    before = averages or [0.0] * len(values)
    return [decay * average + (1.0 - decay) * value for average, value in zip(before, values, strict=True)]


class TrainingStep:
    """Trains the autoencoder and the discriminator for a step at a time.

    A step depends on the weights, the global batch and its number alone: noise and chosen frames are seeded by
    (seed, step, place in the global batch), so that it is the same on any number of ranks.

    Args:
        config: the run's configuration.
        vae: engine of the autoencoder.
        discriminator: engine of the discriminator; `None` without a GAN.
        perceptual: LPIPS; `None` to go without.
        device: where to compute.
    """

    def __init__(
        self,
        config: TrainVideoConfig,
        vae: Engine,
        discriminator: Engine | None,
        perceptual: PerceptualDistance | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.vae = vae
        self.discriminator = discriminator
        self.perceptual = perceptual
        self.device = device
        self.lecam = LeCamAverages()
        model = vae.module
        assert isinstance(model, LeanVAE)
        self._latent_shape = model.latent_shape
        self._frame_group = model.config.patch_size[0]

    def __call__(self, clips: Tensor, indices: list[int], step: int) -> dict[str, float]:
        """Updates both networks.

        Args:
            clips: this rank's part of the batch, uint8 `(n, 3, T, H, W)`.
            indices: places of these clips in the global batch.
            step: number of the step, from 0.

        Returns:
            Losses and rates, averaged over all ranks.
        """
        rates = self._set_learning_rates(step)
        size = self.config.training.micro_batch_size or len(clips)
        micro_batches = [
            (self._to_pixels(clips[start : start + size]), indices[start : start + size])
            for start in range(0, len(clips), size)
        ]
        logs: dict[str, list[Tensor]] = {}
        gan_weight = self._gan_weight(step)
        reconstructions = []
        # The autoencoder's pass through the discriminator must leave no gradients there.
        with frozen(self.discriminator.module) if self.discriminator else nullcontext():
            for clip, places in micro_batches:
                reconstructions.append(self._train_vae(clip, places, step, gan_weight, logs))
        if gan_weight:
            for (clip, _), reconstruction in zip(micro_batches, reconstructions, strict=True):
                self._train_discriminator(clip, reconstruction, logs)
        means = mean_over_ranks({name: torch.stack(values).mean() for name, values in logs.items()})
        if gan_weight and (gan := self.config.gan):
            real, fake = (
                [value for name, value in means.items() if name.startswith(kind)]
                for kind in ("logits_real", "logits_fake")
            )
            self.lecam.update(real, fake, gan.lecam_decay)
        return {**means, **rates}

    def _train_vae(
        self, clip: Tensor, indices: list[int], step: int, gan_weight: float, logs: dict[str, list[Tensor]]
    ) -> Tensor:
        """Accumulates (and after the last pass applies) the autoencoder's gradient; returns its output."""
        weights = self.config.losses
        seed = self.config.training.seed
        noise = posterior_noise(self._latent_shape(clip.shape[2:]), seed, step, indices)
        reconstruction, posterior = self.vae(clip.to(self.vae.dtype), noise.to(self.device, self.vae.dtype))
        reconstruction = reconstruction.float()
        low, high = band_l1(reconstruction, clip)
        terms = {
            "l1": (weights.l1, l1(reconstruction, clip)),
            "low_bands": (weights.low_bands, low),
            "high_bands": (weights.high_bands, high),
            "kl": (weights.kl, kl(posterior)),
        }
        if self.perceptual is not None:
            frames = perceptual_frames(clip.shape[2], self._frame_group, seed, step, indices)
            distance = self.perceptual(select_frames(reconstruction, frames), select_frames(clip, frames))
            terms["lpips"] = (weights.lpips, distance.mean())
        if gan_weight:
            terms["adversarial"] = (gan_weight, self._adversarial(reconstruction))
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        self.vae.backward(loss)
        for name, (_, value) in terms.items():
            logs.setdefault(name, []).append(value.detach())
        logs.setdefault("loss", []).append(loss.detach())
        return reconstruction.detach()

    def _adversarial(self, reconstruction: Tensor) -> Tensor:
        gan, discriminator = self._gan()
        outputs = discriminator.module(as_images(reconstruction).to(discriminator.dtype))
        return torch.stack([_GENERATOR_LOSSES[gan.generator_loss](logits) for logits in outputs]).sum()

    def _train_discriminator(self, clip: Tensor, reconstruction: Tensor, logs: dict[str, list[Tensor]]) -> None:
        """Accumulates (and after the last pass applies) the discriminator's gradient."""
        gan, discriminator = self._gan()
        images = torch.cat((as_images(clip), as_images(reconstruction)))
        losses, penalties = [], []
        for number, logits in enumerate(discriminator(images.to(discriminator.dtype))):
            real, fake = logits.float().chunk(2)
            losses.append(_DISCRIMINATOR_LOSSES[gan.loss](real, fake))
            average_real, average_fake = map(real.new_tensor, self.lecam.of_output(number))
            penalties.append(lecam_penalty(real, fake, average_real, average_fake))
            suffix = f"_{number}" if number else ""
            logs.setdefault(f"logits_real{suffix}", []).append(real.mean().detach())
            logs.setdefault(f"logits_fake{suffix}", []).append(fake.mean().detach())
        loss, penalty = torch.stack(losses).sum(), torch.stack(penalties).sum()
        discriminator.backward(loss + gan.lecam * penalty)
        logs.setdefault("discriminator", []).append(loss.detach())
        logs.setdefault("lecam", []).append(penalty.detach())

    def _gan(self) -> tuple[GANConfig, Engine]:
        assert self.config.gan is not None
        assert self.discriminator is not None
        return self.config.gan, self.discriminator

    def _gan_weight(self, step: int) -> float:
        gan = self.config.gan
        return gan.weight * ramp(step, gan.start_step, gan.warmup_steps) if gan else 0.0

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        optimizer, max_steps = self.config.optimizer, self.config.training.max_steps
        final, warmup = optimizer.final_learning_rate, optimizer.warmup_steps
        rates = {"learning_rate": learning_rate(step, optimizer.learning_rate, final, warmup, max_steps)}
        self.vae.set_learning_rate(rates["learning_rate"])
        if self.config.gan and self.discriminator:
            rate = learning_rate(step, self.config.gan.learning_rate, final, warmup, max_steps)
            self.discriminator.set_learning_rate(rate)
            rates["discriminator_learning_rate"] = rate
        return rates

    def _to_pixels(self, clips: Tensor) -> Tensor:
        """uint8 frames to float32 in [-1, 1], on the device."""
        return clips.to(self.device).float() / 127.5 - 1.0


def update_average(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Exponential moving average of weights, in place: `average += (1 - decay) * (weights - average)`."""
    torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), 1.0 - decay)
