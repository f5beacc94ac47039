"""Self-modulated convolution (LiteVAE, Section 4.2), for pointwise maps and 1D, 2D and 3D kernels."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def modulated_weight(weight: Tensor, scale: Tensor, gain: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale a weight by input channel, bring each output channel to unit norm, and apply the gain.

    With s the scale, w the weight and g the gain (LiteVAE, Equation 3 and the listing of the SMC block):

        w'[o, i, k] = g * s[i] * w[o, i, k] / sqrt(sum over i, k of (s[i] * w[o, i, k])^2 + eps)

    Equation 3 has no gain; the paper's listing has one, a single number per layer. It acts after the normalization,
    which would otherwise cancel it.

    Args:
        weight: `(O, I, *kernel)`.
        scale: `(I,)`.
        gain: `(1,)`, or anything that broadcasts against `(O, I, *kernel)`.
        eps: keeps a weight of zeros finite.

    Returns:
        The weight to convolve with, in the shape and dtype of `weight`; computed in float32 at least.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    kernel_axes = weight.ndim - 2
    modulated = weight.to(dtype) * scale.to(dtype).reshape(-1, *[1] * kernel_axes)
    inverse_norm = torch.rsqrt(modulated.square().flatten(1).sum(1) + eps)
    return (modulated * inverse_norm.reshape(-1, 1, *[1] * kernel_axes) * gain.to(dtype)).to(weight.dtype)


class _SelfModulated(nn.Module):
    """The parameters of a self-modulated map: weight, scale, gain and bias."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], bias: bool, gain_init: float
    ) -> None:
        super().__init__()
        self.gain_init = gain_init
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size))
        self.scale = nn.Parameter(torch.empty(in_channels))
        self.gain = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw PyTorch's default weights; set scales to one, the gain to `gain_init`, the bias to zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.ones_(self.scale)
        nn.init.constant_(self.gain, self.gain_init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _plain_weight(self) -> Tensor:
        return modulated_weight(self.weight, self.scale, self.gain)

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Return the weight of the plain map that computes the same (with the same bias), for inference.

        Returns:
            `(O, I, *kernel)`, without a gradient.
        """
        return self._plain_weight()

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}, gain_init={self.gain_init}"


class SelfModulatedLinear(_SelfModulated):
    """A self-modulated linear map of channels-last tokens: `(..., I)` to `(..., O)`."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True, gain_init: float = 1.0) -> None:
        """Make the map with PyTorch's default weights, scales of one and a bias of zero.

        Args:
            in_channels: width I of the input.
            out_channels: width O of the output.
            bias: whether a learned bias is added; it is not modulated.
            gain_init: initial gain; the last map of a residual branch starts small, at 0.1.
        """
        super().__init__(in_channels, out_channels, (), bias, gain_init)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._plain_weight(), self.bias)


class SelfModulatedConv(_SelfModulated):
    """A self-modulated convolution: `(B, I, *size)` to `(B, O, *size')`, with one to three axes of size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        bias: bool = True,
        gain_init: float = 1.0,
    ) -> None:
        """Make the convolution with PyTorch's default weights, scales of one and a bias of zero.

        Args:
            in_channels: channels I of the input.
            out_channels: channels O of the output.
            kernel_size: a number for each axis; one axis gives a 1D convolution, two 2D, three 3D.
            stride: step along all axes, or for each axis.
            padding: zeros on both sides of all axes, or for each axis.
            bias: whether a learned bias is added; it is not modulated.
            gain_init: initial gain; the last map of a residual branch starts small, at 0.1.

        Raises:
            ValueError: the kernel has no axis or more than three.
        """
        if len(kernel_size) not in _CONVOLUTIONS:
            raise ValueError(f"kernel_size {kernel_size} has {len(kernel_size)} axes: expected 1, 2 or 3")
        super().__init__(in_channels, out_channels, kernel_size, bias, gain_init)
        self.stride = stride
        self.padding = padding
        self._convolve = _CONVOLUTIONS[len(kernel_size)]

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self._plain_weight(), self.bias, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}"


class FoldedConv(nn.Module):
    """The plain convolution that equals a self-modulated one while its parameters do not change."""

    def __init__(self, conv: SelfModulatedConv) -> None:
        super().__init__()
        weight = conv.fold()
        if weight.ndim == 4:  # images are channels-last
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = conv.bias
        self._convolve = partial(conv._convolve, stride=conv.stride, padding=conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight, self.bias)
