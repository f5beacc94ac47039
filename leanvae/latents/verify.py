"""Verification of a store: the bytes of its shards, the rows of its index, and sample clips against their sources."""

import hashlib
import io
import math
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from leanvae.checkpoint import load_vae
from leanvae.coder import FrameCoder, frames_per_latent
from leanvae.latents.clips import ClipRequest, ClipRule, Piece, Rejected, decode_source, find_source
from leanvae.latents.decode import decode_entry
from leanvae.latents.entry import FACTS, TENSORS, StoreEntry, StoreError, parse_facts, read_tensors
from leanvae.latents.session import hash_checkpoint
from leanvae.latents.store import INDEX, INDEX_SCHEMA, SHARDS, SHARED_COLUMNS, STATISTICS, Store
from leanvae.metrics.frames import psnr
from leanvae.progress import Progress
from litevae.errors import LeanVAEError

_SAME_TIME = 2e-3  # seconds


def verify_store(
    address: str | Path, checkpoint: str | Path | None = None, num_samples: int = 8, device: str = "cpu"
) -> dict[str, Any]:
    """Read a whole store again, and decode some of its clips to compare them with their sources.

    Args:
        address: path or fsspec address of the store.
        checkpoint: the checkpoint that it was encoded with; None decodes no clip.
        num_samples: number of clips to decode, spread evenly over the store.
        device: device of the model.

    Returns:
        `problems`, a line each; the numbers of `clips` and `shards` read; `samples`, each with `key`, `source` and
        `psnr` in decibels (None if infinite).

    Raises:
        StoreError: the store does not exist, or was encoded with another checkpoint.
    """
    store = Store(address)
    manifest = store.manifest()
    problems: list[str] = []
    indexes: list[pa.Table] = []
    intact: list[pa.Table] = []
    shards = store.shards()
    with Progress("verifying", "shard", len(shards)) as progress:
        for shard in shards:
            num_before = len(problems)
            try:
                index = store.shard_index(shard)
                problems += [f"{shard}: {problem}" for problem in _check_shard(store, shard, index, manifest)]
            except (StoreError, tarfile.TarError) as error:
                problems.append(f"{shard}: {error}")
            else:
                indexes.append(index)
                intact += [index] if len(problems) == num_before else []
            progress.add()
    merged = pa.concat_tables(indexes) if indexes else INDEX_SCHEMA.empty_table()
    counts = Counter(merged["key"].to_pylist())
    problems += [f"{key}: {count} times in the store" for key, count in counts.items() if count > 1]
    problems += _check_index(store, merged if len(indexes) == len(shards) else None)
    problems += _check_sources(store, Counter(merged["source_id"].to_pylist()))
    samples = []
    if checkpoint is not None and intact:
        vae = load_vae(checkpoint)
        if hash_checkpoint(vae) != manifest["checkpoint"]:
            raise StoreError(f"{store.address}: encoded with another checkpoint than the one given")
        rows = _spread(pa.concat_tables(intact), num_samples)
        samples = list(_compare_samples(store, manifest, FrameCoder(vae.to(device)), rows, problems))
    return {
        "store": store.address,
        "shards": len(shards),
        "clips": merged.num_rows,
        "problems": problems,
        "samples": samples,
    }


def _check_shard(store: Store, shard: str, index: pa.Table, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the differences between a shard and its index.

    Raises:
        StoreError: the tar is not the one that was written; its clips do not count.
    """
    data = store.read(f"{SHARDS}/{shard}.tar")
    facts = store.shard_facts(shard)
    if len(data) != facts.bytes or hashlib.sha256(data).hexdigest() != facts.sha256:
        raise StoreError("the tar is not the one that was written: its SHA-256 differs")
    rows = {row["key"]: row for row in index.to_pylist()}
    seen: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            seen.add(info.name)
            if key not in rows:
                yield f"{info.name} is not in the index"
            elif extension == TENSORS and info.offset_data != rows[key]["offset"]:
                yield f"{info.name} lies elsewhere than the index says"
    for key, row in rows.items():
        if {f"{key}.{TENSORS}", f"{key}.{FACTS}"} <= seen:
            yield from (f"{key}: {problem}" for problem in _check_entry(row, data, manifest))
        else:
            yield f"{key} is in the index and not in the tar"


def _check_entry(row: dict[str, Any], shard: bytes, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the problems of an entry."""
    try:
        tensors = read_tensors(shard[row["offset"] : row["offset"] + row["bytes"]], TENSORS)
        facts = parse_facts(shard[row["facts_offset"] : row["facts_offset"] + row["facts_bytes"]], FACTS)
    except StoreError as error:
        yield str(error)
        return
    for name, tensor in tensors.items():
        if list(tensor.shape) != row["latent_shape"] or str(tensor.dtype) != f"torch.{manifest['dtype']}":
            yield f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {row['latent_shape']} {manifest['dtype']}"
        if not tensor.isfinite().all():
            yield f"{name} is not finite"
    for name in SHARED_COLUMNS:
        if facts.get(name) != row[name]:
            yield f"{name} is {facts.get(name)} in the tar and {row[name]} in the index"
    if facts["checkpoint"] != manifest["checkpoint"]:
        yield "it was encoded with another checkpoint than the store"


def _check_index(store: Store, merged: pa.Table | None) -> Iterator[str]:
    """Compare the store's index with those of the shards, if all of them can be read."""
    if not store.exists(INDEX):
        yield f"{INDEX} is missing: the run that writes it has not ended; start it again"
        return
    try:
        index = store.read_table(INDEX)
    except StoreError as error:
        yield str(error)
    else:
        if merged is not None and not index.equals(merged):
            yield f"{INDEX} is not what the shards' own indexes make together"


def _check_sources(store: Store, num_clips: Counter[str]) -> Iterator[str]:
    """Compare the number of clips by source with the source's record."""
    try:
        records = store.sources()
    except StoreError as error:
        yield str(error)
        return
    for record in records.values():
        if num_clips[record.id] != record.num_clips:
            yield f"{record.source}: {num_clips[record.id]} clips in the store, {record.num_clips} expected"


def _spread(index: pa.Table, number: int) -> list[dict[str, Any]]:
    """Return rows spread evenly over an index."""
    places = np.linspace(0, index.num_rows - 1, min(number, index.num_rows)).round().astype(int)
    return index.take(places).to_pylist()


def _compare_samples(
    store: Store, manifest: dict[str, Any], coder: FrameCoder, rows: list[dict[str, Any]], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Decode clips and measure them against their sources; add the impossible ones to `problems`."""
    rule = ClipRule.model_validate(manifest["rule"])
    for row in rows:
        try:
            psnr_of_clip = _psnr(coder, store.read_entry(row), rule)
        except (LeanVAEError, OSError) as error:
            problems.append(f"{row['key']}: {error}")
        else:
            yield {"key": row["key"], "source": row["source"], "psnr": psnr_of_clip}


def _psnr(coder: FrameCoder, entry: StoreEntry, rule: ClipRule) -> float | None:
    """Compute the mean PSNR in decibels over a clip's frames; None if infinite."""
    originals = _source_frames(entry.facts, ClipRequest(rule, frames_per_latent(coder.vae)))
    decoded = (frame for frames in decode_entry(coder, entry) for frame in frames.cpu().split(1))
    values = [
        psnr(frame, torch.from_numpy(original).movedim(-1, 0)[None].float() / 255).item()
        for original, frame in zip(originals, decoded, strict=True)
    ]
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else None


def _source_frames(facts: dict[str, Any], request: ClipRequest) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of an entry's clip, decoded again from its source.

    Raises:
        StoreError: the source can no longer be read, or has changed since it was encoded.
    """
    source = find_source(facts["source"], facts["start"], facts["end"])
    changed = f"{source.name}: has changed since it was encoded"
    times = facts["times"]
    for result in decode_source(source, request):
        if isinstance(result, Rejected):
            raise StoreError(f"{source.name}: can no longer be read: {result.reason}")
        if not isinstance(result, Piece) or result.first != facts["first_frame"]:
            continue
        if list(result.source_size) != facts["source_size"]:
            now, before = ("x".join(map(str, reversed(size))) for size in (result.source_size, facts["source_size"]))
            raise StoreError(f"{changed}: its frames are {now}, and were {before}")
        expected, times = times[: len(result.times)], times[len(result.times) :]
        same = len(expected) == len(result.times) and np.allclose(result.times, expected, rtol=0, atol=_SAME_TIME)
        if not same or (result.ends and times):
            raise StoreError(f"{changed}: it has other frames from number {result.first} on")
        yield from result.frames
        if result.ends:
            return
    raise StoreError(f"{changed}: it has no clip from frame {facts['first_frame']} on")


def store_info(address: str | Path) -> dict[str, Any]:
    """Describe a store: counts, shapes, reasons of skipped sources, and the latents' statistics.

    Raises:
        StoreError: the store does not exist.
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
