"""Pure functions of a run's step number: phases of shapes, batch sizes and trained parts; rates, weights and seeds.

All of these are pure functions of the step's number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor

from leanvae.config import ConfigError
from leanvae.data.buckets import Bucket, Shape
from leanvae.data.order import Phase, phase_at, phases_of
from litevae.config import StrictConfig


class PhaseConfig(StrictConfig):
    """A stretch of a run; missing fields are as in `data` and `training`.

    Attributes:
        steps: optimizer steps.
        resolution: (height, width) in pixels, or one number for both.
        buckets: shapes of the samples, instead of a resolution; see `data.buckets`.
        batch: samples per step, over all ranks and passes.
        micro_batch: samples that a rank takes in one pass.
        tokens_per_batch: latent tokens per step, instead of `batch`.
        gan: whether the discriminator may train and count; phases without it come first.
        freeze: patterns of the autoencoder's parameters that stay unchanged, such as `[encoder.*]`.
    """

    steps: PositiveInt
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    buckets: tuple[Bucket, ...] = ()
    batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    tokens_per_batch: PositiveInt | None = None
    gan: bool = True
    freeze: tuple[str, ...] = ()

    @field_validator("resolution", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class BatchRule:
    """Number of samples of a bucket in a step, and of passes.

    Attributes:
        patch_size: pixels (frames, height, width) of a latent token.
        batch: samples per step, unless tokens count.
        micro_batch: samples that a rank takes in one pass; None takes its whole share.
        tokens_per_batch: most latent tokens per step.
        multiple: batch sizes by tokens are rounded down to a multiple of this.
        tokens_per_micro_batch: most latent tokens that a rank takes in one pass, but at least one sample.
    """

    patch_size: tuple[int, int, int]
    batch: int
    micro_batch: int | None = None
    tokens_per_batch: int | None = None
    multiple: int = 1
    tokens_per_micro_batch: int | None = None

    def tokens(self, bucket: Shape) -> int:
        """Return the latent tokens of a sample, whose first frame stands alone."""
        group, height, width = self.patch_size
        return (1 + -(-(bucket.frames - 1) // group)) * -(-bucket.height // height) * -(-bucket.width // width)

    def batch_size(self, bucket: Shape) -> int:
        """Return the samples of a step.

        Raises:
            ConfigError: not even the smallest batch has few enough tokens.
        """
        if self.tokens_per_batch is None:
            return self.batch
        size = self.tokens_per_batch // (self.tokens(bucket) * self.multiple) * self.multiple
        if not size:
            raise ConfigError(
                f"training.tokens_per_batch is {self.tokens_per_batch}: {self.multiple} of {bucket} have "
                f"{self.multiple * self.tokens(bucket)}"
            )
        return size

    def passes(self, bucket: Shape, world_size: int) -> int:
        """Return the passes of a step on each of `world_size` ranks.

        Raises:
            ConfigError: the batch does not divide among the ranks, or a rank's share into its passes.
        """
        batch = self.batch_size(bucket)
        share, rest = divmod(batch, world_size)
        if rest and self.tokens_per_batch:
            raise ConfigError(
                f"training.tokens_per_batch makes a step of {batch} of {bucket}, which {world_size} ranks cannot "
                f"share: set training.batch_multiple to {world_size}"
            )
        if rest:
            raise ConfigError(
                f"training.batch_size is {batch}: it must be divisible by the number of ranks, {world_size}"
            )
        if self.tokens_per_micro_batch is not None:
            most = max(1, self.tokens_per_micro_batch // self.tokens(bucket))
            return next(number for number in range(1, share + 1) if share % number == 0 and share // number <= most)
        number, rest = divmod(share, min(share, self.micro_batch or share))
        if rest:
            raise ConfigError(
                f"training.micro_batch_size is {self.micro_batch}: it must divide each rank's share of the batch, "
                f"{share}"
            )
        return number


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run, one after the other.

    Attributes:
        phases: the phases' data, for the loader.
        rules: batch sizes and passes, by phase.
        freeze: patterns of parameters that stay unchanged, by phase.
        gan_from: first step of a phase with the discriminator.
        max_steps: total steps.
    """

    phases: tuple[Phase, ...]
    rules: tuple[BatchRule, ...]
    freeze: tuple[tuple[str, ...], ...]
    gan_from: int
    max_steps: int

    def number_at(self, step: int) -> int:
        """Return the number of the phase that a step belongs to, from 0."""
        return self.phases.index(phase_at(self.phases, step))

    def all_passes(self, world_size: int) -> list[int]:
        """Return the passes of a step for every bucket in every phase.

        Raises:
            ConfigError: a batch does not divide among the ranks, or a rank's share into its passes.
        """
        return [
            rule.passes(bucket, world_size)
            for phase, rule in zip(self.phases, self.rules, strict=True)
            for bucket in phase.batches
        ]


def lay_out(
    stretches: Sequence[PhaseConfig],
    rules: Sequence[BatchRule],
    shapes: Sequence[Sequence[Shape]],
    max_steps: int | None,
) -> Curriculum:
    """Chain phases, up to `max_steps`.

    Raises:
        ConfigError: phases without a discriminator after one with it, or none with it.
    """
    batches = [
        {bucket: rule.batch_size(bucket) for bucket in buckets} for rule, buckets in zip(rules, shapes, strict=True)
    ]
    phases = phases_of((stretch.steps, sizes) for stretch, sizes in zip(stretches, batches, strict=True))
    flags = [stretch.gan for stretch in stretches]
    if flags != sorted(flags) or not flags[-1]:
        raise ConfigError("phases: gan may be false only in the first phases; to train without one write gan: null")
    steps = sum(stretch.steps for stretch in stretches)
    return Curriculum(
        phases=phases,
        rules=tuple(rules),
        freeze=tuple(stretch.freeze for stretch in stretches),
        gan_from=phases[flags.index(True)].first_step,
        max_steps=min(steps, max_steps or steps),
    )


def learning_rate(step: int, highest: float, final: float, warmup_steps: int, max_steps: int) -> float:
    """Warm up linearly to `highest`, then follow a cosine down to `final` at the last step.

    Args:
        step: counted from 0; the rate is that of the update which makes step `step + 1`.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    final = min(final, highest)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    return final + (highest - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ramp(step: int, start_step: int, warmup_steps: int) -> float:
    """Return 0 before `start_step`, then rise linearly to 1 over `warmup_steps`."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / (warmup_steps + 1))


def ema_decay(step: int, highest: float) -> float:
    """Return the decay of the averaged weights, which rises to `highest`, so that the first weights fade soon."""
    return min(highest, (1.0 + step) / (10.0 + step))


def sample_generator(purpose: str, seed: int, step: int, index: int) -> np.random.Generator:
    """Return a generator of one sample's random numbers, the same on any number of ranks.

    Args:
        purpose: keeps different uses apart.
        seed: seed of the run.
        step: training step.
        index: place in the global batch.
    """
    return np.random.default_rng([*purpose.encode(), seed, step, index])


def posterior_noise(shape: tuple[int, ...], seed: int, step: int, indices: list[int]) -> Tensor:
    """Draw standard normal noise `(len(indices), *shape)` in float32, seeded sample by sample."""
    return torch.stack(
        [
            torch.from_numpy(sample_generator("posterior", seed, step, index).standard_normal(shape, np.float32))
            for index in indices
        ]
    )


def perceptual_frames(num_frames: int, group: int, seed: int, step: int, indices: list[int]) -> Tensor:
    """Draw each sample's frames for the perceptual loss: the first and one aligned group.

    Args:
        num_frames: T = group * n + 1.
        group: frames per latent frame.

    Returns:
        int64 `(len(indices), 1 + group)`, or `(len(indices), 1)` for images.
    """
    num_groups = (num_frames - 1) // group
    rows = []
    for index in indices:
        row = [0]
        if num_groups:
            first = 1 + group * int(sample_generator("frames", seed, step, index).integers(num_groups))
            row += range(first, first + group)
        rows.append(row)
    return torch.tensor(rows)
