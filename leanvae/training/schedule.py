"""What depends on the step alone: rates, weights and seeds."""

import math

import numpy as np
import torch
from torch import Tensor


def learning_rate(step: int, highest: float, final: float, warmup_steps: int, max_steps: int) -> float:
    """Linear warm-up to `highest`, then a cosine down to `final` at the last step.

    Args:
        step: counted from 0; the rate is that of the update which makes step `step + 1`.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    final = min(final, highest)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    return final + (highest - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def ramp(step: int, start_step: int, warmup_steps: int) -> float:
    """0 before `start_step`, then linearly up to 1 over `warmup_steps`."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / (warmup_steps + 1))


def ema_decay(step: int, highest: float) -> float:
    """Decay of the averaged weights: rises to `highest`, so that the first weights are soon forgotten."""
    return min(highest, (1.0 + step) / (10.0 + step))


def sample_generator(purpose: str, seed: int, step: int, index: int) -> np.random.Generator:
    """Random numbers of one sample, the same on any number of ranks.

    Args:
        purpose: keeps different uses apart.
        seed: of the run.
        step: training step.
        index: place in the global batch.
    """
    return np.random.default_rng([*purpose.encode(), seed, step, index])


def posterior_noise(shape: tuple[int, ...], seed: int, step: int, indices: list[int]) -> Tensor:
    """Standard normal noise `(len(indices), *shape)` in float32, seeded sample by sample."""
    return torch.stack(
        [
            torch.from_numpy(sample_generator("posterior", seed, step, index).standard_normal(shape, np.float32))
            for index in indices
        ]
    )


def perceptual_frames(num_frames: int, group: int, seed: int, step: int, indices: list[int]) -> Tensor:
    """Frames that the perceptual loss sees: the first and one aligned group, drawn for each sample.

    Args:
        num_frames: T = group * n + 1.
        group: frames a latent frame.

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
