"""An entry of the store: what a clip's members of the tar hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from litevae.errors import InvalidInput, MissingFile

TENSORS, FACTS, THUMBNAIL = "safetensors", "json", "jpg"


@dataclass(frozen=True)
class StoreEntry:
    """A clip in the store.

    Attributes:
        facts: all that is known of it; the content of its JSON member.
        tensors: the safetensors member: `mean` and `logvar` `(Z, T', H', W')`, and perhaps those of its mirror image.
        thumbnail: the clip's first frame as JPEG, if there is one.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    thumbnail: bytes | None = None

    @property
    def key(self) -> str:
        """Its name in the tar."""
        return self.facts["key"]

    def members(self) -> dict[str, bytes]:
        """Content by extension."""
        members = {TENSORS: save(self.tensors), FACTS: json.dumps(self.facts, default=str).encode()}
        if self.thumbnail is not None:
            members[THUMBNAIL] = self.thumbnail
        return members


def read_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors member.

    Raises:
        ValueError: it holds something else; the message begins with `name`.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InvalidInput(f"{name}: no valid safetensors file: {error}") from error
    if not {"mean", "logvar"} <= tensors.keys():
        raise InvalidInput(f"{name}: expected the tensors 'mean' and 'logvar', found {sorted(tensors)}")
    return tensors


def read_entry(path: Path) -> StoreEntry:
    """Reads an entry that was taken out of a tar: `KEY.safetensors` with `KEY.json` beside it.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one of them holds something else.
    """
    facts = path.with_suffix(f".{FACTS}")
    if not facts.is_file():
        raise MissingFile(f"{facts}: missing; it belongs to {path}")
    try:
        return StoreEntry(json.loads(facts.read_text(encoding="utf-8")), read_tensors(path.read_bytes(), str(path)))
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{facts}: no valid JSON: {error}") from error
