"""LeanVAE: wavelet-based video autoencoders, from training to use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanvae.checkpoint import load_vae
    from leanvae.config import LeanVAEConfig
    from leanvae.model import LeanVAE

__all__ = ["LeanVAE", "LeanVAEConfig", "load_vae"]

_HOMES = {"LeanVAE": "leanvae.model", "LeanVAEConfig": "leanvae.config", "load_vae": "leanvae.checkpoint"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``import leanvae`` itself stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leanvae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
