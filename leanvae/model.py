"""LeanVAE: the video autoencoder (LeanVAE, Figure 1a)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck, LinearBottleneck
from leanvae.config import LeanVAEConfig
from leanvae.naf import PAST_FRAMES, NAFLayers, Past, init_linear_maps
from leanvae.patchify import Bands, PatchEmbedding, PatchProjection, analyse, stream_widths, synthesise
from litevae.pixels import check_pixels, crop
from litevae.posterior import DiagonalGaussian


class Encoder(nn.Module):
    """Bands to features `(B, T', H', W', D)`: a stream of residual NAF layers each, then fused ones."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config)
        self.streams = nn.ModuleDict(
            {name: NAFLayers(width, config.num_stream_layers) for name, width in stream_widths(config).items()}
        )
        self.fusion = NAFLayers(config.hidden_channels, config.num_fusion_layers)

    def forward(self, bands: Bands, past: Sequence[Past] | None = None) -> tuple[Tensor, tuple[Past, ...]]:
        """Returns the features and the past of the next chunk; `past=None` means a whole clip."""
        pasts = iter(past) if past is not None else None
        future, streams = [], []
        for name, tokens in self.embedding(bands).items():
            tokens, stream_past = self.streams[name](tokens, next(pasts) if pasts else None)
            streams.append(tokens)
            future.append(stream_past)
        features, fusion_past = self.fusion(torch.cat(streams, dim=-1), next(pasts) if pasts else None)
        return features, (*future, fusion_past)

    @property
    def causal_stacks(self) -> list[NAFLayers]:
        """The stacks in the order of their pasts."""
        return [*self.streams.values(), self.fusion]  # pyright: ignore[reportReturnType]


class Decoder(nn.Module):
    """Features to bands: fused residual NAF layers, then a stream of them for the low and the high bands."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.fusion = NAFLayers(config.hidden_channels, config.num_fusion_layers, norm=config.decoder_norm)
        self.projection = PatchProjection(config)
        self.widths = stream_widths(config)
        self.streams = nn.ModuleDict(
            {
                name: NAFLayers(width, config.num_stream_layers, norm=config.decoder_norm)
                for name, width in self.widths.items()
            }
        )

    def forward(
        self, features: Tensor, past: Sequence[Past] | None = None, starts_clip: bool = True
    ) -> tuple[Bands, tuple[Past, ...]]:
        """Returns the bands and the past of the next chunk; `past=None` means a whole clip."""
        pasts = iter(past) if past is not None else None
        features, fusion_past = self.fusion(features, next(pasts) if pasts else None)
        future, streams = [fusion_past], {}
        for name, tokens in zip(self.widths, features.split(list(self.widths.values()), dim=-1), strict=True):
            streams[name], stream_past = self.streams[name](tokens, next(pasts) if pasts else None)
            future.append(stream_past)
        return self.projection(streams, starts_clip), tuple(future)

    @property
    def causal_stacks(self) -> list[NAFLayers]:
        """The stacks in the order of their pasts."""
        return [self.fusion, *self.streams.values()]  # pyright: ignore[reportReturnType]


class LeanVAE(nn.Module):
    """Causal wavelet autoencoder of images and clips.

    Pixels are in [-1, 1]. An image is a clip of one frame; of a clip's T frames the first stands alone and each
    further latent frame covers `patch_size[0]` of them. No latent depends on a later frame.

    Args:
        config: the architecture; the default is the published one.
    """

    def __init__(self, config: LeanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LeanVAEConfig()
        self.encoder = Encoder(config)
        if config.bottleneck == "ista":
            self.bottleneck = ISTABottleneck(
                config.hidden_channels, config.latent_channels, config.ista_iterations, config.ista_layers
            )
        else:
            self.bottleneck = LinearBottleneck(config.hidden_channels, config.latent_channels)
        self.logvar = nn.Linear(config.hidden_channels, config.latent_channels)
        self.decoder = Decoder(config)
        init_linear_maps(self)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of an image or a clip.

        Args:
            x: image `(B, 3, H, W)` or clip `(B, 3, T, H, W)` in [-1, 1], of any T, H, W; what the patches do
                not divide is padded by replication of the last frame, row and column.

        Returns:
            The posterior, `(B, Z, T', H', W')` with T' = 1 for an image; its `size` is the true `(H, W)` or
            `(T, H, W)`, which `decode` crops to.

        Raises:
            ValueError: the shape or dtype of `x` is wrong.
        """
        check_pixels(x)
        clip = pad_to_patches(x if x.ndim == 5 else x.unsqueeze(2), self.config.patch_size)
        bands = analyse(clip * self.config.data_scale, self.config.wavelet)
        features, _ = self.encoder(bands)
        return self._posterior(features, tuple(x.shape[2:]))

    def decode(self, latent: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Pixels of a latent.

        Args:
            latent: `(B, Z, T', H', W')`.
            size: true size to crop to, `(T, H, W)`, or `(H, W)` for an image; without it the padded clip.

        Returns:
            Clip `(B, 3, T, H, W)`, or image `(B, 3, H, W)` for a size of two; about [-1, 1], not clamped.

        Raises:
            ValueError: the latent's shape is wrong, or `size` is not one that it can come from.
        """
        self._check_latent(latent)
        features, _ = self.bottleneck.recover(latent.movedim(1, -1))
        bands, _ = self.decoder(features)
        clip = synthesise(bands, self.config.wavelet) / self.config.data_scale
        if size is None:
            return clip
        frames_and_area = (1, *size) if len(size) == 2 else size
        clip = crop(clip, frames_and_area, self.config.patch_size)
        return clip[:, :, 0] if len(size) == 2 else clip

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction of `x` from a sample of its posterior, and the posterior.

        Args:
            x: as in `encode`.
            noise: standard normal, of the latent's shape (`latent_shape`); without it the posterior's mean.
        """
        posterior = self.encode(x)
        latent = posterior.mode() if noise is None else posterior.sample_with(noise)
        return self.decode(latent, tuple(x.shape[2:])), posterior

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[DiagonalGaussian]:
        """Encodes a clip that arrives in chunks; equal to `encode` of the whole, with memory of a chunk.

        Args:
            chunks: tensors `(B, 3, t, H, W)` in [-1, 1], any t >= 1, all of one B, H, W, dtype.

        Yields:
            Posteriors `(B, Z, t', H', W')`, the first right after the first frame; concatenated over time
            they are the whole clip's. `size` is the number of true frames that a posterior covers, H, W.

        Raises:
            ValueError: a chunk has a wrong or another shape than those before.
        """
        group = self.config.patch_size[0]
        past: tuple[Past, ...] | None = None
        waiting: Tensor | None = None
        for chunk in chunks:
            check_chunk(chunk, waiting)
            waiting = chunk if waiting is None else torch.cat((waiting, chunk), dim=2)
            num_first = int(past is None)
            ready = num_first + (waiting.shape[2] - num_first) // group * group
            if ready:
                posterior, past = self._encode_chunk(waiting[:, :, :ready], past)
                waiting = waiting[:, :, ready:].clone()
                yield posterior
        if waiting is not None and waiting.shape[2]:
            posterior, past = self._encode_chunk(waiting, past)
            yield posterior

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decodes latents that arrive in chunks; equal to `decode` of the whole, with memory of a chunk.

        Args:
            latents: tensors `(B, Z, t', H', W')`, any t' >= 1, all of one B, H', W', dtype.

        Yields:
            Frames `(B, 3, t, H, W)`, padded size; concatenated over time they are the whole clip.

        Raises:
            ValueError: a latent has a wrong shape.
        """
        past: tuple[Past, ...] | None = None
        num_bottleneck = len(self.bottleneck.causal_stacks)
        for latent in latents:
            self._check_latent(latent)
            starts_clip = past is None
            tokens = latent.movedim(1, -1)
            past = self._start(self._decoder_stacks, tokens) if past is None else past
            features, bottleneck_past = self.bottleneck.recover(tokens, past[:num_bottleneck])
            bands, decoder_past = self.decoder(features, past[num_bottleneck:], starts_clip)
            past = bottleneck_past + decoder_past
            yield synthesise(bands, self.config.wavelet) / self.config.data_scale

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape `(Z, T', H', W')` of the latent of an image `(H, W)` or a clip `(T, H, W)`."""
        frames, height, width = (1, *size) if len(size) == 2 else size
        group, patch_height, patch_width = self.config.patch_size
        return (
            self.config.latent_channels,
            1 + -(-(frames - 1) // group),
            -(-height // patch_height),
            -(-width // patch_width),
        )

    @property
    def last_weights(self) -> list[Tensor]:
        """Weights of the decoder's last layer, at whose gradients an adaptive GAN weight looks."""
        return [weight for name, weight in self.decoder.projection.named_parameters() if name.endswith("weight")]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, each atomically."""
        from litevae.pretrained import save_pretrained

        save_pretrained("LeanVAE", self.config, self.state_dict(), folder)

    @property
    def _decoder_stacks(self) -> list[NAFLayers]:
        return [*self.bottleneck.causal_stacks, *self.decoder.causal_stacks]

    def _encode_chunk(self, chunk: Tensor, past: tuple[Past, ...] | None) -> tuple[DiagonalGaussian, tuple[Past, ...]]:
        """Encodes the next frames of a clip; `past=None` means that they begin it."""
        starts_clip = past is None
        clip = pad_to_patches(chunk, self.config.patch_size, starts_clip)
        bands = analyse(clip * self.config.data_scale, self.config.wavelet, starts_clip)
        if past is None:
            _, _, height, width = self.latent_shape(chunk.shape[2:])
            past = self._start(self.encoder.causal_stacks, clip.new_empty(len(clip), 0, height, width, 0))
        features, future = self.encoder(bands, past)
        return self._posterior(features, tuple(chunk.shape[2:])), future

    def _posterior(self, features: Tensor, size: tuple[int, ...]) -> DiagonalGaussian:
        mean = self.bottleneck.compress(features)
        return DiagonalGaussian(mean.movedim(-1, 1), self.logvar(features).movedim(-1, 1), size=size)

    def _start(self, stacks: Sequence[NAFLayers], tokens: Tensor) -> tuple[Past, ...]:
        """The past at the start of a clip: zeros, for tokens of this batch, height and width."""
        batch, _, height, width, _ = tokens.shape
        return tuple(
            tuple(tokens.new_zeros(batch, PAST_FRAMES, height, width, stack.dim) for _ in stack.convs)
            for stack in stacks
        )

    def _check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.config.latent_channels or 0 in latent.shape:
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}: expected (B, {self.config.latent_channels}, T', H', W')"
            )


def check_chunk(chunk: Tensor, waiting: Tensor | None) -> None:
    """Raises `ValueError` unless `chunk` is a clip that continues `waiting`."""
    check_pixels(chunk)
    if chunk.ndim != 5:
        raise ValueError(f"chunk has shape {tuple(chunk.shape)}: expected (B, 3, t, H, W)")
    if waiting is not None:
        same = [0, 1, 3, 4]
        if any(chunk.shape[axis] != waiting.shape[axis] for axis in same):
            raise ValueError(
                f"chunk has shape {tuple(chunk.shape)}: the ones before have "
                f"({waiting.shape[0]}, 3, any, {waiting.shape[3]}, {waiting.shape[4]})"
            )


def pad_to_patches(clip: Tensor, patch_size: Sequence[int], starts_clip: bool = True) -> Tensor:
    """Replicates the last frame, row and column of `(B, C, T, H, W)` until the patches divide the clip.

    If the clip starts here, its first frame stands outside the groups of `patch_size[0]` frames.
    """
    frames, height, width = clip.shape[2:]
    group, patch_height, patch_width = patch_size
    padding = (-width % patch_width, -height % patch_height, (int(starts_clip) - frames) % group)
    if not any(padding):
        return clip
    right, bottom, after = padding
    return F.pad(clip, (0, right, 0, bottom, 0, after), mode="replicate")
