"""Blocks of the image autoencoders, on images `(B, C, H, W)`.

Without gradients, activations are overwritten as soon as nothing else reads them. At 256x256, that and the
channels-last layout save a third of the encoders' time and memory.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.recompute import Recomputable
from litevae.smc import SelfModulatedConv

Norm = Literal["group", "smc"]

_MAX_GROUPS = 32
_NORM_EPS = 1e-6
_RESIDUAL_GAIN = 0.1  # of a self-modulated residual branch at the start, which no norm tames


def group_norm(channels: int) -> nn.GroupNorm:
    """Make a GroupNorm with as many of 32 groups as divide the width (LiteVAE-S concatenates to 48 channels)."""
    return nn.GroupNorm(math.gcd(_MAX_GROUPS, channels), channels, eps=_NORM_EPS)


class NormConv(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution; with `smc`, SiLU and a self-modulated one (LiteVAE, Section 4.2)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, gain_init: float = 1.0) -> None:
        super().__init__()
        if norm == "group":
            self.norm = group_norm(in_channels)
            self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        else:
            self.norm = nn.Identity()
            self.conv = SelfModulatedConv(in_channels, out_channels, (3, 3), padding=1, gain_init=gain_init)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.conv(F.silu(normed, inplace=normed is not x and not torch.is_grad_enabled()))


class ResBlock(Recomputable):
    """Two `NormConv` and a skip, which is a 1x1 convolution if the widths differ (LiteVAE, Appendix G)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = NormConv(in_channels, out_channels, norm)
        self.conv2 = NormConv(out_channels, out_channels, norm, gain_init=_RESIDUAL_GAIN)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(self.conv1(x))
        return branch + self.skip(x) if torch.is_grad_enabled() else branch.add_(self.skip(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions, with GroupNorm before it and a residual around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # B C H W -> B (H W) C
        heads = (projection(tokens).unsqueeze(1) for projection in (self.query, self.key, self.value))
        attended = self.out(F.scaled_dot_product_attention(*heads).squeeze(1))
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class Middle(nn.Module):
    """Two residual blocks, with attention between them if asked for."""

    def __init__(self, channels: int, norm: Norm, attention: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, norm)
        self.attention = Attention(channels) if attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))
