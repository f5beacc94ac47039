"""The image autoencoder LiteVAE, and the tensor arithmetic that it shares with the video autoencoder.

Nothing here knows about time, files or processes; those live in ``leanvae``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litevae.config import LiteVAEConfig
    from litevae.model import LiteVAE

__all__ = ["LiteVAE", "LiteVAEConfig"]

_HOMES = {"LiteVAE": "litevae.model", "LiteVAEConfig": "litevae.config"}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that ``import litevae`` alone stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'litevae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
