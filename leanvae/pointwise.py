"""Maths on single tokens, `(..., D)`: one Triton kernel each on GPUs, plain torch elsewhere."""

import torch.nn.functional as F
from torch import Tensor

from leanvae import kernels


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis, in the dtype of `x`.

    Args:
        x: `(..., D)`.
        scale: `(D,)`, or `None` for one.
        shift: `(D,)`, or `None` for zero.
        eps: what keeps constant tokens finite.
    """
    if kernels.usable(x):
        from leanvae.kernels.feedforward import layer_norm as kernel

        return kernel(x, scale, shift, eps)
    return F.layer_norm(x, x.shape[-1:], scale, shift, eps)


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """`value * gelu(gate)` with the exact GELU (Shazeer, 2020)."""
    if kernels.usable(gate):
        from leanvae.kernels.feedforward import geglu as kernel

        return kernel(value, gate)
    return value * F.gelu(gate)


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """`sign(x) * max(|x| - threshold, 0)`, the proximal map of `threshold * |x|_1`; `threshold` has one element."""
    if kernels.usable(x):
        from leanvae.kernels.ista import soft_threshold as kernel

        return kernel(x, threshold)
    return x.sign() * (x.abs() - threshold).relu()


def gradient_step(x: Tensor, z: Tensor, phi: Tensor, step: Tensor) -> Tensor:
    """`x - step * (x phi^T - z) phi`: descends `|x phi^T - z|^2 / 2`.

    Args:
        x: current estimate of the features, `(..., D)`.
        z: measurement, `(..., Z)`.
        phi: measurement matrix, `(Z, D)`.
        step: step size, one element.
    """
    if kernels.usable(x):
        from leanvae.kernels.ista import gradient_step as kernel

        return kernel(x, z, phi, step)
    return x - (step * (x @ phi.T - z)) @ phi
