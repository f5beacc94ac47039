"""LiteVAE: the image autoencoder (LiteVAE, Figure 1), and the SD-VAE that it is compared with."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from litevae.config import DOWNSAMPLING, LiteVAEConfig
from litevae.decoder import Decoder
from litevae.encoder import build_encoder
from litevae.pixels import check_pixels, crop, pad_to_multiple
from litevae.posterior import DiagonalGaussian


class LiteVAE(nn.Module):
    """Autoencoder of images, eight times smaller in each direction; pixels are in [-1, 1].

    Args:
        config: the architecture; the default is LiteVAE-B with 4 latent channels.
    """

    def __init__(self, config: LiteVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LiteVAEConfig()
        channels = config.latent_channels
        self.encoder = build_encoder(config)
        self.after_encoder = nn.Conv2d(2 * channels, 2 * channels, 1) if config.latent_conv else nn.Identity()
        self.before_decoder = nn.Conv2d(channels, channels, 1) if config.latent_conv else nn.Identity()
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of images.

        Args:
            x: `(B, 3, H, W)` in [-1, 1], of any H and W; what 8 does not divide is padded by replication of the last
                row and column.

        Returns:
            The posterior, `(B, Z, H', W')`; its `size` is the true `(H, W)`, which `decode` crops to.

        Raises:
            ValueError: the shape or dtype of `x` is wrong, or a value is not finite.
        """
        check_pixels(x, [4])
        padded = pad_to_multiple(x, DOWNSAMPLING).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.after_encoder(self.encoder(padded)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar, size=tuple(x.shape[2:]))

    def decode(self, latent: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Images of latents.

        Args:
            latent: `(B, Z, H', W')`.
            size: true `(H, W)` to crop to; without it the padded images.

        Returns:
            `(B, 3, H, W)`; about [-1, 1], not clamped.

        Raises:
            ValueError: the latent's shape is wrong, or `size` is not one that it can come from.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels or 0 in latent.shape:
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}: expected (B, {self.config.latent_channels}, H', W')"
            )
        latent = latent.contiguous(memory_format=torch.channels_last)
        images = self.decoder(self.before_decoder(latent))
        return images if size is None else crop(images, size, (DOWNSAMPLING, DOWNSAMPLING))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction of `x` from a sample of its posterior, and the posterior.

        Args:
            x: as in `encode`.
            noise: standard normal, of the latent's shape (`latent_shape`); without it the posterior's mean.
        """
        posterior = self.encode(x)
        latent = posterior.mode() if noise is None else posterior.sample_with(noise)
        return self.decode(latent, tuple(x.shape[2:])), posterior

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, each atomically."""
        from litevae.pretrained import save_pretrained

        save_pretrained("LiteVAE", self.config, self.state_dict(), folder)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Shape `(Z, H', W')` of the latent of an image `(H, W)`."""
        height, width = size
        return (self.config.latent_channels, -(-height // DOWNSAMPLING), -(-width // DOWNSAMPLING))

    @property
    def last_weights(self) -> list[Tensor]:
        """Weights of the decoder's last layer, at whose gradients the adaptive GAN weight looks (Equation 2)."""
        return [self.decoder.conv_out.conv.weight]
