"""A model's folder: `config.json` and `model.safetensors`, for the image and the video autoencoder alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from litevae.files import atomic_path, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STATISTICS_FIELDS = {"latent_mean", "latent_std"}  # fields of the configuration known only after training


def save_pretrained(name: str, config: BaseModel, state: dict[str, Tensor], folder: str | Path) -> None:
    """Write a model's configuration and weights, each atomically.

    Args:
        name: name of the model's class.
        config: its configuration.
        state: its weights by name.
        folder: created if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(weights))  # save_file would make it readable only by its owner
    write_text(folder / CONFIG_FILE, config_text({"model": name, **config.model_dump(mode="json")}))


def config_text(tree: Mapping[str, Any]) -> str:
    """Return the content of a `config.json`."""
    return json.dumps(tree, indent=2) + "\n"


def update_config(folder: str | Path, fields: Mapping[str, Any]) -> None:
    """Replace fields of a folder's `config.json`, atomically; all others stay the same."""
    file = Path(folder) / CONFIG_FILE
    write_text(file, config_text(json.loads(file.read_text(encoding="utf-8")) | fields))
