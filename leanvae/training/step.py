"""One training step: forward passes, losses, backward passes and updates of both networks."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from leanvae.data.buckets import Shape
from leanvae.distributed import mean_over_ranks, world_size
from leanvae.training.config import TrainConfig
from leanvae.training.curriculum import learning_rate, perceptual_frames, posterior_noise, ramp
from leanvae.training.engine import Engine, frozen
from leanvae.training.gan import GANConfig
from leanvae.training.losses import Perceptual, as_images, reconstruction_terms, weighted_sum
from litevae.decoder import Decoder
from litevae.losses import (
    adaptive_weight,
    gradient_norm,
    hinge_d_loss,
    hinge_g_loss,
    lecam_penalty,
    logistic_d_loss,
    logistic_g_loss,
)

_GENERATOR_LOSSES = {"hinge": hinge_g_loss, "non_saturating": logistic_g_loss}
_DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "logistic": logistic_d_loss}


@dataclass
class LeCamAverages:
    """Running means of the discriminator's logits over all ranks (LeCam regularisation).

    Attributes:
        real: means for real images, by output of the discriminator; empty before the first step.
        fake: means for reconstructions, in the same form.
    """

    real: list[float] = field(default_factory=list)
    fake: list[float] = field(default_factory=list)

    def of_output(self, output: int) -> tuple[float, float]:
        """Return the averages `(real, fake)` of an output, 0 before the first step."""
        return (self.real[output], self.fake[output]) if self.real else (0.0, 0.0)

    def update(self, real: Sequence[float], fake: Sequence[float], decay: float) -> None:
        """Add a step's means by output, which must already be averaged over ranks."""
        self.real = _moved(self.real, real, decay)
        self.fake = _moved(self.fake, fake, decay)


def _moved(averages: Sequence[float], values: Sequence[float], decay: float) -> list[float]:
    before = averages or [0.0] * len(values)
    return [decay * average + (1.0 - decay) * value for average, value in zip(before, values, strict=True)]


class LastLayer:
    """The last input of a decoder's final convolution, from which its weight's gradients follow.

    The losses are differentiated at the pixels. The weight's gradient follows from that and from the convolution's
    input (LiteVAE, Equation 2). So there is no backward pass through the network, which DeepSpeed would take for the
    step's own, and no weight is read, which ZeRO-3 keeps in parts.

    Args:
        decoder: decoder of the image autoencoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._finish = decoder.finish
        self._input: Tensor | None = None
        decoder.conv_out.conv.register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0].detach()

    def forget(self) -> None:
        """Free the stored input."""
        self._input = None

    def weight_gradient(self, pixel_gradient: Tensor) -> Tensor:
        """Return the gradient of the (demodulated) weight `(O, I, 3, 3)`, in float32.

        Args:
            pixel_gradient: of a loss at the decoder's output, `(B, 3, H, W)`; H and W are those of the padded images.
        """
        assert self._input is not None
        read = self._input.float()
        bands = self._finish_backward(pixel_gradient.float(), read)
        shape = (bands.shape[1], read.shape[1], 3, 3)
        return conv2d_weight(read, shape, bands, padding=1)

    def _finish_backward(self, pixel_gradient: Tensor, read: Tensor) -> Tensor:
        """Return the gradient at the convolution's output; the rest is linear, so its position does not matter."""
        height, width = read.shape[2:]
        factor = pixel_gradient.shape[2] // height
        output = read.new_zeros(len(read), 3 * factor**2, height, width, requires_grad=True)
        with torch.enable_grad():
            pixels = self._finish(output)
        return torch.autograd.grad(pixels, output, pixel_gradient)[0]


class TrainingStep:
    """The training of autoencoder and discriminator, one step per call.

    A step depends only on the weights, the global batch and the step number: noise and chosen frames are seeded by
    (seed, step, place in the global batch), so a step is the same on any number of ranks.

    Args:
        config: the run's configuration.
        vae: engine of the autoencoder.
        discriminator: engine of the discriminator; None without a GAN.
        perceptual: networks of the perceptual losses, by term.
        average: the autoencoder with the averaged weights, for the LDL loss.
        device: device to compute on.

    Attributes:
        lecam: LeCam's averages.
        gan_factor: factor applied to the weight of the adversarial loss.
    """

    def __init__(
        self,
        config: TrainConfig,
        vae: Engine,
        discriminator: Engine | None,
        perceptual: Perceptual,
        average: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.vae = vae
        self.discriminator = discriminator
        self.perceptual = perceptual
        self.average = average
        self.device = device
        self.lecam = LeCamAverages()
        self.gan_factor = 1.0
        self.curriculum = config.curriculum
        self._phase: int | None = None
        self._batch: tuple[int, int] | None = None
        model: Any = vae.module
        self._latent_shape = model.latent_shape
        looks_at_gradients = config.gan is not None and config.gan.looks_at_gradients
        self._last_layer = LastLayer(model.decoder) if looks_at_gradients else None

    def __call__(self, pixels: Tensor, indices: list[int], step: int) -> dict[str, float]:
        """Update both networks.

        Args:
            pixels: this rank's part of the batch, uint8 clips `(n, 3, T, H, W)` or images `(n, 3, H, W)`; a video model
                gets images as clips of one frame.
            indices: places of these samples in the global batch.
            step: number of the step, from 0.

        Returns:
            Losses and rates, averaged over all ranks. `skipped` is 1 if a loss or a gradient was not finite on any
            rank; then neither the networks nor LeCam's averages were updated.
        """
        size = self._set_batch(pixels, step)
        rates = self._set_learning_rates(step)
        logs: dict[str, list[Tensor]] = {}
        gan_weight = self.gan_weight(step)
        for start in range(0, len(pixels), size):
            part = slice(start, start + size)
            self._train_on(pixels[part], indices[part], step, gan_weight, logs)
        engines = [engine for engine in (self.vae, self.discriminator if gan_weight else None) if engine]
        values = {name: torch.stack(values).mean() for name, values in logs.items()}
        # A norm is finite only if the whole gradient is, and a mean over ranks only if every rank's value is.
        sizes = {f"gradient_{number}": engine.gradient_size() for number, engine in enumerate(engines)}
        reported = values | sizes
        packed = torch.stack([value.double() for value in reported.values()])
        means = dict(zip(reported, mean_over_ranks(packed).tolist(), strict=True))
        finite = all(map(math.isfinite, means.values()))
        for engine in engines:
            if finite:
                engine.update()
            else:
                engine.skip_update()
        if finite and gan_weight and (gan := self.config.gan):
            real, fake = (
                [value for name, value in means.items() if name.startswith(kind)]
                for kind in ("logits_real", "logits_fake")
            )
            self.lecam.update(real, fake, gan.lecam_decay)
        return {**{name: means[name] for name in values}, **rates, "skipped": float(not finite)}

    def _set_batch(self, pixels: Tensor, step: int) -> int:
        """Tell the engines the step's frozen parts and batch size; return the samples of a pass."""
        phase = self.curriculum.number_at(step)
        if phase != self._phase:
            self._phase = phase
            self.vae.set_frozen(self.curriculum.freeze[phase])
        bucket = Shape(pixels.shape[2] if pixels.ndim == 5 else 1, *pixels.shape[-2:])
        passes = self.curriculum.rules[phase].passes(bucket, world_size())
        batch = (len(pixels) * world_size(), passes)
        if batch != self._batch:
            self._batch = batch
            for engine in (self.vae, self.discriminator):
                if engine:
                    engine.set_batch(*batch)
        return len(pixels) // passes

    def _train_on(
        self, pixels: Tensor, indices: list[int], step: int, gan_weight: float, logs: dict[str, list[Tensor]]
    ) -> None:
        """Accumulate both networks' gradients over a micro-batch, and keep only figures."""
        target = self._to_pixels(pixels)
        # The autoencoder's pass through the discriminator must leave no gradients there.
        with frozen(self.discriminator.module) if self.discriminator else nullcontext(), self.vae.training():
            reconstruction = self._train_vae(target, indices, step, gan_weight, logs)
        if gan_weight:
            self._train_discriminator(target, reconstruction, logs)

    def _train_vae(
        self, target: Tensor, indices: list[int], step: int, gan_weight: float, logs: dict[str, list[Tensor]]
    ) -> Tensor:
        """Accumulate the autoencoder's gradient; return its output."""
        seed = self.config.training.seed
        noise = posterior_noise(self._latent_shape(target.shape[2:]), seed, step, indices).to(self.device)
        prediction, posterior = self.vae(target.to(self.vae.dtype), noise.to(self.vae.dtype))
        prediction = pixels = prediction.float()
        if gan_weight and self._looks_at_gradients(step):
            pixels = prediction.detach().requires_grad_()
        frames = None
        if target.ndim == 5:
            frames = perceptual_frames(target.shape[2], self.config.patch_size[0], seed, step, indices)
        terms = reconstruction_terms(
            self.config.losses,
            step,
            pixels,
            target,
            self.config.patch_size,
            posterior,
            self.perceptual,
            frames,
            lambda: self._average_prediction(target, noise),
        )
        loss, weight, at_pixels = weighted_sum(terms), gan_weight, None
        values = {name: value for name, (_, value) in terms.items()}
        if gan_weight:
            adversarial = values["adversarial"] = self._adversarial(pixels)
            if pixels is not prediction:
                weight, at_pixels = self._balanced(loss, adversarial, pixels, gan_weight, values)
            loss = loss + weight * adversarial
        values["loss"] = loss
        for name, value in values.items():
            logs.setdefault(name, []).append(value.detach())
        if at_pixels is not None:
            # Gives the network the same gradients: those at the pixels, computed above, and the KL term's.
            kl_weight, divergence = terms["kl"]
            loss = (prediction * at_pixels).sum() + kl_weight * divergence
        if self._last_layer:
            self._last_layer.forget()
        self.vae.backward(loss)
        return prediction.detach()

    def _looks_at_gradients(self, step: int) -> bool:
        gan, _ = self._gan()
        return gan.weighting == "adaptive" or (gan.log_gradient_ratio and self.config.training.is_logged(step))

    @torch.no_grad()
    def _average_prediction(self, target: Tensor, noise: Tensor) -> Tensor:
        assert self.average is not None
        return self.average(target, noise)[0]

    def _adversarial(self, prediction: Tensor) -> Tensor:
        gan, discriminator = self._gan()
        outputs = discriminator.module(as_images(prediction).to(discriminator.dtype))
        return torch.stack([_GENERATOR_LOSSES[gan.generator_loss](logits) for logits in outputs]).sum()

    def _balanced(
        self,
        reconstruction: Tensor,
        adversarial: Tensor,
        pixels: Tensor,
        gan_weight: float,
        values: dict[str, Tensor],
    ) -> tuple[Tensor | float, Tensor]:
        """Return the adversarial loss's weight and both losses' gradient at the pixels; record the gradients' ratio.

        Norms are those of the gradients averaged over all ranks, so that every rank gets the same.
        """
        assert self._last_layer is not None
        at_pixels = [torch.autograd.grad(loss, pixels)[0] for loss in (reconstruction, adversarial)]
        at_weight = torch.stack([self._last_layer.weight_gradient(gradient) for gradient in at_pixels])
        at_weight = mean_over_ranks(at_weight).unbind()
        weight: Tensor | float = gan_weight
        if self._gan()[0].weighting == "adaptive":
            weight = adaptive_weight(at_weight[:1], at_weight[1:], factor=gan_weight)
            values["adaptive_weight"] = weight
        norms = [gradient_norm([gradient]) for gradient in at_weight]
        values["gradient_ratio"] = weight * norms[1] / norms[0].clamp_min(1e-12)
        return weight, at_pixels[0] + weight * at_pixels[1]

    def _train_discriminator(self, target: Tensor, prediction: Tensor, logs: dict[str, list[Tensor]]) -> None:
        """Accumulate the discriminator's gradient."""
        gan, discriminator = self._gan()
        images = torch.cat((as_images(target), as_images(prediction)))
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

    def gan_weight(self, step: int) -> float:
        """Return the weight of the adversarial loss in a step."""
        gan = self.config.gan
        if gan is None:
            return 0.0
        start_step = max(gan.start_step, self.curriculum.gan_from)
        return self.gan_factor * gan.weight * ramp(step, start_step, gan.warmup_steps)

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        optimizer, max_steps = self.config.optimizer, self.curriculum.max_steps
        final, warmup = optimizer.final_learning_rate, optimizer.warmup_steps
        rates = {"learning_rate": learning_rate(step, optimizer.learning_rate, final, warmup, max_steps)}
        self.vae.set_learning_rate(rates["learning_rate"])
        if self.config.gan and self.discriminator:
            rate = learning_rate(step, self.config.gan.learning_rate, final, warmup, max_steps)
            self.discriminator.set_learning_rate(rate)
            rates["discriminator_learning_rate"] = rate
        return rates

    def _to_pixels(self, pixels: Tensor) -> Tensor:
        """Bring uint8 pixels to the device, as float32 in [-1, 1]."""
        return pixels.to(self.device).float().div_(127.5).sub_(1.0)


def update_average(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Move averaged weights towards new ones, in place: `average += (1 - decay) * (weights - average)`."""
    torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), 1.0 - decay)
