"""LiteVAE: the image autoencoder (LiteVAE, Figure 1), and the SD-VAE that it is compared with."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litevae.config import DOWNSAMPLING, LiteVAEConfig
from litevae.decoder import Decoder
from litevae.encoder import build_encoder
from litevae.errors import InvalidInput
from litevae.normalization import denormalize, normalize_posterior
from litevae.pixels import check_dtype, check_pixels, crop, pad_to_multiple
from litevae.planner import ImageLoad, are_parts_wanted, make_plan, run_in_parts
from litevae.posterior import DiagonalGaussian
from litevae.smc import FoldedConv, SelfModulatedConv
from litevae.snapshot import Preparable, make_twin


class LiteVAE(Preparable):
    """Autoencoder of images, with latents 8 times smaller in each direction; pixels are in [-1, 1].

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

    def encode(
        self,
        x: Tensor,
        tile: Sequence[int] | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
        normalize: bool = False,
    ) -> DiagonalGaussian:
        """Encode images.

        If the encoder only convolves (`encoder_norm="smc"`, or no weights), tiles give the same result as the whole
        image, up to rounding. On CUDA without gradients, parts are chosen by default if the device's free memory does
        not suffice for all images at once.

        Args:
            x: `(B, 3, H, W)` in [-1, 1], of any H and W; sizes that 8 does not divide are padded by replicating the
                last row and column.
            tile: most (height, width) of a tile in pixels, at least 8x8, without the halo around it.
            memory_limit: bytes, or such as `"6GiB"`. Chooses the number of images at once, and then a tile, so that
                the estimated peak of memory for inference, without the input, stays below it. If memory runs out
                nevertheless, the log says so, and half the memory is tried once.
            approximate: if tiles are not exact, blend overlapping ones linearly instead of refusing.
            normalize: bring each channel to mean 0 and standard deviation 1, by the configuration's `latent_mean` and
                `latent_std`.

        Returns:
            The posterior, `(B, Z, H', W')`; its `size` is the true `(H, W)`, which `decode` crops to.

        Raises:
            ValueError: the shape or dtype of `x` or an argument is wrong, a value is not finite, the memory limit
                cannot be kept, tiles are needed and not exact, or there are no statistics to normalize by.
        """
        check_pixels(x, [4])
        check_dtype(x, next(self.parameters()))
        layers, padded = self.layers, pad_to_multiple(x, DOWNSAMPLING)
        if are_parts_wanted(x, tile, memory_limit):
            _, height, width = self.latent_shape(x.shape[2:])
            load = ImageLoad("encode", self.config, len(x), height, width, x.element_size())
            plan = make_plan(load, tile, memory_limit, approximate, x.device)
            parameters = run_in_parts(layers._encode, padded, plan, in_step=DOWNSAMPLING)
        else:
            parameters = layers._encode(padded)
        mean, logvar = parameters.chunk(2, dim=1)
        posterior = DiagonalGaussian(mean, logvar, size=tuple(x.shape[2:]))
        return normalize_posterior(posterior, self.config) if normalize else posterior

    def _encode(self, images: Tensor) -> Tensor:
        """Compute mean and log-variance `(B, 2Z, H/8, W/8)` of images whose sizes 8 divides."""
        return self.after_encoder(self.encoder(images.contiguous(memory_format=torch.channels_last)))

    def decode(
        self,
        latent: Tensor,
        size: Sequence[int] | None = None,
        tile: Sequence[int] | None = None,
        memory_limit: str | int | None = None,
        approximate: bool = False,
        normalize: bool = False,
    ) -> Tensor:
        """Decode latents.

        Args:
            latent: `(B, Z, H', W')`.
            size: true `(H, W)` to crop to; None returns the padded images.
            tile, memory_limit, approximate: as in `encode`; the decoder only convolves with `decoder_norm="smc"` and
                without `decoder_attention`. The limit includes the output.
            normalize: the latents are normalized, as from `encode` with `normalize`.

        Returns:
            `(B, 3, H, W)`; about [-1, 1], not clamped.

        Raises:
            ValueError: the latent's shape or an argument is wrong, `size` does not fit the latent, the memory limit
                cannot be kept, tiles are needed and not exact, or there are no statistics to normalize by.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels or 0 in latent.shape:
            raise InvalidInput(
                f"latent has shape {tuple(latent.shape)}: expected (B, {self.config.latent_channels}, H', W')"
            )
        if normalize:
            latent = denormalize(latent, self.config)
        check_dtype(latent, next(self.parameters()), "latent")
        layers = self.layers
        if are_parts_wanted(latent, tile, memory_limit):
            batch, _, height, width = latent.shape
            load = ImageLoad("decode", self.config, batch, height, width, latent.element_size())
            plan = make_plan(load, tile, memory_limit, approximate, latent.device)
            images = run_in_parts(layers._decode, latent, plan, out_step=DOWNSAMPLING)
        else:
            images = layers._decode(latent)
        return images if size is None else crop(images, size, (DOWNSAMPLING, DOWNSAMPLING))

    def _decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.before_decoder(latent.contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct `x` from a sample of its posterior, and return the posterior, too.

        Args:
            x: as in `encode`.
            noise: standard normal, of the latent's shape (`latent_shape`); None uses the posterior's mean.
        """
        posterior = self.encode(x)
        latent = posterior.mode() if noise is None else posterior.sample_with(noise)
        return self.decode(latent, tuple(x.shape[2:])), posterior

    def compile(self, **options: Any) -> "LiteVAE":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Prepare the weights for inference, with the same results up to rounding.

        Self-modulation is folded into the weights. On GPUs encoder and decoder are also compiled, once for all sizes.
        The model uses the prepared weights until it trains, moves or loads others; see `Preparable`. Saved weights are
        always the original ones.

        Args:
            options: of `torch.compile`; if there are any, encoder and decoder are compiled on CPUs, too.

        Returns:
            The model itself, in evaluation mode.
        """
        self.eval()
        self.keep_snapshot(partial(_prepare, self, options))
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
        from litevae.card import write_card
        from litevae.pretrained import save_pretrained

        save_pretrained("LiteVAE", self.config, self.state_dict(), folder, dtype)
        write_card(folder, self, self.config)

    def push_to_hub(
        self,
        repo: str,
        private: bool | None = None,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, in one commit, and return its address.

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
        from litevae.hub import push

        return push(partial(self.save_pretrained, dtype=dtype), repo, private, token, **options)

    def latent_shape(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape `(Z, H', W')` of the latent of an image `(H, W)`."""
        height, width = size
        return (self.config.latent_channels, -(-height // DOWNSAMPLING), -(-width // DOWNSAMPLING))


def _prepare(vae: LiteVAE, options: dict[str, Any]) -> nn.Module:
    """Make the twin that `LiteVAE.compile` computes with."""
    twin: Any = make_twin(vae, lambda module: FoldedConv(module) if isinstance(module, SelfModulatedConv) else None)
    if options or next(vae.parameters()).is_cuda:
        for part in (twin.encoder, twin.decoder):
            part.compile(**{"dynamic": True, **options})
    return twin
