"""LeanVAE as a diffusers model, for its pipelines and its saving and loading."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanvae.config import LeanVAEConfig
from leanvae.model import LeanVAE
from litevae.errors import extra
from litevae.torchvision_compat import prepare_torchvision

prepare_torchvision()  # diffusers imports torchvision if it is installed

with extra("diffusers"):
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin


class AutoencoderKLLeanVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A `LeanVAE` with the interface of diffusers' video autoencoders.

    Clips are `(B, 3, T, H, W)` in [-1, 1], latents `(B, Z, T', H', W')`. Pipelines of diffusers scale latents
    themselves, as `(z - latents_mean) / latents_std * scaling_factor`. Unlike in other models, tiles give the same
    result as the whole clip.

    Args:
        latents_mean, latents_std: statistics of the latents' channels.
        scaling_factor: factor applied to normalized latents.

    The other arguments are the fields of `LeanVAEConfig`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        patch_size: tuple[int, int, int] = (4, 8, 8),
        wavelet: str = "haar",
        streams: str = "separate",
        low_channels: int = 128,
        high_channels: int = 384,
        num_stream_layers: int = 2,
        num_fusion_layers: int = 4,
        bottleneck: str = "ista",
        ista_iterations: int = 2,
        ista_layers: int = 2,
        decoder_norm: str = "layer",
        patch_norm: bool = False,
        data_scale: float = 0.5,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        fields = {
            "latent_channels": latent_channels,
            "patch_size": patch_size,
            "wavelet": wavelet,
            "streams": streams,
            "low_channels": low_channels,
            "high_channels": high_channels,
            "num_stream_layers": num_stream_layers,
            "num_fusion_layers": num_fusion_layers,
            "bottleneck": bottleneck,
            "ista_iterations": ista_iterations,
            "ista_layers": ista_layers,
            "decoder_norm": decoder_norm,
            "patch_norm": patch_norm,
            "data_scale": data_scale,
            "latent_mean": latents_mean,
            "latent_std": latents_std,
        }
        self.vae = LeanVAE(LeanVAEConfig.model_validate(fields))
        self.temporal_compression_ratio, self.spatial_compression_ratio = patch_size[:2]
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = 512
        self.tile_sample_min_width = 512
        self.tile_sample_min_num_frames: int | None = None

    @classmethod
    def from_leanvae(cls, vae: LeanVAE) -> "AutoencoderKLLeanVAE":
        """Copy a `LeanVAE`, such as from `load_vae`, in evaluation mode."""
        fields = vae.config.model_dump()
        fields |= {"latents_mean": fields.pop("latent_mean"), "latents_std": fields.pop("latent_std")}
        model = cls(**fields)
        model.vae.load_state_dict(vae.state_dict())
        parameter = next(vae.parameters())
        model.vae.to(parameter.device, parameter.dtype)
        return model.eval()

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
    ) -> None:
        """Work on tiles of at most these pixels and, if given, frames at a time; the results stay the same."""
        super().enable_tiling()
        self.tile_sample_min_height = tile_sample_min_height or self.tile_sample_min_height
        self.tile_sample_min_width = tile_sample_min_width or self.tile_sample_min_width
        self.tile_sample_min_num_frames = tile_sample_min_num_frames or self.tile_sample_min_num_frames

    @property
    def _tile(self) -> tuple[int, int] | None:
        return (self.tile_sample_min_height, self.tile_sample_min_width) if self.use_tiling else None

    @property
    def _chunk(self) -> int | None:
        return self.tile_sample_min_num_frames if self.use_tiling else None

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode clips `(B, 3, T, H, W)` of any T, H and W; the posterior is `latent_dist`."""
        posteriors = [self.vae.encode(part, self._tile, self._chunk) for part in self._slices(x)]
        parameters = torch.cat([torch.cat((part.mean, part.logvar), dim=1) for part in posteriors])
        distribution = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, size: Sequence[int] | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents `(B, Z, T', H', W')` to `sample`; `size` (T, H, W) crops the padding."""
        parts = [self.vae.decode(part, size, self._tile, self._chunk) for part in self._slices(z)]
        sample = torch.cat(parts)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _slices(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(1) if self.use_slicing else (x,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode clips `(B, 3, T, H, W)`, from the posterior's mean or, on request, a sample."""
        distribution = self.encode(sample, return_dict=False)[0]
        z = distribution.sample(generator) if sample_posterior else distribution.mode()
        return self.decode(z, return_dict, tuple(sample.shape[2:]))
