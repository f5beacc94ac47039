"""An entry of the store: the members of a clip in a tar."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from litevae.errors import InvalidInput, MissingFile

TENSORS, FACTS, THUMBNAIL = "safetensors", "json", "jpg"
_NEEDED_FACTS = set("key source start end first_frame stride fps times size source_size checkpoint".split())


class StoreError(InvalidInput):
    """A store is missing, damaged or not the expected one; the message says which store and how."""


@dataclass(frozen=True)
class StoreEntry:
    """A clip in the store.

    Attributes:
        facts: its metadata, the content of its JSON member.
        tensors: the safetensors member: `mean` and `logvar` `(Z, T', H', W')`, and possibly those of its mirror image.
        thumbnail: the clip's first frame as JPEG, if there is one.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    thumbnail: bytes | None = None

    @property
    def key(self) -> str:
        """The entry's name in the tar."""
        return self.facts["key"]

    def members(self) -> dict[str, bytes]:
        """Return the content of its members by extension."""
        members = {TENSORS: save(self.tensors), FACTS: json.dumps(self.facts, default=str).encode()}
        if self.thumbnail is not None:
            members[THUMBNAIL] = self.thumbnail
        return members


def read_json(data: bytes, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: the data are not a JSON object; the message begins with `name`.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{name}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_facts(data: bytes, name: str) -> dict[str, Any]:
    """Read an entry's JSON member.

    Raises:
        StoreError: it is not valid; the message begins with `name`.
    """
    facts = read_json(data, name)
    missing = _NEEDED_FACTS - facts.keys()
    if missing:
        raise StoreError(f"{name}: {', '.join(sorted(missing))} missing")
    if len(facts["times"]) != facts["size"][0]:
        raise StoreError(f"{name}: {len(facts['times'])} timestamps for {facts['size'][0]} frames")
    return facts


def read_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Read a safetensors member.

    Raises:
        StoreError: it is not valid; the message begins with `name`.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise StoreError(f"{name}: not a valid safetensors file: {error}") from error
    if not {"mean", "logvar"} <= tensors.keys():
        raise StoreError(f"{name}: expected the tensors 'mean' and 'logvar', found {sorted(tensors)}")
    return tensors


def read_entry(path: Path) -> StoreEntry:
    """Read an entry extracted from a tar: `KEY.safetensors` with `KEY.json` beside it.

    Raises:
        MissingFile: one of the files is missing.
        StoreError: one of them is not valid.
    """
    facts = path.with_suffix(f".{FACTS}")
    for file, other in ((path, facts), (facts, path)):
        if not file.is_file():
            raise MissingFile(f"{file}: missing; it belongs to {other}")
    return StoreEntry(parse_facts(facts.read_bytes(), str(facts)), read_tensors(path.read_bytes(), str(path)))
