"""The candidates of an evaluation: baselines, our models, and those of diffusers, each with a distinct name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from leanvae.checkpoint import load_vae
from leanvae.coder import FrameCoder, Reconstructor
from leanvae.evaluation.analysis import model_names
from leanvae.evaluation.baselines import is_baseline, make_baseline
from leanvae.named import find_weights
from leanvae.peers.coder import PeerCoder, is_of_diffusers, load_of_diffusers
from leanvae.peers.registry import REGISTRY
from litevae.errors import InvalidInput


@dataclass(frozen=True)
class Candidate:
    """A model or baseline in an evaluation.

    Attributes:
        name: its name in tables, unique in a run.
        source: description of its origin.
        stamp: changes if its weights do.
        coder: reconstructs frames.
    """

    name: str
    source: str
    stamp: str
    coder: Reconstructor


def load_candidates(
    specs: Sequence[str],
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Candidate]:
    """Load the candidates that specifications name.

    Args:
        specs: a baseline, as `is_baseline` tells; `MODEL=WEIGHTS`, as `load_of_diffusers` takes it; or what
            `load_vae` reads.
        chunk: most frames that a model gets at a time; None as memory allows, and whole clips for models without
            streams.
        tile: most (height, width) in pixels of a tile; None as memory allows.
        device: where they run.
        dtype: their type; as stored if None.

    Raises:
        MissingFile: a checkpoint does not exist.
        MissingPackage: diffusers is needed and not installed, or has no such class.
        InvalidInput: a specification, or the file that it names, is wrong.
    """
    return [_load(spec, name, chunk, tile, device, dtype) for spec, name in zip(specs, _names(specs), strict=True)]


def _load(
    spec: str,
    name: str,
    chunk: int | None,
    tile: tuple[int, int] | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Candidate:
    if is_baseline(spec):
        baseline = make_baseline(spec)
        return Candidate(name, baseline.source, baseline.stamp, baseline)
    if is_of_diffusers(spec):
        model_name, _, weights = spec.partition("=")
        if tile is not None:
            raise InvalidInput(f"--tile: {model_name} has no lossless tiles; leave it out")
        model, peer = load_of_diffusers(spec, device, dtype)
        return Candidate(name, model.source, _stamp(Path(weights), peer), PeerCoder(model, peer, chunk))
    if spec in REGISTRY and not Path(spec).exists():
        raise InvalidInput(f"{spec} is a model without weights: name them, as in {spec}=FOLDER")
    vae = load_vae(spec, device, dtype)
    return Candidate(name, spec, _stamp(find_weights(spec), vae), FrameCoder(vae, chunk=chunk, tile=tile))


def _names(specs: Sequence[str]) -> list[str]:
    """Return short, distinct names: checkpoints' paths without common parts, other specifications unchanged."""
    if not specs or len(set(specs)) < len(specs):
        raise InvalidInput(f"checkpoints are {list(specs)}: expected one or more different ones")
    paths = [spec for spec in specs if Path(spec).exists() and not (is_baseline(spec) or is_of_diffusers(spec))]
    short = dict(zip(paths, model_names(paths), strict=True)) if paths else {}
    names = [short.get(spec, spec) for spec in specs]
    return names if len(set(names)) == len(names) else list(specs)


def _stamp(path: Path, vae: nn.Module) -> str:
    """Return the names, sizes and times of a checkpoint's files, if it is on disk, and the model's type."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in inside if file.is_file()]
    files = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
    return "; ".join([str(next(vae.parameters()).dtype), *files])
