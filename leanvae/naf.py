"""Neighbourhood-Aware Feedforward (NAF) layers of LeanVAE, on channels-last tokens `(B, T, H, W, D)`.

A layer is a causal depthwise 3x3x3 convolution, then a gated feedforward (LeanVAE, Figure 1b). Only the convolution
mixes positions; `leanvae.surroundings` tells it what lies around its tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvae import kernels
from leanvae.ops import geglu, layer_norm, tokenwise
from leanvae.surroundings import PAST_FRAMES, WHOLE, Whole
from litevae.recompute import Recomputable
from litevae.smc import SelfModulatedLinear

Norm = Literal["layer", "smc"]


def causal_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: bool = False
) -> Tensor:
    """Apply a depthwise 3x3x3 convolution, causal in time and zero-padded in space.

    Args:
        x: `(B, T, H, W, D)`.
        weight: `(D, 1, 3, 3, 3)`.
        bias: `(D,)`.
        past: `(B, 2, H, W, D)`, the two frames before `x`; `None` means zeros, for the start of a clip.
        residual: whether `x` is added to the result.

    Returns:
        `(B, T, H, W, D)`.
    """
    if kernels.usable(x):
        from leanvae.kernels.depthwise import causal_depthwise_conv as kernel

        return kernel(x, weight, bias, past, residual)
    num_frames, channels = x.shape[1], x.shape[-1]
    num_zeros = 0
    if past is not None:
        frames = torch.cat((past, x), dim=1)
    elif x.is_cpu and not torch.is_grad_enabled():
        # Padding both ends, although only the start needs it, is faster on CPUs than copying the clip behind zeros.
        frames, num_zeros = x, PAST_FRAMES
    else:
        frames = F.pad(x, (0, 0, 0, 0, 0, 0, PAST_FRAMES, 0))
    # Channels-last tokens already are a channels-last 3D image, so nothing is copied.
    y = F.conv3d(frames.movedim(-1, 1), weight, bias, padding=(num_zeros, 1, 1), groups=channels).movedim(1, -1)
    y = y[:, :num_frames]
    if not residual:
        return y
    return x + y if torch.is_grad_enabled() else y.add_(x)


class CausalDepthwiseConv(nn.Module):
    """Weights of `causal_depthwise_conv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, past: Tensor | None = None, residual: bool = False) -> Tensor:
        """Convolve tokens; see `causal_depthwise_conv`."""
        return causal_depthwise_conv(x, self.weight, self.bias, past, residual)


class FeedForward(nn.Module):
    """Gated feedforward: norm, linear to twice the inner width, GEGLU (value first, gate second), linear back.

    With `norm="smc"` there is no LayerNorm, and both linear maps are self-modulated. The second one's gain starts at
    0.1, because no norm tames the branch.
    """

    def __init__(self, dim: int, norm: Norm = "layer") -> None:
        super().__init__()
        inner = int(4 * 2 / 3 * dim)
        if norm == "smc":
            self.norm = None
            self.expand = SelfModulatedLinear(dim, 2 * inner, bias=False)
            self.contract = SelfModulatedLinear(inner, dim, bias=False, gain_init=0.1)
        else:
            self.norm = nn.LayerNorm(dim)
            self.expand = nn.Linear(dim, 2 * inner, bias=False)
            self.contract = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """Apply the feedforward to tokens `(..., D)`; `residual` adds the tokens."""
        expand, contract = linear_map(self.expand), linear_map(self.contract)

        def feedforward(tokens: Tensor) -> Tensor:
            normed = self._normalize(tokens)
            value, gate = expand(normed).chunk(2, dim=-1)
            y = contract(geglu(value, gate))
            return tokens + y if residual else y

        return tokenwise(feedforward, x)

    def _normalize(self, x: Tensor) -> Tensor:
        return x if self.norm is None else layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)


def linear_map(linear: nn.Linear | SelfModulatedLinear) -> Callable[[Tensor], Tensor]:
    """Return a linear map as a function; without gradients, a self-modulated one is folded only once."""
    if isinstance(linear, SelfModulatedLinear) and not torch.is_grad_enabled():
        return partial(F.linear, weight=linear.fold())
    return linear


class NAFLayers(Recomputable):
    """A stack of NAF layers, `(B, T, H, W, D)` to the same shape.

    Args:
        dim: width D.
        num_layers: number of layers.
        residual: `x + conv(x)`, then `x + feedforward(x)` (ResNAF); without it, plain composition (NAF).
        norm: see `FeedForward`.
    """

    def __init__(self, dim: int, num_layers: int, residual: bool = True, norm: Norm = "layer") -> None:
        super().__init__()
        self.dim = dim
        self.residual = residual
        self.convs = nn.ModuleList(CausalDepthwiseConv(dim) for _ in range(num_layers))
        self.feedforwards = nn.ModuleList(FeedForward(dim, norm) for _ in range(num_layers))

    def forward(self, x: Tensor, *, around: Whole = WHOLE) -> Tensor:
        """Run the layers on tokens `(B, T, H, W, D)`; a tile beyond the frame has none."""
        for conv, feedforward in zip(self.convs, self.feedforwards, strict=True):
            x = around.convolve(conv, x, self.residual)
            if x.numel():
                x = self.run(feedforward, x, self.residual)  # recomputable: it makes about twelve tensors as large as x
        return x


def init_linear_maps(module: nn.Module) -> None:
    """Initialise every `nn.Linear` below `module` as published: truncated normal 0.02, bias 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
