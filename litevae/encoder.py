"""Encoders of the image autoencoder: images `(B, 3, H, W)` to the parameters of a posterior, `(B, 2Z, H/8, W/8)`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.blocks import Middle, NormConv, ResBlock
from litevae.config import NUM_LEVELS, LiteVAEConfig
from litevae.unet import NAFNet, UNet, VisionTransformer
from litevae.wavelet import multilevel_dwt2d

_BANDS = 4 * 3  # a level's four bands of three colours
_CERTAIN_LOGVAR = -30.0  # smallest log-variance of a posterior
# Positions of a level's bands to compute at once without gradients; results do not depend on it. On CPUs, one 256x256
# image at a time stays in the caches and needs a sixth of the memory of eight.
_MAX_POSITIONS_ON_CPU = 2**14
_MAX_POSITIONS = 2**18


class WaveletEncoder(nn.Module):
    """LiteVAE's encoder (Section 4.1): features of each level's bands, brought to one size and aggregated."""

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        self.levels = config.levels
        names = ["shared"] if config.shared_extraction else [f"level{level}" for level in config.levels]
        self.extraction = nn.ModuleDict({name: _extraction(config) for name in names})
        self.aggregation = _aggregation(config, _BANDS * len(config.levels))

    def forward(self, images: Tensor) -> Tensor:
        pyramid = multilevel_dwt2d(images, NUM_LEVELS)
        features = [self._features(pyramid[level - 1] / 2**level, level) for level in self.levels]
        return self.aggregation(torch.cat(features, dim=1))

    def _features(self, bands: Tensor, level: int) -> Tensor:
        """Compute the features of a level's bands, averaged down to the size of the deepest level."""
        network = self.extraction["shared" if "shared" in self.extraction else f"level{level}"]
        factor = 2 ** (NUM_LEVELS - level)
        if torch.is_grad_enabled():
            return F.avg_pool2d(network(bands), factor)
        limit = _MAX_POSITIONS_ON_CPU if bands.device.type == "cpu" else _MAX_POSITIONS
        num_images = max(1, limit // (bands.shape[2] * bands.shape[3]))
        return torch.cat([F.avg_pool2d(network(some), factor) for some in bands.split(num_images)])


def _extraction(config: LiteVAEConfig) -> nn.Module:
    channels, multipliers = config.extraction_channels, config.extraction_multipliers
    if config.extraction == "unet":
        return UNet(_BANDS, _BANDS, channels, multipliers, config.num_res_blocks, config.encoder_norm)
    return NAFNet(_BANDS, _BANDS, channels * max(multipliers), len(multipliers) * config.num_res_blocks)


def _aggregation(config: LiteVAEConfig, in_channels: int) -> nn.Module:
    out_channels = 2 * config.latent_channels
    if config.aggregation == "vit":
        return VisionTransformer(in_channels, out_channels, config.vit_grid)
    channels, multipliers = config.aggregation_channels, config.aggregation_multipliers
    return UNet(in_channels, out_channels, channels, multipliers, config.num_res_blocks, config.encoder_norm)


class ConvEncoder(nn.Module):
    """The SD-VAE's encoder: residual blocks at full size, then at 1/2, 1/4 and 1/8, and a middle with attention.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models" (2022), the KL-regularised
    autoencoder with factor 8.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        widths = [config.encoder_channels * multiplier for multiplier in config.encoder_multipliers]
        self.conv_in = nn.Conv2d(3, config.encoder_channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.encoder_channels
        for index, width in enumerate(widths):
            blocks: list[nn.Module] = [
                ResBlock(before if block == 0 else width, width, "group") for block in range(config.num_res_blocks)
            ]
            if index < len(widths) - 1:
                blocks.append(Downsample(width))
            self.down.append(nn.Sequential(*blocks))
            before = width
        self.middle = Middle(before, "group", attention=True)
        self.conv_out = NormConv(before, 2 * config.latent_channels, "group")

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for blocks in self.down:
            x = blocks(x)
        return self.conv_out(self.middle(x))


class Downsample(nn.Module):
    """Convolution of stride 2, padded only on the right and below, as in the SD-VAE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class BandEncoder(nn.Module):
    """An encoder without weights: the wavelet bands are the latent (LiteVAE, Appendix B).

    `dwt` keeps the bands of the third level, 12 channels, divided by 8. `dwt2` adds the nine high bands of the second
    level, divided by 4; their 2x2 positions per latent element become channels. The posterior is certain: its
    log-variance is -30.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        self.with_second_level = config.encoder == "dwt2"

    def forward(self, images: Tensor) -> Tensor:
        _, second, third = multilevel_dwt2d(images, NUM_LEVELS)
        mean = third / 8
        if self.with_second_level:
            mean = torch.cat((mean, F.pixel_unshuffle(second[:, 3:] / 4, 2)), dim=1)
        return torch.cat((mean, torch.full_like(mean, _CERTAIN_LOGVAR)), dim=1)


def build_encoder(config: LiteVAEConfig) -> nn.Module:
    """Build the encoder that `config.encoder` names."""
    encoders = {"wavelet": WaveletEncoder, "sd": ConvEncoder, "dwt": BandEncoder, "dwt2": BandEncoder}
    return encoders[config.encoder](config)
