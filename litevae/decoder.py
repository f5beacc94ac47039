"""The decoder of the image autoencoder: latents `(B, Z, h, w)` to images `(B, 3, 8h, 8w)`."""

from torch import Tensor, nn
from torch.nn import functional as F

from litevae.blocks import Middle, NormConv, ResBlock
from litevae.config import LiteVAEConfig
from litevae.wavelet import idwt2d


class Decoder(nn.Module):
    """The SD-VAE's decoder, with GroupNorm or self-modulated convolutions (LiteVAE, Sections 4.1 and 4.2).

    It has a middle with attention at 1/8 of the size, then levels with one residual block more than the encoder's and
    nearest upsampling between them. With `output_type="wavelet"` the last upsampling is left out. The output, times 2,
    is then the bands of the first wavelet level, which the inverse transform turns into the image.
    """

    def __init__(self, config: LiteVAEConfig) -> None:
        super().__init__()
        norm = config.decoder_norm
        widths = [config.decoder_channels * multiplier for multiplier in reversed(config.decoder_multipliers)]
        self.gives_bands = config.output_type == "wavelet"
        num_upsamplings = len(widths) - 1 - int(self.gives_bands)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], norm, config.decoder_attention)
        self.up = nn.ModuleList()
        for index, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks: list[nn.Module] = [
                ResBlock(before if block == 0 else width, width, norm) for block in range(config.num_res_blocks + 1)
            ]
            if index < num_upsamplings:
                blocks.append(Upsample(width))
            self.up.append(nn.Sequential(*blocks))
        self.conv_out = NormConv(widths[-1], 12 if self.gives_bands else 3, norm)

    def forward(self, latent: Tensor) -> Tensor:
        return self.finish(self.conv_out(self.features(latent)))

    def features(self, latent: Tensor) -> Tensor:
        """Return the feature maps of the last residual block, before the output convolution (LiteVAE, Figure 3)."""
        x = self.middle(self.conv_in(latent))
        for blocks in self.up:
            x = blocks(x)
        return x

    def finish(self, output: Tensor) -> Tensor:
        """Turn the output convolution's result into images: unchanged, or by the inverse wavelet transform."""
        return idwt2d(2 * output) if self.gives_bands else output


class Upsample(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
