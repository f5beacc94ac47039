"""Discriminators of images; a clip's frames are folded into the batch by the caller."""

import math

from pydantic import PositiveInt
from torch import Tensor, nn

from litevae.config import StrictConfig

_KERNEL_SIZE = 4
_NEGATIVE_SLOPE = 0.2
_MAX_WIDENING = 8
_MAX_GROUPS = 32


class DiscriminatorConfig(StrictConfig):
    """Size of `PatchDiscriminator`.

    Attributes:
        base_channels: width of the first layer; it doubles a layer, up to eight times.
        num_layers: layers of stride 2; three give logits that see 70x70 pixels each.
    """

    base_channels: PositiveInt = 64
    num_layers: PositiveInt = 3


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, _KERNEL_SIZE, stride=stride, padding=1)
    nn.init.normal_(convolution.weight, std=0.02)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class PatchDiscriminator(nn.Module):
    """PatchGAN: `(N, C, H, W)` to one logit a patch, `(N, 1, H / 2**num_layers - 2, W / 2**num_layers - 2)`.

    The layout of Isola et al., "Image-to-image translation with conditional adversarial networks" (2017),
    Section 6.1.2, with normalisation by groups in place of batch normalisation: an image's logits depend on
    that image alone, so a step is the same on any number of ranks.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        """Makes the layers; weights are drawn from a normal distribution of standard deviation 0.02.

        Args:
            in_channels: channels of the image.
            base_channels: width of the first layer; it doubles a layer, up to eight times.
            num_layers: layers of stride 2.
        """
        super().__init__()
        self.min_size = 3 * 2**num_layers
        widths = [base_channels * min(2**layer, _MAX_WIDENING) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [
            _convolution(in_channels, widths[0], stride=2),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
        ]
        for layer in range(1, num_layers + 1):
            layers += [
                _convolution(widths[layer - 1], widths[layer], stride=2 if layer < num_layers else 1),
                nn.GroupNorm(math.gcd(_MAX_GROUPS, widths[layer]), widths[layer]),
                nn.LeakyReLU(_NEGATIVE_SLOPE),
            ]
        layers.append(_convolution(widths[-1], 1, stride=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of how real each patch looks, positive for real.

        Args:
            images: `(N, C, H, W)` in [-1, 1].

        Returns:
            `(N, 1, h, w)`.

        Raises:
            ValueError: H or W leaves no room for a single logit.
        """
        if min(images.shape[-2:]) < self.min_size:
            height, width = images.shape[-2:]
            raise ValueError(
                f"images are {height}x{width} pixels: this discriminator needs at least "
                f"{self.min_size}x{self.min_size} (3 * 2**num_layers); use larger crops or fewer layers"
            )
        return self.layers(images)
