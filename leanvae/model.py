"""LeanVAE: the video autoencoder (LeanVAE, Figure 1a)."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck, LinearBottleneck
from leanvae.config import LeanVAEConfig
from leanvae.inference.plan import Parts, decoding_load, encoding_load, make_plan
from leanvae.inference.prepare import prepare
from leanvae.inference.stream import (
    DecoderStream,
    EncoderStream,
    check_latent,
    decode_in_parts,
    encode_in_parts,
    whole_first,
)
from leanvae.naf import init_linear_maps
from leanvae.network import Decoder, Encoder, decode_frames, encode_frames
from leanvae.patchify import latent_frames, pad_to_patches
from litevae.card import write_card
from litevae.hub import push
from litevae.normalization import denormalize, normalize_posterior
from litevae.pixels import check_dtype, check_pixels, crop
from litevae.posterior import DiagonalGaussian
from litevae.pretrained import save_pretrained
from litevae.snapshot import Preparable


class LeanVAE(Preparable):
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
        """Encode an image or a clip.

        It is encoded in parts if they are requested, or if memory runs out and no gradient is recorded; else whole.
        Parts give the same result as the whole, up to rounding.

        Args:
            x: image `(B, 3, H, W)` or clip `(B, 3, T, H, W)` in [-1, 1], of any T, H, W; sizes that the patches do not
                divide are padded by replicating the last frame, row and column.
            tile: most (height, width) of a tile in pixels, at least a patch.
            chunk: most frames at once; one latent frame is the minimum.
            memory_limit: bytes, or such as `"6GiB"`. Chooses chunk and tile, if they are not given, so that the
                estimated peak of memory for inference, without the input, stays below it. If memory runs out
                nevertheless, the log says so, and the work continues in parts of half the size.
            approximate: if tiles are not exact, because the wavelet is longer than Haar, blend overlapping ones
                linearly instead of refusing.
            normalize: bring each channel to mean 0 and standard deviation 1, by the configuration's `latent_mean` and
                `latent_std`.

        Returns:
            The posterior, `(B, Z, T', H', W')` with T' = 1 for an image; its `size` is the true `(H, W)` or
            `(T, H, W)`, which `decode` crops to.

        Raises:
            ValueError: the shape or dtype of `x` or an argument is wrong, the memory limit cannot be kept, tiles
                are needed and not exact, or there are no statistics to normalize by.
        """
        check_pixels(x)
        check_dtype(x, self.logvar.weight)
        layers, clip = self.layers, x if x.ndim == 5 else x.unsqueeze(2)
        parts = Parts(tile, chunk, memory_limit, approximate)

        def whole() -> DiagonalGaussian:
            return DiagonalGaussian(*encode_frames(layers, pad_to_patches(clip, self.config.patch_size)))

        if parts.are_wanted():
            posterior = encode_in_parts(layers, clip, make_plan(encoding_load(layers, clip), parts))
        else:
            posterior = whole_first(whole, partial(encode_in_parts, layers, clip), partial(encoding_load, layers, clip))
        posterior = DiagonalGaussian(posterior.mean, posterior.logvar, tuple(x.shape[2:]))
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
        """Decode a latent.

        Args:
            latent: `(B, Z, T', H', W')`.
            size: true size to crop to, `(T, H, W)`, or `(H, W)` for an image; None returns the padded clip.
            tile, chunk, memory_limit, approximate: as in `encode`; the limit includes the output.
            normalize: the latent is normalized, as from `encode` with `normalize`.

        Returns:
            Clip `(B, 3, T, H, W)`, or image `(B, 3, H, W)` for a size of two; about [-1, 1], not clamped.

        Raises:
            ValueError: the latent's shape or an argument is wrong, `size` does not fit the latent, the memory limit
                cannot be kept, tiles are needed and not exact, or there are no statistics to normalize by.
        """
        check_latent(latent, self.config.latent_channels)
        check_dtype(latent, self.logvar.weight, "latent")
        if normalize:
            latent = denormalize(latent, self.config)
        layers, parts = self.layers, Parts(tile, chunk, memory_limit, approximate)
        padded_size = None if size is None else (1, *size) if len(size) == 2 else tuple(size)

        def whole() -> Tensor:
            clip = decode_frames(layers, latent)
            return clip if padded_size is None else crop(clip, padded_size, self.config.patch_size)

        in_parts = partial(decode_in_parts, layers, latent, padded_size)
        if parts.are_wanted():
            clip = in_parts(make_plan(decoding_load(layers, latent), parts))
        else:
            clip = whole_first(whole, in_parts, partial(decoding_load, layers, latent))
        return clip[:, :, 0] if size is not None and len(size) == 2 else clip

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct `x` from a sample of its posterior, and return the posterior, too.

        Args:
            x: as in `encode`.
            noise: standard normal, of the latent's shape (`latent_shape`); None uses the posterior's mean.
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
        """Encode a clip that arrives in chunks, with the result of `encode` and the memory of a chunk.

        Args:
            chunks: tensors `(B, 3, t, H, W)` in [-1, 1], any t >= 1, all of the same B, H, W and dtype.
            tile, memory_limit, approximate: as in `encode`. A chunk that needs too much memory is encoded and returned
                in parts. The limit includes the past that is kept from chunk to chunk.

        Yields:
            Posteriors `(B, Z, t', H', W')`, the first directly after the first frame; concatenated over time they equal
            the whole clip's. `size` is the number of true frames that a posterior covers, H, W.

        Raises:
            ValueError: a chunk's shape is wrong or differs from the previous ones, or as in `encode`.
        """
        stream = EncoderStream(self.layers, Parts(tile, None, memory_limit, approximate))
        for frames in chunks:
            yield from filter(None, map(stream.push, stream.split(frames)))
        if (posterior := stream.finish()) is not None:
            yield posterior

    def decode_stream(
        self,
        latents: Iterable[Tensor],
        tile: Sequence[int] | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
    ) -> Iterator[Tensor]:
        """Decode latents that arrive in chunks, with the result of `decode` and the memory of a chunk.

        Args:
            latents: tensors `(B, Z, t', H', W')`, any t' >= 1, all of the same B, H', W' and dtype.
            tile, memory_limit, approximate: as in `encode_stream`.

        Yields:
            Frames `(B, 3, t, H, W)`, padded; concatenated over time they equal the whole clip.

        Raises:
            ValueError: a latent's shape is wrong or differs from the previous ones, or as in `encode`.
        """
        stream = DecoderStream(self.layers, Parts(tile, None, memory_limit, approximate))
        for latent in latents:
            yield from map(stream.push, stream.split(latent))

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape `(Z, T', H', W')` of the latent of an image `(H, W)` or a clip `(T, H, W)`."""
        frames, height, width = (1, *size) if len(size) == 2 else size
        group, patch_height, patch_width = self.config.patch_size
        return (
            self.config.latent_channels,
            latent_frames(frames, group),
            -(-height // patch_height),
            -(-width // patch_width),
        )

    def compile(self, **options: Any) -> "LeanVAE":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Prepare the weights for inference, with the same results up to rounding.

        Norms, self-modulation and the Haar transform are folded into the weights, widths are padded, and on CPUs with
        oneDNN the weights are packed. On GPUs encoder and decoder are also compiled, once for all sizes. The model uses
        the prepared weights until it trains, moves or loads others; see `litevae.snapshot.Preparable`. Saved weights
        are always the original ones.

        Args:
            options: of `torch.compile`; if there are any, encoder and decoder are compiled on CPUs, too.

        Returns:
            The model itself, in evaluation mode.
        """
        self.eval()
        self.keep_snapshot(partial(prepare, self, options))
        return self

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json`, `model.safetensors` and a model card, `README.md`, into a folder, each atomically.

        A card that is there already is kept, with its figures brought up to date.

        Args:
            folder: made if missing.
            dtype: to store the weights in, such as float16 for half the size; None keeps theirs.

        Raises:
            InvalidInput: a weight is too large for `dtype`.
        """
        save_pretrained("LeanVAE", self.config, self.state_dict(), folder, dtype)
        write_card(folder, self, self.config)

    def push_to_hub(
        self,
        repo: str,
        private: bool | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, in one commit, and returns its address.

        The repository is made if missing. A model card that it has already is kept, with its figures brought up to
        date.

        Args:
            repo: `OWNER/NAME`, or `NAME` for a repository of your own.
            private: whether a new repository is private; None follows the owner's default.
            token: for writing; None takes the one of `hf auth login` or of HF_TOKEN.
            dtype: as in `save_pretrained`.
            options: of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`, `revision`, `create_pr`.

        Raises:
            MissingPackage: huggingface_hub is not installed.
            InvalidInput: the hub refuses or cannot be reached, or a weight is too large for `dtype`.
        """
        return push(partial(self.save_pretrained, dtype=dtype), repo, private, token, **options)
