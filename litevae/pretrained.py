"""A model's folder: `config.json` and `model.safetensors`, for the image and the video autoencoder alike."""

import json
from pathlib import Path

from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor

from litevae.files import atomic_path, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_pretrained(name: str, config: BaseModel, state: dict[str, Tensor], folder: str | Path) -> None:
    """Writes a model's configuration and weights, each atomically.

    Args:
        name: of the model's class.
        config: its configuration.
        state: its weights by name.
        folder: made if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(weights))  # save_file would make it readable by its owner alone
    tree = {"model": name, **config.model_dump(mode="json")}
    write_text(folder / CONFIG_FILE, json.dumps(tree, indent=2) + "\n")
