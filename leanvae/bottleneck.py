"""The latent channel bottleneck: compressed sensing by unrolled ISTA-Net+, or plain linear maps.

The encoder measures the features with a matrix `phi`; the decoder recovers them by iterating a gradient step on
the measurement error and a proximal step whose sparsifying transform is learned (LeanVAE, Figure 1b; ISTA-Net+,
Zhang and Ghanem, 2018).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from leanvae.naf import NAFLayers, Past
from leanvae.ops import gradient_step, soft_threshold, tokenwise


class ISTABottleneck(nn.Module):
    """Measures features `(B, T, H, W, D)` into a latent `(B, T, H, W, Z)` and recovers them by ISTA-Net+.

    Args:
        dim: width D of the features.
        latent_channels: number Z of measurements.
        num_iterations: unrolled iterations.
        num_layers: NAF layers (without residuals) of each learned transform.
    """

    def __init__(self, dim: int, latent_channels: int, num_iterations: int, num_layers: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(latent_channels, dim) * dim**-0.5)
        self.initial = nn.Parameter(self.phi.detach().T.contiguous())  # Q of ISTA-Net+
        # One-element vectors, not scalars, which DeepSpeed cannot partition.
        self.steps = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(num_iterations))
        self.thresholds = nn.ParameterList(nn.Parameter(torch.full((1,), 0.01)) for _ in range(num_iterations))

        def transforms() -> nn.ModuleList:
            return nn.ModuleList(NAFLayers(dim, num_layers, residual=False) for _ in range(num_iterations))

        self.forward_transforms = transforms()
        self.backward_transforms = transforms()

    def compress(self, features: Tensor) -> Tensor:
        """The latent's mean, `features phi^T`."""
        return features @ self.phi.T

    def recover(self, z: Tensor, past: Sequence[Past] | None = None) -> tuple[Tensor, tuple[Past, ...]]:
        """Features `(B, T, H, W, D)` from a latent `(B, T, H, W, Z)`.

        Args:
            z: the latent.
            past: of each learned transform in the order in which they run, or `None` for a whole clip.

        Returns:
            The features, and the past of the next chunk.
        """
        x = z @ self.initial.T
        pasts = iter(past) if past is not None else None
        future = []
        for step, threshold, forward, backward in zip(
            self.steps, self.thresholds, self.forward_transforms, self.backward_transforms, strict=True
        ):
            x = tokenwise(partial(gradient_step, phi=self.phi, step=step), x, z)
            h, forward_past = forward(x, next(pasts) if pasts else None)
            h = tokenwise(partial(soft_threshold, threshold=threshold), h)
            h, backward_past = backward(h, next(pasts) if pasts else None)
            x = x + h
            future += [forward_past, backward_past]
        return x, tuple(future)

    @property
    def causal_stacks(self) -> list[NAFLayers]:
        """The learned transforms in the order in which `recover` runs them."""
        pairs = zip(self.forward_transforms, self.backward_transforms, strict=True)
        return [stack for pair in pairs for stack in pair]  # pyright: ignore[reportReturnType]


class LinearBottleneck(nn.Module):
    """Plain linear maps down to the latent and back (the autoencoder of LeanVAE's bottleneck ablation)."""

    causal_stacks: tuple[NAFLayers, ...] = ()

    def __init__(self, dim: int, latent_channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, latent_channels)
        self.up = nn.Linear(latent_channels, dim)

    def compress(self, features: Tensor) -> Tensor:
        """The latent's mean."""
        return self.down(features)

    def recover(self, z: Tensor, past: Sequence[Past] | None = None) -> tuple[Tensor, tuple[Past, ...]]:
        """Features from a latent; nothing is carried from chunk to chunk."""
        return self.up(z), ()
