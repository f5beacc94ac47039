"""Networks that extract and aggregate features of wavelet bands, all at one resolution."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.blocks import Middle, Norm, ResBlock
from litevae.recompute import Recomputable


class UNet(nn.Module):
    """UNet without down- or upsampling, `(B, I, H, W)` to `(B, O, H, W)` (LiteVAE, Figure 1 and Appendix G).

    It has an input convolution (3x3), residual blocks that widen, a middle of two, a mirrored path with skips by
    concatenation, and an output convolution (3x3) without a norm before it. The last skip in the paper's listing, from
    the input convolution, is never read.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int = 2,
        norm: Norm = "group",
    ) -> None:
        """Make the layers.

        Args:
            in_channels: channels I.
            out_channels: channels O.
            channels: base width.
            multipliers: width of each level over the base width.
            num_res_blocks: residual blocks per level on each path.
            norm: `group`, or `smc` for self-modulated convolutions without norms.
        """
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers for _ in range(num_res_blocks)]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            ResBlock(before, width, norm) for before, width in zip([channels, *widths], widths, strict=False)
        )
        self.middle = Middle(widths[-1], norm, attention=False)
        mirrored = widths[::-1]
        self.up = nn.ModuleList(
            ResBlock(before + width, width, norm)
            for before, width in zip([mirrored[0], *mirrored], mirrored, strict=False)
        )
        self.conv_out = nn.Conv2d(channels * multipliers[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.up:
            x = torch.cat((x, skips.pop()), dim=1)
            x = block(x)
        return self.conv_out(x)


class NAFNetBlock(Recomputable):
    """Block of NAFNet: gated depthwise convolution with channel attention, then a gated feedforward.

    Source: Chen et al., "Simple baselines for image restoration" (2022), Figure 3d. A gate is the product of the two
    halves of the channels. The channel attention reads the mean over the whole image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.expand1 = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.contract1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.LayerNorm(channels)
        self.expand2 = nn.Conv2d(channels, 2 * channels, 1)
        self.contract2 = nn.Conv2d(channels, channels, 1)
        self.scale1 = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale2 = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        gated = _gate(self.depthwise(self.expand1(_at_positions(self.norm1, x))))
        gated = gated * self.attention(gated.mean((2, 3), keepdim=True))
        x = x + self.scale1 * self.contract1(gated)
        return x + self.scale2 * self.contract2(_gate(self.expand2(_at_positions(self.norm2, x))))


def _at_positions(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalize the channels of each position of `(B, C, H, W)`."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def _gate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=1)
    return value * gate


class NAFNet(nn.Module):
    """NAFNet at one resolution, `(B, I, H, W)` to `(B, O, H, W)`: blocks between two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(NAFNetBlock(channels) for _ in range(num_blocks)))
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.blocks(self.conv_in(x)))


class TransformerBlock(Recomputable):
    """Pre-norm self-attention and MLP on tokens `(B, N, D)` (Dosovitskiy et al., 2021)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, mlp_ratio * dim)
        self.contract = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)  # B heads 3 N d
        attended = F.scaled_dot_product_attention(*qkv.unbind(2))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Transformer over the positions of a fixed grid, `(B, I, h, w)` to `(B, O, h, w)` (LiteVAE, Table 20).

    The paper gives no sizes. Width 128, 4 blocks and 4 heads have 0.83M parameters on a 16x16 grid; the paper has
    0.84M.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        grid: tuple[int, int],
        dim: int = 128,
        num_blocks: int = 4,
        num_heads: int = 4,
    ) -> None:
        """Make the layers.

        Args:
            in_channels: channels I.
            out_channels: channels O.
            grid: height and width of every input; each position has its own embedding.
            dim: width of the tokens.
            num_blocks: transformer blocks.
            num_heads: heads of the attention.
        """
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(in_channels, dim)
        self.position = nn.Parameter(torch.empty(math.prod(grid), dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.grid:
            raise ValueError(
                f"the ViT aggregation was built for latents of {self.grid[0]}x{self.grid[1]} (vit_grid), "
                f"and the image gives {x.shape[2]}x{x.shape[3]}: resize it, or use a UNet for aggregation"
            )
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + self.position  # B C h w -> B (h w) D
        tokens = self.project(self.norm(self.blocks(tokens)))
        return tokens.transpose(1, 2).unflatten(2, self.grid)
