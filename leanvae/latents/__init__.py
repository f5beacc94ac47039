"""The latent store: clips encoded once, with all metadata for diffusion training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanvae.latents.online import OnlineLatents
    from leanvae.latents.reading import LatentClips, ShapeBatches

__all__ = ["LatentClips", "OnlineLatents", "ShapeBatches"]

_HOMES = {
    "LatentClips": "leanvae.latents.reading",
    "OnlineLatents": "leanvae.latents.online",
    "ShapeBatches": "leanvae.latents.reading",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that the command line starts at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leanvae.latents' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
