"""Weights on disk: our folders of `config.json` and `model.safetensors`, and published LeanVAE checkpoints."""

import argparse
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from leanvae.config import LeanVAEConfig, parse_config
from leanvae.model import LeanVAE
from leanvae.named import find_weights
from litevae.baselines import from_diffusers
from litevae.config import LiteVAEConfig
from litevae.errors import InvalidInput, MissingFile
from litevae.model import LiteVAE
from litevae.pretrained import CONFIG_FILE, DIFFUSERS_WEIGHTS_FILE, WEIGHTS_FILE

_CONFIGS: dict[str, type[LeanVAEConfig] | type[LiteVAEConfig]] = {"LeanVAE": LeanVAEConfig, "LiteVAE": LiteVAEConfig}
TRAINING_PREFIX = "autoencoder."

# Published names to ours, applied in turn.
_RENAMINGS = [
    (r"^latent_bottleneck\.phi$", "bottleneck.phi"),
    (r"^latent_bottleneck\.Q$", "bottleneck.initial"),
    (r"^latent_bottleneck\.weights\.", "bottleneck.steps."),
    (r"^latent_bottleneck\.threshold\.", "bottleneck.thresholds."),
    (r"^latent_bottleneck\.(forward|backward)_l\.", r"bottleneck.\1_transforms."),
    (r"^std_layer\.", "logvar."),
    (r"^encoder\.(image|video)_(low|high)_proj\.1\.", r"encoder.embedding.\1.\2."),
    (r"^decoder\.(image|video)_(low|high)_proj\.0\.", r"decoder.projection.\1.\2."),
    (r"^(encoder|decoder)\.(low|high)_layer\.", r"\1.streams.\2."),
    (r"^(encoder|decoder)\.fusion_layer\.", r"\1.fusion."),
    (r"\.dconv_layer\.(\d+)\.ds_conv\.", r".convs.\1."),
    (r"\.ffd_layer\.(\d+)\.0\.", r".feedforwards.\1.norm."),
    (r"\.ffd_layer\.(\d+)\.1\.", r".feedforwards.\1.expand."),
    (r"\.ffd_layer\.(\d+)\.4\.", r".feedforwards.\1.contract."),
]


def build_vae(config: LeanVAEConfig | LiteVAEConfig) -> LeanVAE | LiteVAE:
    """The model that a configuration is of, with fresh weights."""
    return LeanVAE(config) if isinstance(config, LeanVAEConfig) else LiteVAE(config)


def load_vae(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LeanVAE | LiteVAE:
    """Load an autoencoder, ready for inference.

    Args:
        path: a folder with `config.json` and `model.safetensors` (a training checkpoint is one), a folder that
            diffusers wrote an `AutoencoderKL` of the SD-VAE's architecture to, or a published LeanVAE checkpoint file;
            or the name of weights in the package, such as `"lean-small-c16"`; or, on the Hugging Face hub,
            `"OWNER/NAME"` or `"OWNER/NAME/FILE.ckpt"`, with `"@REVISION"` behind it if wanted. What exists as a path
            is never looked for elsewhere.
        device: where the weights go.
        dtype: their type. If `None` it is the stored one, but float32 for weights stored in float16, which only saves
            space.

    Raises:
        MissingFile: there is nothing of that name, or the folder misses one of the two files.
        InvalidInput: the file is no such checkpoint, or weights are missing, unknown or of the wrong shape; or the
            hub refuses access.
        MissingPackage: the name is one of the hub, and huggingface_hub is not installed.
    """
    path = find_weights(path)
    config, state = _read_folder(path) if path.is_dir() else _read_published(path)
    with torch.device("meta"):
        vae = build_vae(config)
    try:
        vae.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path}: weights do not fit the model: {error}") from error
    if dtype is None and next(vae.parameters()).dtype == torch.float16:
        dtype = torch.float32
    return vae.requires_grad_(True).to(device, dtype).eval()


def _read_folder(folder: Path) -> tuple[LeanVAEConfig | LiteVAEConfig, dict[str, Tensor]]:
    if not (folder / WEIGHTS_FILE).is_file() and (folder / DIFFUSERS_WEIGHTS_FILE).is_file():
        return _read_diffusers(folder / DIFFUSERS_WEIGHTS_FILE)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            latest = folder / "checkpoints" / "latest"
            hint = f"; the run's newest checkpoint is {latest}" if latest.is_dir() else ""
            raise MissingFile(f"{folder}: {name} is missing; a checkpoint folder holds it{hint}")
    try:
        tree = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{folder / CONFIG_FILE}: no valid JSON: {error}") from error
    model = tree.pop("model", None) if isinstance(tree, dict) else None
    if model not in _CONFIGS:
        raise InvalidInput(f"{folder / CONFIG_FILE}: the field 'model' must be one of {', '.join(_CONFIGS)}")
    return parse_config(_CONFIGS[model], tree, str(folder / CONFIG_FILE)), _read_weights(folder / WEIGHTS_FILE)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InvalidInput(f"{path}: no valid safetensors file: {error}") from error


def _read_diffusers(path: Path) -> tuple[LiteVAEConfig, dict[str, Tensor]]:
    try:
        return from_diffusers(_read_weights(path))
    except ValueError as error:
        raise InvalidInput(f"{path}: {error}") from error


def _read_published(path: Path) -> tuple[LeanVAEConfig, dict[str, Tensor]]:
    """Read `{"args" | "hyper_parameters": ..., "state_dict": ...}` and rename the weights to ours."""
    try:
        # Training checkpoints keep their arguments in a Namespace; no other class is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]  # torch goes on to advise unsafe loading
        raise InvalidInput(f"{path}: cannot be read as a checkpoint of plain tensors: {reason}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput(f"{path}: a published checkpoint holds a dictionary of tensors under 'state_dict'")
    if any(name.startswith(TRAINING_PREFIX) for name in state):
        state = {
            name.removeprefix(TRAINING_PREFIX): value
            for name, value in state.items()
            if name.startswith(TRAINING_PREFIX)
        }
    try:
        # Published step sizes are scalars, ours vectors of one element.
        renamed = {rename_published(name): torch.atleast_1d(value) for name, value in state.items()}
        return infer_config(state), renamed
    except KeyError as error:
        raise InvalidInput(f"{path}: no published LeanVAE checkpoint: {error.args[0]} is missing") from error


def rename_published(name: str) -> str:
    """Our name of a published weight."""
    for pattern, replacement in _RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def infer_config(state: dict[str, Tensor]) -> LeanVAEConfig:
    """The architecture of a published state dict, read off its tensors.

    Raises:
        KeyError: a tensor that every published checkpoint has is missing.
    """
    low_channels, image_patch = state["encoder.image_low_proj.1.weight"].shape
    video_patch = state["encoder.video_low_proj.1.weight"].shape[1]
    side = math.isqrt(image_patch // 3)

    def count(prefix: str) -> int:
        numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
        return len(numbers)

    return LeanVAEConfig(
        latent_channels=state["latent_bottleneck.phi"].shape[0],
        patch_size=(2 * video_patch // image_patch, 2 * side, 2 * side),
        low_channels=low_channels,
        high_channels=state["encoder.image_high_proj.1.weight"].shape[0],
        num_stream_layers=count("encoder.low_layer.dconv_layer."),
        num_fusion_layers=count("encoder.fusion_layer.dconv_layer."),
        ista_iterations=count("latent_bottleneck.weights."),
        ista_layers=count("latent_bottleneck.forward_l.0.dconv_layer."),
    )
