"""Inception v3 (Szegedy et al., 2016) as the Fréchet inception distance uses it, for the weights of 2015-12-05.

Weights have torchvision's names. FID's network differs from torchvision's: averages exclude the padding, the last block
pools by maxima, and there are 1008 classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 2048
_SIDE = 299
_CLASSES = 1008

_Kernel = int | tuple[int, int]


class _Conv(NamedTuple):
    """A convolution of a block."""

    name: str
    channels: int
    kernel: _Kernel
    stride: int = 1


class _ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: _Kernel, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [side // 2 if pad and stride == 1 else 0 for side in sides]
        self.conv = nn.Conv2d(in_channels, out_channels, sides, stride, (padding[0], padding[1]), bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Parallel paths of convolutions and a pooled one; paths may share their first convolutions by name."""

    def __init__(
        self, in_channels: int, ways: Sequence[Sequence[_Conv]], pooled_channels: int | None, pool: str = "average"
    ) -> None:
        super().__init__()
        self._ways = [[conv.name for conv in way] for way in ways]
        self._pool = pool
        for way in ways:
            channels = in_channels
            for conv in way:
                if not hasattr(self, conv.name):
                    self.add_module(conv.name, _ConvBlock(channels, conv.channels, conv.kernel, conv.stride))
                channels = conv.channels
        if pooled_channels is not None:
            self.branch_pool = _ConvBlock(in_channels, pooled_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for way in self._ways:
            y = x
            for name in way:
                y = getattr(self, name)(y)
            outputs.append(y)
        if self._pool == "reduce":
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], dim=1)
        average = self._pool == "average"
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*outputs, self.branch_pool(pooled)], dim=1)


def _block_a(in_channels: int, pooled_channels: int) -> _Block:
    ways = [
        [_Conv("branch1x1", 64, 1)],
        [_Conv("branch5x5_1", 48, 1), _Conv("branch5x5_2", 64, 5)],
        [_Conv("branch3x3dbl_1", 64, 1), _Conv("branch3x3dbl_2", 96, 3), _Conv("branch3x3dbl_3", 96, 3)],
    ]
    return _Block(in_channels, ways, pooled_channels)


def _block_b() -> _Block:
    ways = [
        [_Conv("branch3x3", 384, 3, 2)],
        [_Conv("branch3x3dbl_1", 64, 1), _Conv("branch3x3dbl_2", 96, 3), _Conv("branch3x3dbl_3", 96, 3, 2)],
    ]
    return _Block(288, ways, None, "reduce")


def _block_c(inner: int) -> _Block:
    row, column = (1, 7), (7, 1)
    ways = [
        [_Conv("branch1x1", 192, 1)],
        [_Conv("branch7x7_1", inner, 1), _Conv("branch7x7_2", inner, row), _Conv("branch7x7_3", 192, column)],
        [
            _Conv("branch7x7dbl_1", inner, 1),
            _Conv("branch7x7dbl_2", inner, column),
            _Conv("branch7x7dbl_3", inner, row),
            _Conv("branch7x7dbl_4", inner, column),
            _Conv("branch7x7dbl_5", 192, row),
        ],
    ]
    return _Block(768, ways, 192)


def _block_d() -> _Block:
    ways = [
        [_Conv("branch3x3_1", 192, 1), _Conv("branch3x3_2", 320, 3, 2)],
        [
            _Conv("branch7x7x3_1", 192, 1),
            _Conv("branch7x7x3_2", 192, (1, 7)),
            _Conv("branch7x7x3_3", 192, (7, 1)),
            _Conv("branch7x7x3_4", 192, 3, 2),
        ],
    ]
    return _Block(768, ways, None, "reduce")


def _block_e(in_channels: int, pool: str) -> _Block:
    first = [_Conv("branch3x3_1", 384, 1)]
    double = [_Conv("branch3x3dbl_1", 448, 1), _Conv("branch3x3dbl_2", 384, 3)]
    ways = [
        [_Conv("branch1x1", 320, 1)],
        [*first, _Conv("branch3x3_2a", 384, (1, 3))],
        [*first, _Conv("branch3x3_2b", 384, (3, 1))],
        [*double, _Conv("branch3x3dbl_3a", 384, (1, 3))],
        [*double, _Conv("branch3x3dbl_3b", 384, (3, 1))],
    ]
    return _Block(in_channels, ways, 192, pool)


class InceptionV3(nn.Module):
    """A network from images to the features that FID compares; its weights have torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvBlock(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _ConvBlock(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _ConvBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = _ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = _ConvBlock(80, 192, 3, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b()
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _block_d()
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "maximum")
        self.fc = nn.Linear(FEATURES, _CLASSES)  # in the file, but not used by FID

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: `(N, 3, H, W)` in [0, 1]; rounded to 8 bits, as in image files, and resized to 299x299 bilinearly.

        Returns:
            `(N, 2048)`, averages over positions.
        """
        x = (255 * images).round() / 255
        x = 2 * F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))
