"""The network of LeanVAE, stated once: encoder, decoder, and a clip's path through them (LeanVAE, Figure 1a).

Whole clips, chunks and tiles take the same path. They differ in what lies around their tokens (`leanvae.surroundings`).
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from leanvae.config import LeanVAEConfig
from leanvae.naf import NAFLayers
from leanvae.patchify import PatchEmbedding, PatchProjection, stream_widths
from leanvae.surroundings import WHOLE, Whole


class Layers(Protocol):
    """The parts of a LeanVAE that compute: the model's own, or prepared ones."""

    config: LeanVAEConfig
    encoder: Any
    bottleneck: Any
    logvar: Any
    decoder: Any


class Encoder(nn.Module):
    """Pixels to features: a stream of residual NAF layers each for the low and the high bands, then fused ones."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config)
        self.streams = nn.ModuleDict(
            {name: NAFLayers(width, config.num_stream_layers) for name, width in stream_widths(config).items()}
        )
        self.fusion = NAFLayers(config.hidden_channels, config.num_fusion_layers)

    def forward(self, pixels: Tensor, *, around: Whole = WHOLE, starts_clip: bool = True) -> Tensor:
        """Turn pixels `(B, 3, T, H, W)` in [-1, 1] into features `(B, T', H', W', D)`; see `PatchEmbedding`."""
        streams = around.side_by_side(self.streams.values(), self.embedding(pixels, starts_clip))
        features = torch.cat(streams, dim=-1)
        del streams  # half of the memory held here
        return self.fusion(features, around=around)


class Decoder(nn.Module):
    """Features to pixels: fused residual NAF layers, then a stream of them each for the low and the high bands."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.fusion = NAFLayers(config.hidden_channels, config.num_fusion_layers, norm=config.decoder_norm)
        self.projection = PatchProjection(config)
        self.widths = list(stream_widths(config).values())
        self.streams = nn.ModuleDict(
            {
                name: NAFLayers(width, config.num_stream_layers, norm=config.decoder_norm)
                for name, width in stream_widths(config).items()
            }
        )

    def forward(self, features: Tensor, *, around: Whole = WHOLE, starts_clip: bool = True) -> Tensor:
        """Turn features `(B, T', H', W', D)` into pixels `(B, 3, T, H, W)`, about [-1, 1]."""
        features = self.fusion(features, around=around)
        streams = around.side_by_side(self.streams.values(), list(features.split(self.widths, dim=-1)))
        return self.projection(streams, starts_clip)


def encode_frames(
    layers: Layers, pixels: Tensor, *, around: Whole = WHOLE, starts_clip: bool = True
) -> tuple[Tensor, Tensor]:
    """Encode pixels whose sizes the patches divide.

    Args:
        layers: the model's layers.
        pixels: `(B, 3, T, H, W)` in [-1, 1].
        around: what lies around them.
        starts_clip: whether the first frame is the first of the clip, which stands alone.

    Returns:
        The posterior's mean and log-variance, `(B, Z, T', H', W')`.
    """
    return parameters_of(layers, layers.encoder(pixels, around=around, starts_clip=starts_clip))


def parameters_of(layers: Layers, features: Tensor) -> tuple[Tensor, Tensor]:
    """Map features `(B, T', H', W', D)` to the posterior's mean and log-variance, `(B, Z, T', H', W')`."""
    return layers.bottleneck.compress(features).movedim(-1, 1), layers.logvar(features).movedim(-1, 1)


def decode_frames(layers: Layers, latent: Tensor, *, around: Whole = WHOLE, starts_clip: bool = True) -> Tensor:
    """Decode a latent `(B, Z, T', H', W')` to pixels `(B, 3, T, H, W)`, padded, about [-1, 1]."""
    features = layers.bottleneck.recover(latent.movedim(1, -1), around=around)
    return layers.decoder(features, around=around, starts_clip=starts_clip)
