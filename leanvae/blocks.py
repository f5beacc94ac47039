"""Functions of single tokens, one block of tokens after the other, so that memory does not grow with the clip."""

from collections.abc import Callable

import torch
from torch import Tensor

# On CPUs few enough that what a function makes on the way stays in the cache; on GPUs enough to keep one busy.
BLOCK_TOKENS = {"cpu": 512, "cuda": 32768}


def tokenwise(function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """`function(*tokens)`; in blocks unless a gradient is recorded or the call is being compiled.

    Args:
        function: of each token alone, from `(N, D)` to `(N, O)` and `(..., D)` to `(..., O)`.
        tokens: `(..., D)`, each of a D of its own.

    Returns:
        `(..., O)`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*tokens)
    return in_blocks(function, *tokens)


def in_blocks(function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """`tokenwise` in blocks in any case, without a gradient."""
    axes = tokens[0].shape[:-1]
    rows = [x.reshape(-1, x.shape[-1]) for x in tokens]
    size = BLOCK_TOKENS.get(tokens[0].device.type, BLOCK_TOKENS["cuda"])
    num = len(rows[0])
    if num <= size:
        return function(*rows).view(*axes, -1)
    first = function(*(x[:size] for x in rows))
    out = first.new_empty(num, first.shape[-1])
    out[:size] = first
    for start in range(size, num, size):
        out[start : start + size] = function(*(x[start : start + size] for x in rows))
    return out.view(*axes, -1)
