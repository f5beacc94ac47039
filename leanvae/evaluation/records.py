"""Measurements of each clip and model, kept on disk so that an interrupted run can resume.

A record is a JSON file with a row of measures, and a safetensors file with features and sums of latents. Both carry a
key, which changes with the file, the model and the way of measuring.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from litevae.files import atomic_path, write_text

SOURCE = "source"  # replaces a model's name in records and pictures of the files themselves

Row = dict[str, Any]


def record_key(**parts: Any) -> str:
    """Return a short hash of everything a record depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def folder_name(model: str) -> str:
    """Turn a model's name into the name of a folder or file; distinct names stay distinct."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip(".")
    return plain if plain == model and plain != SOURCE else f"{plain}-{record_key(model=model)[:6]}"


class Records:
    """The records of a run.

    Args:
        folder: their folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, model: str, clip: str, key: str) -> Row | None:
        """Return the row of a clip, or None if there is none with this key."""
        row_path, tensor_path = self._paths(model, clip)
        try:
            row = json.loads(row_path.read_text(encoding="utf-8"))
            with safe_open(tensor_path, "pt") as file:
                same = (file.metadata() or {}).get("key") == key
        except (OSError, ValueError, SafetensorError):
            return None
        return row if same and isinstance(row, dict) and row.get("key") == key else None

    def tensors(self, model: str, clip: str, names: list[str]) -> dict[str, Tensor]:
        """Return those of the named tensors that a record holds."""
        with safe_open(self._paths(model, clip)[1], "pt") as file:
            return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118

    def write(self, model: str, clip: str, key: str, row: Row, tensors: dict[str, Tensor]) -> None:
        """Write a record; it is valid once both files exist."""
        row_path, tensor_path = self._paths(model, clip)
        row_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(tensor_path) as temporary:
            save_file(tensors, temporary, metadata={"key": key})
        write_text(row_path, json.dumps({"key": key, **row}, allow_nan=False) + "\n")

    def _paths(self, model: str, clip: str) -> tuple[Path, Path]:
        stem = self._folder / folder_name(model) / clip
        return stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
