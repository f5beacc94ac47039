"""A model's folder: `config.json` and `model.safetensors`, for the image and the video autoencoder alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from litevae.errors import InvalidInput
from litevae.files import atomic_path, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
STATISTICS_FIELDS = {"latent_mean", "latent_std"}  # fields of the configuration that are known only after training


def save_pretrained(
    name: str, config: BaseModel, state: dict[str, Tensor], folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a model's configuration and weights, each atomically.

    Args:
        name: name of the model's class.
        config: its configuration.
        state: its weights by name.
        folder: made if missing.
        dtype: to store the weights in; None keeps theirs.

    Raises:
        InvalidInput: a weight is too large for `dtype`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _convert(name, value, dtype) for name, value in state.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(weights))  # save_file would make it readable only by its owner
    write_text(folder / CONFIG_FILE, config_text({"model": name, **config.model_dump(mode="json")}))


def _convert(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().cpu().contiguous()
    if dtype is None or not value.is_floating_point():
        return value
    converted = value.to(dtype)
    if not torch.equal(converted.isfinite(), value.isfinite()):
        raise InvalidInput(f"{name} reaches {value.abs().max():g}, which {dtype} cannot hold: choose another dtype")
    return converted


def config_text(tree: Mapping[str, Any]) -> str:
    """Return the content of a `config.json`."""
    return json.dumps(tree, indent=2) + "\n"


def update_config(folder: str | Path, fields: Mapping[str, Any]) -> None:
    """Replace fields of a folder's `config.json`, atomically; all others stay the same."""
    file = Path(folder) / CONFIG_FILE
    write_text(file, config_text(json.loads(file.read_text(encoding="utf-8")) | fields))
