"""Floating-point operations, counted on the meta device, where nothing is computed, so any size is possible.

A multiply-add counts as two. Convolutions, linear maps, matrix products and attention count. As usual, elementwise
operations, norms and wavelet butterflies do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leanvae.peers.models import Model, Size, decode, encode


@dataclass(frozen=True)
class Count:
    """The cost of a model at a size, for a batch of one.

    Attributes:
        encode, decode: floating-point operations.
        parameters: number of parameters.
    """

    encode: int
    decode: int
    parameters: int


def count_flops(function: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the floating-point operations of a function of meta tensors, and its result.

    Attention is counted as its two matrix products, which fused kernels would hide. Gradients are on, so that the count
    is that of the published model, and not of one folded for inference.
    """
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), torch.device("meta"), sdpa_kernel(SDPBackend.MATH), counter:
        result = function()
    return counter.get_total_flops(), result


def count(model: Model, vae: nn.Module, size: Size) -> Count:
    """Count a model's cost at a size.

    Args:
        model: its entry.
        vae: the module on the meta device.
        size: any size; it is padded to one that the model takes.
    """
    size = model.fit(size)
    num_tiles = model.num_tiles(size)
    if num_tiles > 1:
        size = model.fit(Size(1, 1, 1))  # one tile
    x = torch.empty(model.pixels_shape(size), device="meta")
    encode_flops, latent = count_flops(lambda: encode(model, vae, x))
    decode_flops, _ = count_flops(lambda: decode(vae, latent))
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    return Count(num_tiles * encode_flops, num_tiles * decode_flops, parameters)
