"""Decoding a store, or single entries, to clips of the sources' rate and true size."""

import logging
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanvae.checkpoint import load_vae
from leanvae.coder import FrameCoder
from leanvae.latents.entry import TENSORS, StoreEntry, read_entry
from leanvae.latents.session import hash_checkpoint
from leanvae.latents.store import Store, StoreError
from leanvae.media.writer import VideoWriter
from leanvae.named import weights_line
from leanvae.progress import Progress
from litevae.errors import NotFinite
from litevae.pixels import to_bytes

logger = logging.getLogger("leanvae")

_TIME_BASE = Fraction(1, 90_000)  # of MPEG; exact for the common frame rates
_LATENT_FRAMES_AT_ONCE = 4


def decode_latents(
    checkpoint: str | Path,
    source: str | Path,
    output: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    keys: Sequence[str] = (),
) -> dict[str, Any]:
    """Decode the posteriors' means of a store's entries, or of an extracted one, to `KEY.mp4` each.

    Clips keep their timestamps. Existing files are left alone, so an interrupted run can be repeated.

    Args:
        checkpoint: the checkpoint that the entries were encoded with, in any form that `load_vae` reads.
        source: path or fsspec address of a store, or a file `KEY.safetensors` with `KEY.json` beside it.
        output: folder for the clips, created if missing.
        device: device of the model.
        dtype: type of the model; None uses the stored one.
        keys: keys of the entries to decode; all if empty.

    Returns:
        `decoded` and `present`, numbers of clips.

    Raises:
        StoreError: the store or entry does not exist, is damaged, or was encoded with another checkpoint.
        NotFinite: the model's output is infinite or NaN.
    """
    logger.info(weights_line(checkpoint))
    vae = load_vae(checkpoint)
    known = hash_checkpoint(vae)
    coder = FrameCoder(vae.to(device, dtype).compile())
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    entries = _find_entries(source, keys)
    num_decoded = 0
    with Progress("decoding", "clip", len(entries)) as progress:
        for key, read in entries.items():
            target = output / f"{key}.mp4"
            if not target.exists():
                entry = read()
                if entry.facts["checkpoint"] != known:
                    raise StoreError(
                        f"{source}: {key} was encoded with the checkpoint {entry.facts['checkpoint'][:12]}..., "
                        f"not with {checkpoint}, which is {known[:12]}..."
                    )
                write_clip(coder, entry, target)
                num_decoded += 1
            progress.add()
    return {"decoded": num_decoded, "present": len(entries) - num_decoded}


def _find_entries(source: str | Path, keys: Sequence[str]) -> dict[str, Callable[[], StoreEntry]]:
    """Return the requested entries by key, each with a function that reads it."""
    if str(source).endswith(f".{TENSORS}"):
        return {Path(source).stem: partial(read_entry, Path(source))}
    store = Store(source)
    store.manifest()
    rows = {row["key"]: row for row in store.index().to_pylist()}
    missing = [key for key in keys if key not in rows]
    if missing:
        raise StoreError(f"{source}: no entry {missing[0]!r}")
    return {key: partial(store.read_entry, rows[key]) for key in keys or rows}


def write_clip(coder: FrameCoder, entry: StoreEntry, path: Path) -> None:
    """Decode an entry to an mp4 file with the source's timestamps, counted from the clip's start."""
    facts = entry.facts
    _, height, width = facts["size"]
    times = facts["times"]
    rate = Fraction(facts["fps"] / facts["stride"]).limit_denominator(1001) if facts["fps"] else None
    with VideoWriter(path, width, height, time_base=_TIME_BASE, rate=rate) as writer:
        frames = (frame for piece in decode_entry(coder, entry) for frame in to_bytes(piece))
        for image, seconds in zip(frames, times, strict=True):
            writer.write(image, round((seconds - times[0]) / _TIME_BASE))


def decode_entry(coder: FrameCoder, entry: StoreEntry) -> Iterator[Tensor]:
    """Decode the mean of an entry's posterior.

    Yields:
        Frames `(t, 3, H, W)` of the clip's true size, float32 in [0, 1].

    Raises:
        NotFinite: they are infinite or NaN.
    """
    latent = entry.tensors["mean"][None].to(next(coder.vae.parameters()))
    try:
        yield from coder.decode(latent.split(_LATENT_FRAMES_AT_ONCE, dim=2), entry.facts["size"])
    except NotFinite as error:
        raise NotFinite(f"{entry.key}: {error}") from None
