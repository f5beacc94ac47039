"""Functions of single tokens, `(..., D)`: a Triton kernel each on GPUs, plain torch elsewhere.

Without gradients they run block by block, so that memory does not grow with the clip.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvae import kernels

# Small enough for a function's intermediate results to stay in a CPU's cache; large enough to keep a GPU busy.
BLOCK_TOKENS = {"cpu": 512, "cuda": 32768}


def tokenwise(function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Return `function(*tokens)`, computed in blocks unless a gradient is recorded or the call is being compiled.

    Args:
        function: of single tokens, from `(N, D)` to `(N, O)` and `(..., D)` to `(..., O)`.
        tokens: `(..., D)`, each with its own D.

    Returns:
        `(..., O)`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*tokens)
    return in_blocks(function, *tokens)


def in_blocks(function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Return `function(*tokens)`, computed in blocks without a gradient."""
    axes = tokens[0].shape[:-1]
    rows = [x.reshape(-1, x.shape[-1]) for x in tokens]
    size = BLOCK_TOKENS.get(tokens[0].device.type, BLOCK_TOKENS["cuda"])
    num = len(rows[0])
    if num <= size:
        out = function(*rows)
        return out.view(*axes, out.shape[-1])
    first = function(*(x[:size] for x in rows))
    out = first.new_empty(num, first.shape[-1])
    out[:size] = first
    for start in range(size, num, size):
        out[start : start + size] = function(*(x[start : start + size] for x in rows))
    return out.view(*axes, out.shape[-1])


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """Apply LayerNorm over the last axis, in the dtype of `x`.

    Args:
        x: `(..., D)`.
        scale: `(D,)`; `None` means ones.
        shift: `(D,)`; `None` means zeros.
        eps: keeps constant tokens finite.
    """
    if kernels.usable(x):
        from leanvae.kernels.feedforward import layer_norm as kernel

        return kernel(x, scale, shift, eps)
    return F.layer_norm(x, x.shape[-1:], scale, shift, eps)


def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """Return `value * gelu(gate)` with the exact GELU (Shazeer, 2020)."""
    if kernels.usable(gate):
        from leanvae.kernels.feedforward import geglu as kernel

        return kernel(value, gate)
    return value * F.gelu(gate)


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Return `sign(x) * max(|x| - threshold, 0)`, the proximal map of `threshold * |x|_1`, for one threshold."""
    if kernels.usable(x):
        from leanvae.kernels.ista import soft_threshold as kernel

        return kernel(x, threshold)
    return x.sign() * (x.abs() - threshold).relu()


def gradient_step(x: Tensor, z: Tensor, phi: Tensor, step: Tensor) -> Tensor:
    """Return `x - step * (x phi^T - z) phi`, a descent step on `|x phi^T - z|^2 / 2`.

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
