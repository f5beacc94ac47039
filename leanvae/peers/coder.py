"""A `Reconstructor` for other projects' autoencoders, and for ours in the registry."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvae.coder import (
    IMAGES_AT_ONCE,
    FrameCoder,
    Reconstruction,
    Reconstructor,
    Seams,
    finite_frames,
    in_chunks,
    to_model,
)
from leanvae.media.info import Frame
from leanvae.model import LeanVAE
from leanvae.peers.models import ANY_LENGTH, Lengths, Model, Size, decode, encode
from leanvae.peers.registry import REGISTRY, diffusers_class
from litevae.errors import InvalidInput, MissingFile
from litevae.model import LiteVAE


class PeerCoder:
    """A registry model as a `Reconstructor`. It has no lossless streams: each chunk is coded independently.

    Args:
        model: the module's entry.
        vae: the module, in evaluation mode.
        chunk: most frames at a time; None takes clips whole, and four images at a time.
    """

    def __init__(self, model: Model, vae: nn.Module, chunk: int | None = None) -> None:
        self._model, self._vae = model, vae
        self.patch = model.height.step
        self._chunk = chunk if model.kind == "video" else min(IMAGES_AT_ONCE, chunk or IMAGES_AT_ONCE)

    def seams(self, frames: int, height: int, width: int) -> Seams:
        """Say where chunks of a clip meet."""
        if self._model.kind == "image" or self._chunk is None:
            return Seams()
        return Seams.between((frames, height, width), first=self._chunk, chunk=self._chunk)

    @torch.inference_mode()
    def reconstruct(self, frames: Iterable[Frame]) -> Iterator[Reconstruction]:
        """Encode and decode frames of one size, padded by replication to what the model takes, and cropped back.

        Raises:
            NotFinite: the decoder's output is infinite or NaN.
        """
        for some in in_chunks(frames, self._chunk, self._chunk):
            x = to_model([[frame.image for frame in some]], self._vae)
            count, height, width = x.shape[2:]
            fitted = self._model.fit(Size(count, height, width))
            more = fitted.frames - count if self._model.kind == "video" else 0
            x = F.pad(x, (0, fitted.width - width, 0, fitted.height - height, 0, more), mode="replicate")
            decoded, latent = self._run(x)
            fresh: Tensor | None = latent
            rest = iter(some)
            for output in finite_frames(decoded[:count, :, :height, :width]):
                yield Reconstruction(list(islice(rest, len(output))), output, fresh)
                fresh = None

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels `(T, 3, H, W)` and latent `(Z, T', H', W')` of a clip `(1, 3, T, H, W)` that fits the model."""
        if self._model.kind == "video":
            latent = encode(self._model, self._vae, x)
            return decode(self._vae, latent)[0].transpose(0, 1), latent[0]
        latents = [encode(self._model, self._vae, image) for image in x[0].transpose(0, 1).split(1)]
        return torch.cat([decode(self._vae, latent) for latent in latents]), torch.cat(latents).transpose(0, 1)


def make_reconstructor(model: Model, vae: nn.Module) -> Reconstructor:
    """Return the `Reconstructor` of a model with weights; ours runs in streams."""
    return FrameCoder(vae) if isinstance(vae, LeanVAE | LiteVAE) else PeerCoder(model, vae)


def is_of_diffusers(spec: str) -> bool:
    """Tell whether a specification is `MODEL=WEIGHTS`, and not a path that contains the sign."""
    return "=" in spec and not Path(spec).exists()


def load_of_diffusers(spec: str, device: str | torch.device, dtype: torch.dtype | None) -> tuple[Model, nn.Module]:
    """Load a VAE of diffusers.

    Args:
        spec: `MODEL=WEIGHTS`: a name of the registry or a class of diffusers, and its weights' folder or name on the
            hub.
        device: device of the model.
        dtype: type of the model; None uses the stored one.

    Returns:
        Its entry, whose `source` names class and weights, and the module in evaluation mode.

    Raises:
        MissingFile: the weights do not exist.
        MissingPackage: diffusers is not installed, or has no such class.
        InvalidInput: the model is one of this project.
    """
    name, _, weights = spec.partition("=")
    known = REGISTRY.get(name)
    if known is not None and not known.source.startswith("diffusers."):
        raise InvalidInput(f"{spec}: {name} is a model of this project: give only the path of its checkpoint")
    class_name = known.source.partition(";")[0].removeprefix("diffusers.") if known else name
    vae: Any = _from_pretrained(diffusers_class(class_name), weights).to(device, dtype).eval()
    if known and known.tiled_only:
        vae.enable_tiling()
    return replace(known or _entry_of(name, vae), source=f"diffusers.{class_name}, {weights}"), vae


def _entry_of(name: str, vae: nn.Module) -> Model:
    """Make the entry of a diffusers VAE from its configuration."""
    config: Any = vae.config
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    blocks = getattr(config, "block_out_channels", None) or (0,) * 4
    side = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(blocks) - 1)
    group = getattr(vae, "temporal_compression_ratio", None) or getattr(config, "scale_factor_temporal", None) or 4
    frames, space = Lengths(1, group) if is_video else ANY_LENGTH, Lengths(side, side)
    kind = "video" if is_video else "image"
    return Model(name, kind, lambda: vae, "", frames=frames, height=space, width=space, has_weights=True)


def _from_pretrained(cls: Any, weights: str) -> nn.Module:
    """Load safetensors of a local folder, or of `OWNER/NAME[/SUBFOLDER]` on the hub.

    Raises:
        MissingFile: they do not exist.
    """
    folder, subfolder = weights, ""
    is_local = Path(weights).is_dir()
    if not is_local:
        owner, _, rest = weights.partition("/")
        repository, _, subfolder = rest.partition("/")
        if not owner or not repository or owner.startswith("."):
            raise MissingFile(f"no folder at {weights}")
        folder = f"{owner}/{repository}"
    try:
        return cls.from_pretrained(folder, subfolder=subfolder, local_files_only=is_local, use_safetensors=True)
    except OSError as error:
        raise MissingFile(f"{weights}: no weights of {cls.__name__}: {str(error).splitlines()[0]}") from error
