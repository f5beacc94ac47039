"""The latent channel bottleneck: compressed sensing by unrolled ISTA-Net+, or plain linear maps.

The encoder measures the features with a matrix `phi`. The decoder recovers them by alternating a gradient step on the
measurement error with a proximal step, whose sparsifying transform is learned (LeanVAE, Figure 1b; ISTA-Net+, Zhang and
Ghanem, 2018).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.naf import NAFLayers
from leanvae.ops import gradient_step, soft_threshold, tokenwise
from leanvae.surroundings import WHOLE, Whole


class ISTABottleneck(nn.Module):
    """Compressed sensing of features `(B, T, H, W, D)` as a latent `(B, T, H, W, Z)`, recovered by ISTA-Net+.

    Args:
        dim: width D of the features.
        latent_channels: number Z of measurements.
        num_iterations: unrolled iterations.
        num_layers: NAF layers (without residuals) in each learned transform.
    """

    def __init__(self, dim: int, latent_channels: int, num_iterations: int, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.phi = nn.Parameter(torch.randn(latent_channels, dim) * dim**-0.5)
        self.initial = nn.Parameter(self.phi.detach().T.contiguous())  # Q of ISTA-Net+
        # One-element vectors, because DeepSpeed cannot partition scalars.
        self.steps = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(num_iterations))
        self.thresholds = nn.ParameterList(nn.Parameter(torch.full((1,), 0.01)) for _ in range(num_iterations))

        def transforms() -> nn.ModuleList:
            return nn.ModuleList(NAFLayers(dim, num_layers, residual=False) for _ in range(num_iterations))

        self.forward_transforms = transforms()
        self.backward_transforms = transforms()

    def compress(self, features: Tensor) -> Tensor:
        """Return the latent's mean, `features phi^T`."""
        return features @ self.phi.T

    def recover(self, z: Any, *, around: Whole = WHOLE) -> Tensor:
        """Recover features `(B, T, H, W, D)` from a latent `(B, T, H, W, Z)`, which `around` may hold."""
        x = around.here(z) @ self.initial.T
        for step, threshold, forward, backward in zip(
            self.steps, self.thresholds, self.forward_transforms, self.backward_transforms, strict=True
        ):
            x = tokenwise(partial(gradient_step, phi=self.phi, step=step), x, around.here(z))
            before = around.hold(x, 2 * self.num_layers)
            h = forward(x, around=around)
            h = tokenwise(partial(soft_threshold, threshold=threshold), h)
            h = backward(h, around=around)
            x = around.here(before) + h  # only after the convolutions, which move a tile
        return x


class LinearBottleneck(nn.Module):
    """Linear maps to the latent and back (the autoencoder in LeanVAE's bottleneck ablation)."""

    def __init__(self, dim: int, latent_channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, latent_channels)
        self.up = nn.Linear(latent_channels, dim)

    def compress(self, features: Tensor) -> Tensor:
        """Return the latent's mean."""
        return self.down(features)

    def recover(self, z: Any, *, around: Whole = WHOLE) -> Tensor:
        """Recover features `(B, T, H, W, D)` from a latent `(B, T, H, W, Z)`, which `around` may hold."""
        return self.up(around.here(z))
