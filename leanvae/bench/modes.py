"""The ways to run a model: whole, in chunks of time, in tiles of space, and compiled."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.peers.models import Model, Size, decode, encode

MODES = ("whole", "compiled", "chunked", "tiled")
CHUNK_FRAMES = 8
TILE_PIXELS = 256
_SMALL_TILE_PIXELS = 128  # for clips that would fit into one tile

Run = Callable[[Tensor], Tensor]


def lacks_mode(vae: nn.Module, mode: str) -> str | None:
    """Say why a model cannot run in a mode; return None if it can."""
    if mode == "compiled" and type(vae).compile is nn.Module.compile:
        return "it has no compile()"
    if mode == "chunked" and not (_takes(vae, "chunk") or hasattr(vae, "encode_stream")):
        return "it takes no chunks of frames"
    # All models of diffusers have the method, but only those that can tile have the attribute.
    if (
        mode == "tiled"
        and not _takes(vae, "tile")
        and not (hasattr(vae, "use_tiling") and hasattr(vae, "enable_tiling"))
    ):
        return "it takes no tiles"
    return None


def runners(model: Model, vae: nn.Module, mode: str, size: Size) -> tuple[Run, Run]:
    """Return functions that encode and decode in a mode; `vae` is prepared for it in place.

    Args:
        model: its entry.
        vae: the module, on its device and in its dtype.
        mode: one of `MODES` that the model has.
        size: the size to encode, which decides on the size of tiles.
    """
    options = {}
    if mode == "compiled":
        vae.compile()
    elif mode == "chunked":
        if not _takes(vae, "chunk"):
            return lambda x: _encode_stream(vae, x), lambda latent: _decode_stream(vae, latent)
        options = {"chunk": CHUNK_FRAMES}
    elif mode == "tiled":
        if _takes(vae, "tile"):
            side = TILE_PIXELS if max(size.height, size.width) > TILE_PIXELS else _SMALL_TILE_PIXELS
            options = {"tile": (side, side)}
        else:
            vae.enable_tiling()  # pyright: ignore[reportCallIssue]
    return lambda x: encode(model, vae, x, **options), lambda latent: decode(vae, latent, **options)


def _takes(vae: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(vae.encode).parameters  # pyright: ignore[reportArgumentType]


def _encode_stream(vae: nn.Module, x: Tensor) -> Tensor:
    posteriors = vae.encode_stream(x.split(CHUNK_FRAMES, dim=2))  # pyright: ignore[reportCallIssue]
    return torch.cat([posterior.mode() for posterior in posteriors], dim=2)


def _decode_stream(vae: nn.Module, latent: Tensor) -> Tensor:
    config: Any = vae.config
    latents = latent.split(max(1, CHUNK_FRAMES // config.patch_size[0]), dim=2)
    return torch.cat(list(vae.decode_stream(latents)), dim=2)  # pyright: ignore[reportCallIssue]
