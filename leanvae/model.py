"""LeanVAE: the video autoencoder (LeanVAE, Figure 1a)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck, LinearBottleneck
from leanvae.config import LeanVAEConfig
from leanvae.inference.chunking import pad_to_patches
from leanvae.inference.plan import Parts
from leanvae.inference.stream import check_latent, decode_in_parts, decode_stream, encode_in_parts, encode_stream
from leanvae.naf import NAFLayers, Past, init_linear_maps
from leanvae.patchify import Bands, PatchEmbedding, PatchProjection, stream_widths
from litevae.normalization import denormalize, normalize_posterior
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
        tokens, future = self.embedding(bands), []
        for name, stream in self.streams.items():
            tokens[name], stream_past = stream(tokens[name], next(pasts) if pasts else None)
            future.append(stream_past)
        features = torch.cat(list(tokens.values()), dim=-1)
        del tokens  # half of what is held here
        features, fusion_past = self.fusion(features, next(pasts) if pasts else None)
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

    def encode(
        self,
        x: Tensor,
        tile: Sequence[int] | None = None,
        chunk: int | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
        normalize: bool = False,
    ) -> DiagonalGaussian:
        """The posterior of an image or a clip.

        Parts of the clip give what the whole gives, up to rounding. On CUDA, where no gradient is recorded and
        nothing is asked for, they are chosen when the device's free memory would not suffice for the whole.

        Args:
            x: image `(B, 3, H, W)` or clip `(B, 3, T, H, W)` in [-1, 1], of any T, H, W; what the patches do
                not divide is padded by replication of the last frame, row and column.
            tile: works on tiles of at most this (height, width) in pixels, at least a patch.
            chunk: works on at most so many frames at once, but at least on those of one latent frame.
            memory_limit: chooses chunk and tile, where they are not given, so that the peak of memory, the input
                not counted, stays within so many bytes or `"6GiB"`, as estimated for inference. If memory runs
                out nevertheless, it is tried once more with half of it, and the log says so.
            approximate: where tiles are not exact, because the wavelet is longer than Haar, blends overlapping
                ones linearly instead of refusing.
            normalize: brings each channel to mean 0 and standard deviation 1, by the configuration's `latent_mean`
                and `latent_std`.

        Returns:
            The posterior, `(B, Z, T', H', W')` with T' = 1 for an image; its `size` is the true `(H, W)` or
            `(T, H, W)`, which `decode` crops to.

        Raises:
            ValueError: the shape or dtype of `x` or an argument is wrong, the memory limit cannot be kept, tiles
                are needed and not exact, or there are no statistics to normalize by.
        """
        check_pixels(x)
        parts = Parts(tile, chunk, memory_limit, approximate)
        if parts.are_wanted(x):
            posterior = encode_in_parts(self, x, parts)
        else:
            clip = x if x.ndim == 5 else x.unsqueeze(2)
            bands = self.encoder.embedding.analyse(pad_to_patches(clip, self.config.patch_size))
            features, _ = self.encoder(bands)
            posterior = self.posterior(features, tuple(x.shape[2:]))
        return normalize_posterior(posterior, self.config) if normalize else posterior

    def decode(
        self,
        latent: Tensor,
        size: Sequence[int] | None = None,
        tile: Sequence[int] | None = None,
        chunk: int | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
        normalize: bool = False,
    ) -> Tensor:
        """Pixels of a latent.

        Args:
            latent: `(B, Z, T', H', W')`.
            size: true size to crop to, `(T, H, W)`, or `(H, W)` for an image; without it the padded clip.
            tile, chunk, memory_limit, approximate: as in `encode`; the limit includes what is returned.
            normalize: the latent is a normalized one, as `encode` with `normalize` gives.

        Returns:
            Clip `(B, 3, T, H, W)`, or image `(B, 3, H, W)` for a size of two; about [-1, 1], not clamped.

        Raises:
            ValueError: the latent's shape is wrong, `size` is not one that it can come from, an argument is wrong,
                the memory limit cannot be kept, tiles are needed and not exact, or there are no statistics to
                normalize by.
        """
        check_latent(latent, self.config.latent_channels)
        if normalize:
            latent = denormalize(latent, self.config)
        parts = Parts(tile, chunk, memory_limit, approximate)
        if parts.are_wanted(latent):
            return decode_in_parts(self, latent, size, parts)
        features, _ = self.bottleneck.recover(latent.movedim(1, -1))
        bands, _ = self.decoder(features)
        clip = self.decoder.projection.synthesise(bands)
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

    def encode_stream(
        self,
        chunks: Iterable[Tensor],
        tile: Sequence[int] | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
    ) -> Iterator[DiagonalGaussian]:
        """Encodes a clip that arrives in chunks; equal to `encode` of the whole, with memory of a chunk.

        Args:
            chunks: tensors `(B, 3, t, H, W)` in [-1, 1], any t >= 1, all of one B, H, W, dtype.
            tile, memory_limit, approximate: as in `encode`; a chunk for which memory does not suffice is worked on,
                and its posteriors come, in parts. The limit includes what is kept from chunk to chunk.

        Yields:
            Posteriors `(B, Z, t', H', W')`, the first right after the first frame; concatenated over time
            they are the whole clip's. `size` is the number of true frames that a posterior covers, H, W.

        Raises:
            ValueError: a chunk has a wrong shape or another than those before, or as in `encode`.
        """
        return encode_stream(self, chunks, Parts(tile, None, memory_limit, approximate))

    def decode_stream(
        self,
        latents: Iterable[Tensor],
        tile: Sequence[int] | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
    ) -> Iterator[Tensor]:
        """Decodes latents that arrive in chunks; equal to `decode` of the whole, with memory of a chunk.

        Args:
            latents: tensors `(B, Z, t', H', W')`, any t' >= 1, all of one B, H', W', dtype.
            tile, memory_limit, approximate: as in `encode_stream`.

        Yields:
            Frames `(B, 3, t, H, W)`, padded size; concatenated over time they are the whole clip.

        Raises:
            ValueError: a latent has a wrong shape or another than those before, or as in `encode`.
        """
        return decode_stream(self, latents, Parts(tile, None, memory_limit, approximate))

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

    def posterior(self, features: Tensor, size: tuple[int, ...] | None = None) -> DiagonalGaussian:
        """The posterior of features `(B, T', H', W', D)` of pixels whose true size is `size`."""
        mean = self.bottleneck.compress(features)
        return DiagonalGaussian(mean.movedim(-1, 1), self.logvar(features).movedim(-1, 1), size=size)

    def compile(self) -> "LeanVAE":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Prepares the weights as they are now for inference, with the same results up to rounding.

        `train()` goes back to the weights themselves; so does anything that changes them: loading, and a move to
        another device or dtype, after which it can be called again. Saved weights are always the true ones.

        Returns:
            The model itself, in evaluation mode.
        """
        from leanvae.inference.prepare import prepare_for_inference

        return prepare_for_inference(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, each atomically."""
        from litevae.pretrained import save_pretrained

        save_pretrained("LeanVAE", self.config, self.state_dict(), folder)
