"""Receptive fields of the image autoencoder: the halo that tiles need, and why some tiles cannot be exact."""

from litevae.config import NUM_LEVELS, LiteVAEConfig


def encoder_halo(config: LiteVAEConfig) -> int:
    """Count the latent elements that one depends on beyond its own to each side, 60 with the default depth.

    The aggregation's convolutions count one element each. Those on the bands of level l count less: the bands are
    larger, and an element averages `2^(3 - l)` of their outputs in each direction. The transform and the averages stay
    within an element.
    """
    if config.encoder != "wavelet":
        return 0  # only wavelet bands
    factors = [2 ** (NUM_LEVELS - level) for level in config.levels]
    extraction = max(-(-_unet_depth(config.extraction_multipliers, config) // factor) for factor in factors)
    return extraction + _unet_depth(config.aggregation_multipliers, config)


def _unet_depth(multipliers: tuple[int, ...], config: LiteVAEConfig) -> int:
    """Count the 3x3 convolutions on the longest path: in, out, and two per residual block, with two blocks in the
    middle.
    """
    return 2 + 2 * (2 * len(multipliers) * config.num_res_blocks + 2)


def decoder_halo(config: LiteVAEConfig) -> int:
    """Count the latent elements that an output patch depends on beyond its own to each side, 18 with the default depth.

    From the output back to the latent, each convolution adds an element of its own size, and each upsampling halves the
    distance, rounded up.
    """
    blocks = 2 * (config.num_res_blocks + 1)
    num_levels = len(config.decoder_multipliers)
    num_upsamplings = num_levels - 1 - int(config.output_type == "wavelet")
    reach = 1  # the convolution out
    for level in reversed(range(num_levels)):
        if level < num_upsamplings:
            reach = -(-(reach + 1) // 2)  # the convolution after the upsampling
        reach += blocks
    return reach + 4 + 1  # the middle's two blocks and the convolution in


def why_encoder_inexact(config: LiteVAEConfig) -> str | None:
    """Say why tiles encode to something else than the whole image does; return None if they do not."""
    if config.encoder in ("dwt", "dwt2"):
        return None
    if config.encoder == "sd":
        return "the sd encoder's GroupNorm and attention read the whole image"
    if config.extraction == "naf":
        return "NAFNet's channel attention (extraction 'naf') reads the mean over the whole image"
    if config.aggregation == "vit":
        return "the transformer's attention (aggregation 'vit') reads the whole image"
    if config.encoder_norm == "group":
        return "GroupNorm (encoder_norm 'group') reads the whole image"
    return None


def why_decoder_inexact(config: LiteVAEConfig) -> str | None:
    """Say why tiles decode to something else than the whole latent does; return None if they do not."""
    if config.decoder_norm == "group":
        return "GroupNorm (decoder_norm 'group') reads the whole image"
    if config.decoder_attention:
        return "the attention in the decoder's middle (decoder_attention) reads the whole image"
    return None
