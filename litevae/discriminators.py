"""Discriminators of images; the caller folds a clip's frames into the batch.

All take images in [-1, 1] and return a tuple of logits, positive for real, so that losses treat them alike. None uses
batch statistics: an image's logits depend only on that image, so a step is the same on any number of ranks.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.config import StrictConfig

_PATCH_KERNEL_SIZE = 4
_NEGATIVE_SLOPE = 0.2
_MAX_WIDENING = 8
_MAX_GROUPS = 32


class DiscriminatorConfig(StrictConfig):
    """Kind and size of a discriminator.

    Attributes:
        kind: `patch`, `unet` or `stylegan`: `PatchDiscriminator`, `UNetDiscriminator` or `StyleDiscriminator`.
        base_channels: width of the first layer; it doubles with each halving, up to eight times.
        num_layers: number of halvings: layers of stride 2 (`patch`; with three, each logit sees 70x70 pixels),
            downsamplings (`unet`) or residual blocks (`stylegan`).
    """

    kind: Literal["patch", "unet", "stylegan"] = "patch"
    base_channels: PositiveInt = 64
    num_layers: PositiveInt = 3


def build_discriminator(config: DiscriminatorConfig, in_channels: int = 3) -> nn.Module:
    """Build the discriminator that a configuration describes, with freshly drawn weights.

    Args:
        config: its kind and size.
        in_channels: channels of the images.

    Returns:
        A module that takes `(N, C, H, W)` in [-1, 1] and returns a tuple of logits with N first. Its `min_size` is the
        smallest H and W.
    """
    kinds = {"patch": PatchDiscriminator, "unet": UNetDiscriminator, "stylegan": StyleDiscriminator}
    return kinds[config.kind](in_channels, config.base_channels, config.num_layers)


def _widths(base_channels: int, num_layers: int) -> list[int]:
    return [base_channels * min(2**layer, _MAX_WIDENING) for layer in range(num_layers + 1)]


def _expect_min_size(images: Tensor, min_size: int, rule: str) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < min_size:
        raise ValueError(
            f"images are {height}x{width} pixels: this discriminator needs at least "
            f"{min_size}x{min_size} ({rule}); use larger crops or fewer layers"
        )


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, std: float | None = None
) -> nn.Conv2d:
    """Make a convolution with a bias of zero, padded by one pixel of zeros unless it is pointwise.

    The weights are normal, with deviation `std` or so that a leaky ReLU keeps the variance (He et al., 2015).
    """
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=min(1, kernel_size - 1))
    if std is None:
        nn.init.kaiming_normal_(convolution.weight, a=_NEGATIVE_SLOPE)
    else:
        nn.init.normal_(convolution.weight, std=std)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def _norm_and_activation(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(math.gcd(_MAX_GROUPS, channels), channels), nn.LeakyReLU(_NEGATIVE_SLOPE)]


class PatchDiscriminator(nn.Module):
    """PatchGAN: `(N, C, H, W)` to a logit for each patch, `(N, 1, H / 2**num_layers - 2, W / 2**num_layers - 2)`.

    Source: Isola et al., "Image-to-image translation with conditional adversarial networks" (2017), Section 6.1.2, with
    group instead of batch normalization.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        """Make the layers, with weights from a normal distribution of standard deviation 0.02.

        Args:
            in_channels: channels of the image.
            base_channels: width of the first layer; it doubles with each layer, up to eight times.
            num_layers: layers of stride 2.
        """
        super().__init__()
        self.min_size = 3 * 2**num_layers
        widths = _widths(base_channels, num_layers)
        layers: list[nn.Module] = [
            _convolution(in_channels, widths[0], _PATCH_KERNEL_SIZE, stride=2, std=0.02),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
        ]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            layers.append(_convolution(widths[layer - 1], widths[layer], _PATCH_KERNEL_SIZE, stride, std=0.02))
            layers += _norm_and_activation(widths[layer])
        layers.append(_convolution(widths[-1], 1, _PATCH_KERNEL_SIZE, std=0.02))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return logits of how real each patch looks, positive for real.

        Args:
            images: `(N, C, H, W)` in [-1, 1].

        Returns:
            One tensor, `(N, 1, h, w)`.

        Raises:
            ValueError: H or W leaves no room for a single logit.
        """
        _expect_min_size(images, self.min_size, "3 * 2**num_layers")
        return (self.layers(images),)


def _halve(x: Tensor) -> Tensor:
    """Average 2x2 pixels: `(N, C, H, W)` to `(N, C, ceil(H / 2), ceil(W / 2))`; odd edges average what exists."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def _double(x: Tensor, size: torch.Size) -> Tensor:
    """Repeat each pixel 2x2 times and crop to `size`: the positions of `_halve`, for even and odd sizes."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[..., : size[-2], : size[-1]]


class _DownBlock(nn.Module):
    """Pre-activation residual block that ends at half the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_norm_and_activation(in_channels),
            _convolution(in_channels, out_channels, 3),
            *_norm_and_activation(out_channels),
            _convolution(out_channels, out_channels, 3),
        )
        self.shortcut = _convolution(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return _halve(self.residual(x)) + self.shortcut(_halve(x))


class _UpBlock(nn.Module):
    """Pre-activation residual block that doubles the size before its first convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(*_norm_and_activation(in_channels))
        self.residual = nn.Sequential(
            _convolution(in_channels, out_channels, 3),
            *_norm_and_activation(out_channels),
            _convolution(out_channels, out_channels, 3),
        )
        self.shortcut = _convolution(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.residual(_double(self.activate(x), size)) + _double(self.shortcut(x), size)


class UNetDiscriminator(nn.Module):
    """UNet: `(N, C, H, W)` to a logit for the image and one for each pixel; any H and W from `min_size` on.

    Source: Schoenfeld et al., "A U-Net based discriminator for generative adversarial networks" (2020),
    Section 3.1: an encoder and a decoder of residual blocks with skips by concatenation, one logit from the
    bottleneck and one from each output pixel. Group normalization replaces spectral and batch normalization; a mean
    replaces the sum over the bottleneck, so that logits do not grow with the image.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        """Make the layers.

        Args:
            in_channels: channels of the image.
            base_channels: width at full size; it doubles with each halving, up to eight times.
            num_layers: number of halvings.
        """
        super().__init__()
        self.min_size = 2 * 2**num_layers
        widths = _widths(base_channels, num_layers)
        self.stem = _convolution(in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(_DownBlock(widths[i], widths[i + 1]) for i in range(num_layers))
        self.up_blocks = nn.ModuleList(
            _UpBlock(widths[i + 1] if i == num_layers - 1 else 2 * widths[i + 1], widths[i])
            for i in reversed(range(num_layers))
        )
        self.activate_bottleneck = nn.Sequential(*_norm_and_activation(widths[-1]))
        self.image_logit = _convolution(widths[-1], 1, 1, std=0.02)
        self.pixel_logits = nn.Sequential(
            *_norm_and_activation(2 * widths[0]), _convolution(2 * widths[0], 1, 3, std=0.02)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of how real the image and each of its pixels look, positive for real.

        Args:
            images: `(N, C, H, W)` in [-1, 1].

        Returns:
            The bottleneck's logits, `(N, 1, 1, 1)`, and the pixels', `(N, 1, H, W)`.

        Raises:
            ValueError: H or W leaves less than two positions in the bottleneck.
        """
        _expect_min_size(images, self.min_size, "2 * 2**num_layers")
        x = self.stem(images)
        skips = []
        for block in self.down_blocks:
            skips.append(x)
            x = block(x)
        image_logit = self.image_logit(self.activate_bottleneck(x).mean(dim=(2, 3), keepdim=True))
        for block in self.up_blocks:
            skip = skips.pop()
            x = torch.cat((block(x, skip.shape), skip), dim=1)
        return image_logit, self.pixel_logits(x)


def _blur(x: Tensor, padding: int) -> Tensor:
    """Apply the low-pass filter [1, 3, 3, 1] along both axes, zero-padded: each side grows by `2 * padding - 3`."""
    # Filled on the device: a tensor made from Python numbers would make the host wait for the device in every call.
    taps = x.new_ones(4)
    taps[1:3] = 3
    kernel = taps.outer(taps) / 64
    channels = x.shape[1]
    return F.conv2d(x, kernel.expand(channels, 1, 4, 4), padding=padding, groups=channels)


class _EqualisedConvolution(nn.Module):
    """Convolution whose weight has unit variance and is scaled at run time, so that all weights learn equally fast.

    Source: Karras et al., "Progressive growing of GANs" (2018), Section 4.1. With `halve`, the input is blurred
    and the convolution has stride 2: each side is halved, rounding down.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, halve: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.halve = halve
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = (in_channels * kernel_size**2) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        around = weight.shape[-1] // 2
        if self.halve:
            # Output i is centred between pixels 2i and 2i + 1 for either kernel size.
            return F.conv2d(_blur(x, padding=1 + around), weight, self.bias, stride=2)
        return F.conv2d(x, weight, self.bias, padding=around)


def _scaled_leaky_relu(x: Tensor) -> Tensor:
    """Apply a leaky ReLU times sqrt(2), which keeps a unit variance near 1."""
    return F.leaky_relu(x, _NEGATIVE_SLOPE) * math.sqrt(2)


class _StyleBlock(nn.Module):
    """Residual block without normalization that ends at half the size, rounded down."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = _EqualisedConvolution(in_channels, in_channels, 3)
        self.second = _EqualisedConvolution(in_channels, out_channels, 3, halve=True)
        self.shortcut = _EqualisedConvolution(in_channels, out_channels, 1, halve=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = _scaled_leaky_relu(self.second(_scaled_leaky_relu(self.first(x))))
        return (residual + self.shortcut(x)) * math.sqrt(0.5)


class StyleDiscriminator(nn.Module):
    """StyleGAN2's discriminator: `(N, C, H, W)` to a logit for each image; any H and W from `min_size` on.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN" (2020), Section 4.1: residual
    blocks with blurred downsampling and equalised learning rates. The minibatch standard deviation is left out, because
    it mixes the images of a batch. A mean over positions replaces the last dense layers, which would fix the image's
    size.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        """Make the layers, with weights from the standard normal distribution.

        Args:
            in_channels: channels of the image.
            base_channels: width at full size; it doubles with each block, up to eight times.
            num_layers: residual blocks, each of which halves the size.
        """
        super().__init__()
        self.min_size = 2**num_layers
        widths = _widths(base_channels, num_layers)
        self.stem = _EqualisedConvolution(in_channels, widths[0], 1)
        self.blocks = nn.Sequential(*(_StyleBlock(widths[i], widths[i + 1]) for i in range(num_layers)))
        self.last = _EqualisedConvolution(widths[-1], widths[-1], 3)
        self.position_logits = _EqualisedConvolution(widths[-1], 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return logits of how real each image looks, positive for real.

        Args:
            images: `(N, C, H, W)` in [-1, 1].

        Returns:
            One tensor, `(N, 1, 1, 1)`.

        Raises:
            ValueError: H or W would be halved to nothing.
        """
        _expect_min_size(images, self.min_size, "2**num_layers")
        x = self.blocks(_scaled_leaky_relu(self.stem(images)))
        logits = self.position_logits(_scaled_leaky_relu(self.last(x)))
        return (logits.mean(dim=(2, 3), keepdim=True),)
