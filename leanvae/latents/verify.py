"""Checking of a store: every byte of its shards, every row of its index, and a sample of clips against the sources."""

import hashlib
import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leanvae.checkpoint import load_vae
from leanvae.data.config import SourceError
from leanvae.latents.decode import decode_entry
from leanvae.latents.decoding import Decoding, Piece, Rejected, decode_source
from leanvae.latents.encoder import VAE, frames_per_latent
from leanvae.latents.entry import FACTS, TENSORS, StoreEntry, read_tensors
from leanvae.latents.rule import ClipRule
from leanvae.latents.session import hash_checkpoint
from leanvae.latents.sources import Source, find_source
from leanvae.latents.store import INDEX, SHARDS, SHARED_COLUMNS, STATISTICS, Store, StoreError
from leanvae.metrics.frames import psnr
from leanvae.progress import Progress


def verify_store(
    address: str | Path, checkpoint: str | Path | None = None, num_samples: int = 8, device: str = "cpu"
) -> dict[str, Any]:
    """Reads a whole store again, and decodes some of its clips to compare them with their sources.

    Args:
        address: path or fsspec address of the store.
        checkpoint: what it was encoded with; without it, no clip is decoded.
        num_samples: clips to decode, spread evenly over the store.
        device: where the model runs.

    Returns:
        `problems`, a line each; `clips` and `shards` that were read; `samples`, each with `key`, `source` and `psnr` in
        decibels (None where infinite).

    Raises:
        StoreError: there is no store, or the checkpoint is another one.
    """
    store = Store(address)
    manifest = store.manifest()
    problems: list[str] = []
    num_clips: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    shards = store.shards()
    with Progress("verifying", "shard", len(shards)) as progress:
        for shard in shards:
            try:
                for row in _check_shard(store, shard, manifest, problems):
                    num_clips[row["source_id"]] += 1
                    keys[row["key"]] += 1
            except (StoreError, tarfile.TarError, KeyError) as error:
                problems.append(f"{shard}: {error}")
            progress.add()
    problems += [f"{key}: {count} times in the store" for key, count in keys.items() if count > 1]
    problems += _check_index(store)
    for record in store.sources().values():
        if num_clips[record.id] != record.num_clips:
            problems.append(f"{record.source}: {num_clips[record.id]} clips in the store, {record.num_clips} expected")
    samples = []
    if checkpoint is not None and not problems:
        samples = list(_compare_samples(store, manifest, load_vae(checkpoint), num_samples, device, problems))
    return {
        "store": store.address,
        "shards": len(shards),
        "clips": sum(keys.values()),
        "problems": problems,
        "samples": samples,
    }


def _check_shard(store: Store, shard: str, manifest: dict[str, Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Compares a shard with its index; yields the index's rows."""
    data = store.read(f"{SHARDS}/{shard}.tar")
    facts = store.shard_facts(shard)
    if len(data) != facts.bytes or hashlib.sha256(data).hexdigest() != facts.sha256:
        problems.append(f"{shard}: the tar is not the one that was written: its SHA-256 differs")
        return
    rows = {row["key"]: row for row in store.read_table(f"{SHARDS}/{shard}.parquet").to_pylist()}
    seen: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            seen.add(info.name)
            if key not in rows:
                problems.append(f"{shard}: {info.name} is not in the index")
            elif extension == TENSORS and info.offset_data != rows[key]["offset"]:
                problems.append(f"{shard}: {info.name} lies elsewhere than the index says")
    for key, row in rows.items():
        if not {f"{key}.{TENSORS}", f"{key}.{FACTS}"} <= seen:
            problems.append(f"{shard}: {key} is in the index and not in the tar")
            continue
        problems += [f"{shard}: {key}: {problem}" for problem in _check_entry(store, row, data, manifest)]
    yield from rows.values()


def _check_entry(store: Store, row: dict[str, Any], shard: bytes, manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an entry."""
    try:
        tensors = read_tensors(shard[row["offset"] : row["offset"] + row["bytes"]], row["key"])
        facts = json.loads(shard[row["facts_offset"] : row["facts_offset"] + row["facts_bytes"]])
    except ValueError as error:
        yield str(error)
        return
    for name, tensor in tensors.items():
        if list(tensor.shape) != row["latent_shape"] or str(tensor.dtype) != f"torch.{manifest['dtype']}":
            yield f"{name} is {tuple(tensor.shape)} {tensor.dtype}, {row['latent_shape']} {manifest['dtype']} expected"
        if not tensor.isfinite().all():
            yield f"{name} is not finite"
    for name in SHARED_COLUMNS:
        if facts.get(name) != row[name]:
            yield f"{name} is {facts.get(name)} in the tar and {row[name]} in the index"
    if facts["checkpoint"] != manifest["checkpoint"]:
        yield "it was encoded with another checkpoint than the store"
    if len(facts["times"]) != facts["size"][0]:
        yield f"{len(facts['times'])} timestamps for {facts['size'][0]} frames"


def _check_index(store: Store) -> Iterator[str]:
    if not store.exists(INDEX):
        yield f"{INDEX} is missing: the run that was to write it has not ended; start it again"
    elif not store.read_table(INDEX).equals(store.merge_indexes()):
        yield f"{INDEX} is not what the shards' own indexes make together"


def _compare_samples(
    store: Store, manifest: dict[str, Any], vae: VAE, num_samples: int, device: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Decodes clips spread over the store, and measures them against their sources."""
    if hash_checkpoint(vae) != manifest["checkpoint"]:
        raise StoreError(f"{store.address}: encoded with another checkpoint than the one given")
    vae = vae.to(device)
    index = store.index()
    numbers = np.linspace(0, index.num_rows - 1, min(num_samples, index.num_rows)).round().astype(int)
    rule = ClipRule.model_validate(manifest["rule"])
    for number in numbers.tolist():
        row = index.slice(number, 1).to_pylist()[0]
        entry = store.read_entry(row)
        try:
            yield {"key": entry.key, "source": row["source"], "psnr": _psnr(vae, entry, rule)}
        except (StoreError, SourceError, OSError) as error:
            problems.append(f"{entry.key}: {error}")


def _psnr(vae: VAE, entry: StoreEntry, rule: ClipRule) -> float | None:
    """Mean PSNR in decibels over a clip's frames; None where infinite."""
    facts = entry.facts
    source = find_source(facts["source"], facts["start"], facts["end"])
    originals = _source_frames(source, Decoding(rule, frames_per_latent(vae)), facts["first_frame"])
    decoded = (frame for frames in decode_entry(vae, entry) for frame in frames.cpu().split(1))
    values = [
        psnr(frame, torch.from_numpy(original).movedim(-1, 0)[None].float() / 255).item()
        for original, frame in zip(originals, decoded, strict=True)
    ]
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else None


def _source_frames(source: Source, decoding: Decoding, first: int) -> Iterator[NDArray[np.uint8]]:
    """The frames of a source's clip that begins with its frame `first`.

    Raises:
        StoreError: the source cannot be read any more, or holds no such clip.
    """
    for result in decode_source(source, decoding):
        if isinstance(result, Rejected):
            raise StoreError(f"the source cannot be read: {result.reason}")
        if isinstance(result, Piece) and result.first == first:
            yield from result.frames
            if result.ends:
                return
    raise StoreError(f"{source.name} holds no clip from frame {first} on")


def store_info(address: str | Path) -> dict[str, Any]:
    """What a store holds: counts, shapes, reasons of skipped sources, and the latents' statistics.

    Raises:
        StoreError: there is no store.
    """
    store = Store(address)
    manifest = store.manifest()
    index = store.index()
    shapes = Counter("x".join(map(str, shape)) for shape in index["latent_shape"].to_pylist())
    frames = [size[0] for size in index["size"].to_pylist()]
    rates = zip(frames, index["fps"].to_pylist(), index["stride"].to_pylist(), strict=True)
    reasons = Counter(record.reason for record in store.sources().values() if record.reason is not None)
    return {
        "store": store.address,
        **{name: manifest[name] for name in ("model", "checkpoint", "rule", "dtype", "compute_dtype", "flips")},
        "clips": index.num_rows,
        "frames": sum(frames),
        "hours": round(sum(count * stride / fps for count, fps, stride in rates if fps) / 3600, 4),
        "bytes": sum(store.shard_facts(shard).bytes for shard in store.shards()),
        "shards": len(store.shards()),
        "latent_shapes": dict(shapes.most_common()),
        "skipped": dict(reasons.most_common()),
        "statistics": store.read_json(STATISTICS) if store.exists(STATISTICS) else None,
    }
