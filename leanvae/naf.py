"""Neighbourhood-Aware Feedforward (NAF) layers of LeanVAE, on channels-last tokens `(B, T, H, W, D)`.

A layer is a depthwise 3x3x3 convolution that sees no later frame, then a gated feedforward (LeanVAE, Figure 1b).
The convolution alone mixes positions. To go through a clip in chunks, pass the `past` that the chunk before
returned: the last two frames that each convolution read.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.smc import SelfModulatedLinear

Norm = Literal["layer", "smc"]
Past = tuple[Tensor, ...]
PAST_FRAMES = 2  # a 3x3x3 kernel looks two frames back


def causal_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """Depthwise 3x3x3 convolution, causal in time and zero-padded in space.

    Args:
        x: `(B, T, H, W, D)`.
        weight: `(D, 1, 3, 3, 3)`.
        bias: `(D,)`.
        past: `(B, 2, H, W, D)`, the two frames before `x`; zeros at the start of a clip if `None`.

    Returns:
        `(B, T, H, W, D)`.
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, PAST_FRAMES, 0)) if past is None else torch.cat((past, x), dim=1)
    # Channels-last tokens are a channels-last 3D image already: only the axes are renamed, nothing is copied.
    y = F.conv3d(x.movedim(-1, 1), weight, bias, padding=(0, 1, 1), groups=x.shape[-1])
    return y.movedim(1, -1)


class CausalDepthwiseConv(nn.Module):
    """Weights of `causal_depthwise_conv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the output, and with a `past` given also the past of the next chunk (a copy)."""
        y = causal_depthwise_conv(x, self.weight, self.bias, past)
        if past is None:
            return y, None
        return y, torch.cat((past, x[:, -PAST_FRAMES:]), dim=1)[:, -PAST_FRAMES:].clone()


class FeedForward(nn.Module):
    """Gated feedforward: norm, linear to twice the inner width, GEGLU (value first, gate second), linear back.

    With `norm="smc"` there is no LayerNorm and both linear maps are self-modulated; the gain of the second
    starts at 0.1, since no norm tames the branch.
    """

    def __init__(self, dim: int, norm: Norm = "layer") -> None:
        super().__init__()
        inner = int(4 * 2 / 3 * dim)
        if norm == "smc":
            self.norm = nn.Identity()
            self.expand = SelfModulatedLinear(dim, 2 * inner, bias=False)
            self.contract = SelfModulatedLinear(inner, dim, bias=False, gain_init=0.1)
        else:
            self.norm = nn.LayerNorm(dim)
            self.expand = nn.Linear(dim, 2 * inner, bias=False)
            self.contract = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))


class NAFLayers(nn.Module):
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

    def forward(self, x: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Tensor, Past]:
        """Runs the layers; `past` holds one `(B, 2, H, W, D)` tensor a layer, or is `None` for a whole clip.

        Returns:
            The tokens, and the past of the next chunk (empty if `past` is `None`).
        """
        future = []
        for index, (conv, feedforward) in enumerate(zip(self.convs, self.feedforwards, strict=True)):
            y, last_frames = conv(x, None if past is None else past[index])
            x = x + y if self.residual else y
            y = feedforward(x)
            x = x + y if self.residual else y
            if last_frames is not None:
                future.append(last_frames)
        return x, tuple(future)


def init_linear_maps(module: nn.Module) -> None:
    """Gives every `nn.Linear` below `module` the published initialisation: truncated normal 0.02, bias 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
