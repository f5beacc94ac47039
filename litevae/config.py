"""The base of all configuration classes, and the image autoencoder's configuration."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from litevae.errors import InvalidInput

NUM_LEVELS = 3
DOWNSAMPLING = 2**NUM_LEVELS  # pixels per latent element, in each direction

# Widths of S, B, M and L: LiteVAE, Tables 23 and 24. For VAE-Small the paper gives only its 6.75M parameters.
_PRESETS: dict[str, dict[str, Any]] = {
    "S": {"extraction_channels": 16, "extraction_multipliers": (1, 2, 2)}
    | {"aggregation_channels": 16, "aggregation_multipliers": (1, 2, 2)},
    "B": {},
    "M": {"extraction_channels": 64, "extraction_multipliers": (1, 2, 4)},
    "L": {"extraction_channels": 64, "extraction_multipliers": (1, 2, 4)}
    | {"aggregation_channels": 64, "aggregation_multipliers": (1, 2, 4)},
    "SD-VAE": {"encoder": "sd"},
    "VAE-Small": {"encoder": "sd", "encoder_channels": 64, "encoder_multipliers": (1, 1, 3, 4)},
}
_FIXED_LATENT_CHANNELS = {"dwt": 12, "dwt2": 48}


class StrictConfig(BaseModel):
    """A frozen configuration; unknown keys and bad values raise errors that name the key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class AutoencoderConfig(StrictConfig):
    """The fields that the configurations of all autoencoders share.

    Attributes:
        latent_channels: channels Z of the latent.
        latent_mean: mean of each channel over a data set, which `normalize=True` subtracts; `None` if unknown.
        latent_std: standard deviation of each channel, which it divides by.
    """

    latent_channels: PositiveInt = 4
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _statistics_are_of_all_channels(self) -> Self:
        if (self.latent_mean is None) != (self.latent_std is None):
            raise ValueError("latent_mean and latent_std: expected both or none")
        for name, values in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name}: expected a value for each of {self.latent_channels} channels, got {values}")
        return self


class LiteVAEConfig(AutoencoderConfig):
    """Architecture of `LiteVAE`; the defaults are LiteVAE-B with 4 latent channels and the SD-VAE's decoder.

    Attributes:
        latent_channels, latent_mean, latent_std: see `AutoencoderConfig`.
        encoder: `wavelet` (LiteVAE), `sd` (the SD-VAE's convolutional baseline), or one without weights: `dwt`, the
            bands of the third wavelet level (Z = 12; Table 11), or `dwt2`, which adds the high bands of the second
            level (Z = 48; Table 12).
        levels: wavelet levels to extract features from (Table 21); level l has bands of 1/2^l the size.
        extraction: network on the bands of a level, `unet` or `naf` (NAFNet, Table 18).
        extraction_channels: its base width.
        extraction_multipliers: its widths over the base width, by level of the UNet; NAFNet uses the widest.
        shared_extraction: whether all levels share one such network (Table 19).
        aggregation: network on the concatenated features, `unet` or `vit` (Table 20), which has a fixed size.
        aggregation_channels: base width of the UNet.
        aggregation_multipliers: its widths over the base width.
        vit_grid: height and width of the latents that a `vit` aggregation is built for.
        num_res_blocks: residual blocks per level on each path of a UNet.
        encoder_norm: `group` (GroupNorm) or `smc` (self-modulated convolutions and no norms) in the UNets.
        encoder_channels: base width of the `sd` encoder.
        encoder_multipliers: its widths over the base width, from full to 1/8 of the size.
        latent_conv: 1x1 convolutions after the encoder and before the decoder (Table 17; the SD-VAE has them).
        decoder_channels: base width of the decoder.
        decoder_multipliers: its widths over the base width, from full to 1/8 of the size.
        decoder_norm: `group` or `smc` (Table 4).
        decoder_attention: whether the decoder's middle has self-attention over all positions.
        output_type: `image`, or `wavelet`, with which the decoder upsamples once less and returns the bands of level 1.
    """

    encoder: Literal["wavelet", "sd", "dwt", "dwt2"] = "wavelet"
    levels: tuple[int, ...] = (1, 2, 3)
    extraction: Literal["unet", "naf"] = "unet"
    extraction_channels: PositiveInt = 32
    extraction_multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 3), min_length=1)
    shared_extraction: bool = False
    aggregation: Literal["unet", "vit"] = "unet"
    aggregation_channels: PositiveInt = 32
    aggregation_multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 3), min_length=1)
    vit_grid: tuple[PositiveInt, PositiveInt] = (16, 16)
    num_res_blocks: PositiveInt = 2
    encoder_norm: Literal["group", "smc"] = "group"
    encoder_channels: PositiveInt = 128
    encoder_multipliers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 2, 4, 4)
    latent_conv: bool = False
    decoder_channels: PositiveInt = 128
    decoder_multipliers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 2, 4, 4)
    decoder_norm: Literal["group", "smc"] = "group"
    decoder_attention: bool = True
    output_type: Literal["image", "wavelet"] = "image"

    @field_validator("levels")
    @classmethod
    def _levels_exist(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or tuple(sorted(set(levels) & set(range(1, NUM_LEVELS + 1)))) != levels:
            raise ValueError(f"expected one or more of the levels 1, 2 and {NUM_LEVELS}, ascending")
        return levels

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        fixed = _FIXED_LATENT_CHANNELS.get(self.encoder, self.latent_channels)
        if self.latent_channels != fixed:
            raise ValueError(f"encoder {self.encoder!r} gives {fixed} channels: set latent_channels to {fixed}")
        return self

    @classmethod
    def preset(cls, name: str, **fields: Any) -> Self:
        """Return a configuration of the paper.

        Args:
            name: `S`, `B`, `M` or `L` (LiteVAE, Tables 23 and 24), `SD-VAE`, or `VAE-Small` (Table 2b).
            fields: other fields to set.

        Raises:
            ValueError: there is no such preset, or a field is wrong.
        """
        if name not in _PRESETS:
            raise InvalidInput(f"preset {name!r} does not exist: expected one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name] | fields)
