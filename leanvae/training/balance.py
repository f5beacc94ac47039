"""Gradients of the reconstruction and the adversarial loss at the decoder's last layer (LiteVAE, Equation 2).

The losses are differentiated at the pixels, and the last convolution's weight gets its gradient from those and from
what the convolution read: no pass goes back through the network for it, which DeepSpeed would take for the step's own,
and no weight is looked at, which ZeRO-3 keeps in parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from litevae.decoder import Decoder


class LastLayer:
    """Remembers what a decoder's last convolution read in its last pass.

    Args:
        decoder: of the image autoencoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._finish = decoder.finish
        self._input: Tensor | None = None
        decoder.conv_out.conv.register_forward_pre_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0].detach()

    def weight_gradient(self, pixel_gradient: Tensor) -> Tensor:
        """Gradient of the (demodulated) weight `(O, I, 3, 3)`, in float32.

        Args:
            pixel_gradient: of a loss at the decoder's output, `(B, 3, H, W)`; H and W those of the padded images.
        """
        assert self._input is not None
        read = self._input.float()
        bands = self._finish_backward(pixel_gradient.float(), read)
        shape = (bands.shape[1], read.shape[1], 3, 3)
        return conv2d_weight(read, shape, bands, padding=1)

    def _finish_backward(self, pixel_gradient: Tensor, read: Tensor) -> Tensor:
        """Gradient at the convolution's output; what follows it is linear, so that any output serves."""
        height, width = read.shape[2:]
        factor = pixel_gradient.shape[2] // height
        output = read.new_zeros(len(read), 3 * factor**2, height, width, requires_grad=True)
        with torch.enable_grad():
            pixels = self._finish(output)
        return torch.autograd.grad(pixels, output, pixel_gradient)[0]


def mean_over_ranks(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Averages gradients over all ranks, in one reduction; every rank must pass the same shapes."""
    packed = torch.stack(list(gradients))
    if dist.is_initialized():
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return list(packed.unbind())
