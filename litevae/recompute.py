"""Activation checkpointing: a block keeps what it read, and its backward pass computes the rest again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A module that can do without its activations until the backward pass; `recompute_activations` turns it on."""

    recomputes = False

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`, of which the backward pass knows the inputs alone if the module recomputes.

        Args:
            function: draws no random numbers.
            inputs: tensors, and what else it takes.
        """
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def recompute_activations(model: nn.Module) -> None:
    """Makes the blocks of a model compute their activations again in the backward pass.

    The gradients are the same; the memory of a block's activations is needed for one block at a time, for the time of
    another forward pass.
    """
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recomputes = True
