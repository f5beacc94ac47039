"""Weights by name: a path, weights that the package brings, or a repository on the Hugging Face hub."""

import json
import re
from importlib.resources import files
from pathlib import Path

from litevae.card import read_card
from litevae.errors import MissingFile
from litevae.hub import download
from litevae.pretrained import CONFIG_FILE, DIFFUSERS_WEIGHTS_FILE, WEIGHTS_FILE

PACKAGED = Path(str(files("leanvae"))) / "weights"

_PART = r"[A-Za-z0-9_][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(/(?P<file>[^@]+\.ckpt))?(@(?P<revision>[^@]+))?")


def packaged_names() -> list[str]:
    """List the weights that the package brings."""
    return sorted(file.parent.name for file in PACKAGED.glob(f"*/{CONFIG_FILE}"))


def may_name_weights(name: str) -> bool:
    """Whether `find_weights` would look for this name; on the hub it may be missing nevertheless."""
    return Path(name).exists() or name in packaged_names() or _HUB_NAME.fullmatch(name) is not None


def find_weights(source: str | Path) -> Path:
    """Find the file or folder that holds weights; download what is on the hub alone into its library's cache.

    Args:
        source: in this order, the path of what exists, a name of `packaged_names`, or `OWNER/NAME`,
            `OWNER/NAME/FILE.ckpt`, `OWNER/NAME@REVISION` or `OWNER/NAME/FILE.ckpt@REVISION` on the Hugging Face hub.
            A `Path` is a path only.

    Raises:
        MissingFile: there is nothing of that name; the message lists what there is.
        MissingPackage, InvalidInput: as `litevae.hub.download` raises them.
    """
    if Path(source).exists():
        return Path(source)
    if isinstance(source, str):
        if source in packaged_names():
            return PACKAGED / source
        if match := _HUB_NAME.fullmatch(source):
            if match["file"]:
                return download(match["repo"], match["file"], match["revision"])
            return _download_folder(match["repo"], match["revision"])
    raise MissingFile(
        f"no checkpoint at {source}: expected a folder or file that exists, weights in the package "
        f"({', '.join(packaged_names()) or 'there are none'}), or OWNER/NAME or OWNER/NAME/FILE.ckpt on the Hugging "
        "Face hub, with @REVISION if wanted"
    )


def _download_folder(repo: str, revision: str | None) -> Path:
    """Download a model's folder, as we or diffusers save it, and nothing else of the repository."""
    config = download(repo, CONFIG_FILE, revision)
    folder = config.parent
    try:
        is_ours = "model" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return folder  # its reader says what is wrong
    # The folder is named after the commit: both files are of one, whatever is pushed in between.
    download(repo, WEIGHTS_FILE if is_ours else DIFFUSERS_WEIGHTS_FILE, folder.name)
    return folder


def weights_line(source: str | Path) -> str:
    """Say which weights a name stands for, and what they are good for if their card has a `description`."""
    description = read_card(find_weights(source)).get("description")
    return f"weights: {source}" + (f": {description}" if description else "")
