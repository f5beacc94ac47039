"""Autoencoders with trained weights: ours, and those of diffusers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanvae.bench.quality import reconstruct_frames
from leanvae.checkpoint import load_vae
from leanvae.evaluation.coder import Coder, Observe
from leanvae.inference.plan import plan_reconstruction
from leanvae.metrics.artefacts import Parts
from leanvae.model import LeanVAE
from leanvae.peers.models import Lengths, Model
from leanvae.peers.registry import REGISTRY, diffusers_class
from litevae.config import DOWNSAMPLING
from litevae.errors import InvalidInput, MissingFile, NotFinite
from litevae.model import LiteVAE

_IMAGES_AT_ONCE = 4  # frames that an image model gets at a time, at most


@dataclass(frozen=True)
class Cutting:
    """What a user asks for in how frames are worked on in parts.

    Attributes:
        chunk: most frames at a time; None as memory allows, and whole clips for models without streams.
        tile: most (height, width) in pixels of a tile; None as memory allows.
    """

    chunk: int | None = None
    tile: tuple[int, int] | None = None


def load_autoencoder(
    spec: str, name: str, cutting: Cutting, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Coder:
    """Makes what a specification names.

    Args:
        spec: `MODEL=WEIGHTS`, a name of the benchmark or a class of diffusers with the folder, or name on the hub, of
            its weights; or the path of what `load_vae` reads.
        name: what it is called.
        cutting: how it works in parts.
        device: where it runs.
        dtype: its type; as stored if None.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        MissingPackage: diffusers is needed and not installed, or has no such class.
        ValueError: the specification or what it names is wrong.
    """
    if is_of_diffusers(spec):
        return _diffusers_coder(spec, name, cutting, device, dtype)
    if spec in REGISTRY and not Path(spec).exists():
        raise InvalidInput(f"{spec} is a model without weights: name them, as in {spec}=FOLDER")
    vae = load_vae(spec, device, dtype)
    if isinstance(vae, LeanVAE):
        return _lean_coder(vae, spec, name, cutting)
    return _lite_coder(vae, spec, name, cutting)


def is_of_diffusers(spec: str) -> bool:
    """Whether a specification is `MODEL=WEIGHTS`, and no path that has the sign in it."""
    return "=" in spec and not Path(spec).exists()


def _stamp(path: Path, vae: nn.Module) -> str:
    """Names, sizes and times of a checkpoint's files, if it is on disk, and the type that the model runs in."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in inside if file.is_file()]
    files = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
    return "; ".join([str(next(vae.parameters()).dtype), *files])


def _to_unit(decoded: Tensor, name: str) -> Tensor:
    """The decoder's pixels in about [-1, 1] as float32 in [0, 1] on the CPU."""
    decoded = decoded.float()
    if not decoded.isfinite().all():
        raise NotFinite(f"{name}: the decoder's output is not finite: its weights are broken, or need float32")
    return ((decoded + 1) / 2).clamp(0, 1).cpu()


def _chunks(frames: Iterable[Tensor], first: int | None, chunk: int | None, like: Tensor) -> Iterator[Tensor]:
    """Frames as a model takes them, `(n, 3, H, W)` in [-1, 1]: `first` of them, then `chunk` at a time; None is all."""
    rest = iter(frames)
    while some := list(islice(rest, first)):
        yield (2 * torch.stack(some).to(like.device) - 1).to(like.dtype)
        first = chunk


def _lean_coder(vae: LeanVAE, path: str, name: str, cutting: Cutting) -> Coder:
    group, *patch = vae.config.patch_size
    like = next(vae.parameters())

    def plan(height: int, width: int) -> tuple[int, list[tuple[int, int] | None]]:
        """Frames of a chunk after the first, and tiles of encoder and decoder in pixels."""
        encoding, decoding = plan_reconstruction(vae, width, height, cutting.chunk)
        tiles = [part.tile and (part.tile[0] * patch[0], part.tile[1] * patch[1]) for part in (encoding, decoding)]
        return group * (encoding.latent_frames or 1), [cutting.tile] * 2 if cutting.tile else tiles

    def parts(height: int, width: int) -> Parts:
        chunk, tiles = plan(height, width)
        return Parts(tuple({tile for tile in tiles if tile is not None}), chunk - group + 1, chunk)

    def run(frames: Iterable[Tensor], observe: Observe) -> Iterator[Tensor]:
        rest = iter(frames)
        first = next(rest)
        chunk, (tile, decoder_tile) = plan(*first.shape[1:])
        count = 0

        def counted() -> Iterator[Tensor]:
            nonlocal count
            for some in _chunks(chain([first], rest), chunk - group + 1, chunk, like):
                count += len(some)
                yield some.transpose(0, 1)[None]

        def latents() -> Iterator[Tensor]:
            for posterior in vae.encode_stream(counted(), tile=tile):
                observe(posterior.mode()[0])
                yield posterior.mode()

        given = 0
        for decoded in vae.decode_stream(latents(), tile=decoder_tile):
            # The last frame was repeated to fill its group; what it decodes to has no source.
            whole = decoded[0, :, : count - given, : first.shape[1], : first.shape[2]].transpose(0, 1)
            given += len(whole)
            yield _to_unit(whole, name)

    return Coder(name, path, _stamp(Path(path), vae), patch[0], run, parts)


def _lite_coder(vae: LiteVAE, path: str, name: str, cutting: Cutting) -> Coder:
    like = next(vae.parameters())
    at_once = min(_IMAGES_AT_ONCE, cutting.chunk or _IMAGES_AT_ONCE)

    def run(frames: Iterable[Tensor], observe: Observe) -> Iterator[Tensor]:
        for images in _chunks(frames, at_once, at_once, like):
            latent = vae.encode(images, tile=cutting.tile).mode()
            observe(latent.transpose(0, 1))  # N Z H' W' -> Z N H' W'
            yield _to_unit(vae.decode(latent, size=tuple(images.shape[2:]), tile=cutting.tile), name)

    parts = Parts(() if cutting.tile is None else (cutting.tile,))
    return Coder(name, path, _stamp(Path(path), vae), DOWNSAMPLING, run, lambda height, width: parts)


def _diffusers_coder(
    spec: str, name: str, cutting: Cutting, device: str | torch.device, dtype: torch.dtype | None
) -> Coder:
    """A VAE of diffusers. It has no lossless streams: chunks, if asked for, are coded on their own."""
    model_name, _, weights = spec.partition("=")
    if cutting.tile is not None:
        raise InvalidInput(f"--tile: {model_name} has no lossless tiles; leave it out")
    known = REGISTRY.get(model_name)
    if known is not None and not known.source.startswith("diffusers."):
        raise InvalidInput(f"{spec}: {model_name} is a model of this project: give the path of its checkpoint alone")
    class_name = known.source.partition(";")[0].removeprefix("diffusers.") if known else model_name
    vae: Any = _from_pretrained(diffusers_class(class_name), weights).to(device, dtype).eval()
    if known and known.tiled_only:
        vae.enable_tiling()
    model = known or _describe(model_name, vae)
    like = next(vae.parameters())
    chunk = min(_IMAGES_AT_ONCE, cutting.chunk or _IMAGES_AT_ONCE) if model.kind == "image" else cutting.chunk

    def run(frames: Iterable[Tensor], observe: Observe) -> Iterator[Tensor]:
        for some in _chunks(frames, chunk, chunk, like):
            recon, latent = reconstruct_frames(model, vae, some)
            observe(latent)
            yield _to_unit(recon, name)

    parts = Parts(first=chunk, chunk=chunk) if model.kind == "video" and chunk is not None else Parts()
    source = f"diffusers.{class_name}, {weights}"
    return Coder(name, source, _stamp(Path(weights), vae), model.height.step, run, lambda height, width: parts)


def _describe(name: str, vae: nn.Module) -> Model:
    """What a model of diffusers takes, by what it says of itself."""
    config: Any = vae.config
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    blocks = getattr(config, "block_out_channels", None) or (0,) * 4
    side = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(blocks) - 1)
    group = getattr(vae, "temporal_compression_ratio", None) or getattr(config, "scale_factor_temporal", None) or 4
    space = Lengths(side, side)
    return Model(
        name,
        "video" if is_video else "image",
        lambda: vae,
        f"diffusers.{name}",
        frames=Lengths(1, group) if is_video else Lengths(1, 1),
        height=space,
        width=space,
        has_weights=True,
    )


def _from_pretrained(cls: Any, weights: str) -> nn.Module:
    """Weights of a local folder, or of `OWNER/NAME[/SUBFOLDER]` on the hub; safetensors alone.

    Raises:
        FileNotFoundError: they are not there.
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
