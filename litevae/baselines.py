"""Released image autoencoders of the SD-VAE's architecture, in the layout of diffusers' `AutoencoderKL`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from litevae.config import LiteVAEConfig
from litevae.errors import InvalidInput

# From names in diffusers to ours, applied in turn; attention also by its names before diffusers 0.15.
_RENAMINGS = [
    (r"^quant_conv\.", "after_encoder."),
    (r"^post_quant_conv\.", "before_decoder."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.block1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.block2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.attention."),
    (r"\.(norm|conv)([12])\.(weight|bias)$", r".conv\2.\1.\3"),
    (r"\.conv_shortcut\.", ".skip."),
    (r"\.conv_out\.", ".conv_out.conv."),
    (r"\.conv_norm_out\.", ".conv_out.norm."),
    (r"\.attention\.group_norm\.", ".attention.norm."),
    (r"\.attention\.(?:to_q|query)\.", ".attention.query."),
    (r"\.attention\.(?:to_k|key)\.", ".attention.key."),
    (r"\.attention\.(?:to_v|value)\.", ".attention.value."),
    (r"\.attention\.(?:to_out\.0|proj_attn)\.", ".attention.out."),
]


def from_diffusers(state: Mapping[str, Tensor]) -> tuple[LiteVAEConfig, dict[str, Tensor]]:
    """Infer the architecture from an `AutoencoderKL` state dict, and rename its weights to ours.

    Args:
        state: weights of diffusers' `AutoencoderKL` with four levels, a middle attention and GroupNorm of 32 groups.

    Returns:
        The configuration of a `LiteVAE`, and the state dict to load into it strictly.

    Raises:
        ValueError: it is not such a state dict.
    """
    try:
        config = _infer_config(state)
    except KeyError as error:
        raise InvalidInput(f"not a state dict of diffusers' AutoencoderKL: {error.args[0]} is missing") from error
    samplers = {"encoder.down_blocks": config.num_res_blocks, "decoder.up_blocks": config.num_res_blocks + 1}
    renamed = {}
    for name, value in state.items():
        for blocks, place in samplers.items():
            ours = blocks.replace("_blocks", "")
            name = re.sub(rf"^{re.escape(blocks)}\.(\d+)\.\w+samplers\.0\.", rf"{ours}.\1.{place}.", name)
        for pattern, replacement in _RENAMINGS:
            name = re.sub(pattern, replacement, name)
        # Older files store attention as 1x1 convolutions.
        is_attention = ".attention." in name and name.endswith(".weight") and value.ndim == 4
        renamed[name] = value.flatten(1) if is_attention else value
    return config, renamed


def _infer_config(state: Mapping[str, Tensor]) -> LiteVAEConfig:
    encoder_widths = _widths(state, "encoder.down_blocks")
    decoder_widths = _widths(state, "decoder.up_blocks")[::-1]
    for part, widths in (("encoder", encoder_widths), ("decoder", decoder_widths)):
        if len(widths) != 4 or any(width % widths[0] for width in widths):
            raise InvalidInput(f"{part}: expected four levels whose widths are multiples of the first's, got {widths}")
    if ("quant_conv.weight" in state) != ("post_quant_conv.weight" in state):
        raise InvalidInput("quant_conv and post_quant_conv: expected both or none")
    fields: dict[str, Any] = {
        "encoder": "sd",
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "encoder_channels": encoder_widths[0],
        "encoder_multipliers": tuple(width // encoder_widths[0] for width in encoder_widths),
        "num_res_blocks": _count(state, "encoder.down_blocks.0.resnets."),
        "latent_conv": "quant_conv.weight" in state,
        "decoder_channels": decoder_widths[0],
        "decoder_multipliers": tuple(width // decoder_widths[0] for width in decoder_widths),
        "decoder_attention": "decoder.mid_block.attentions.0.group_norm.weight" in state,
    }
    return LiteVAEConfig(**fields)


def _widths(state: Mapping[str, Tensor], blocks: str) -> list[int]:
    return [state[f"{blocks}.{level}.resnets.0.conv1.weight"].shape[0] for level in range(_count(state, f"{blocks}."))]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
