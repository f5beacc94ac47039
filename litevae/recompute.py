"""Activation checkpointing: a block saves only its input, and its backward pass computes the rest again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A module that can drop its activations until the backward pass; `recompute_activations` turns this on."""

    recomputes = False

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(*inputs)`; if the module recomputes, only the inputs are saved for the backward pass.

        Args:
            function: must not draw random numbers.
            inputs: its arguments.
        """
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


def recompute_activations(model: nn.Module) -> None:
    """Make a model's blocks recompute their activations in the backward pass.

    The gradients are the same. Memory holds the activations of one block at a time, at the cost of another forward
    pass.
    """
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recomputes = True
