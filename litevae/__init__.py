"""The image autoencoder LiteVAE, and the tensor maths that it shares with the video autoencoder.

Time, data and processes are the subject of ``leanvae``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litevae.config import LiteVAEConfig
    from litevae.model import LiteVAE

__all__ = ["LiteVAE", "LiteVAEConfig"]

_HOMES = {"LiteVAE": "litevae.model", "LiteVAEConfig": "litevae.config"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``import litevae`` itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'litevae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
