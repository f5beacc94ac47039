"""Encoding of sources into a latent store: the remaining work, its distribution, and its summary."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from leanvae.checkpoint import load_vae
from leanvae.data.quarantine import modification_time
from leanvae.distributed import barrier, gather, join_ranks, on_main, rank, world_size
from leanvae.latents.clips import Finished, Order, Rejected, belongs_to, list_sources
from leanvae.latents.encoder import VAE, Encoded, EncodedClip, EncodeJob, encode_here, make_entry
from leanvae.latents.entry import StoreEntry
from leanvae.latents.session import hash_checkpoint, writing
from leanvae.latents.shards import ShardWriter
from leanvae.latents.statistics import merge_moments
from leanvae.latents.store import INDEX, STATISTICS, SUMMARY, SourceRecord, Store, StoreError
from leanvae.media.item import Item, printable
from leanvae.named import weights_line
from leanvae.progress import Progress
from litevae.errors import InvalidInput
from litevae.pretrained import CONFIG_FILE, STATISTICS_FIELDS, update_config

logger = logging.getLogger("leanvae")

EngineName = Literal["local", "ray"]

# In larger files, clips before damage are kept, because they cannot all wait in memory for the file's end.
_BYTES_HELD_OF_A_SOURCE = 2**29
_SAME_RATE = 1.1  # 24, 25 and 23.976 count as one rate


@join_ranks()
def encode_clips(
    inputs: Sequence[str],
    output: str | Path,
    job: EncodeJob,
    device: str = "cpu",
    engine: EngineName = "local",
    shard_bytes: int = 2**28,
    update_checkpoint: bool = False,
) -> dict[str, Any]:
    """Encode clips into a store, or resume that; all ranks call it together.

    If it is killed at any moment and called again, each clip ends up in the store exactly once. Sources are divided
    among the ranks by a hash of their names. An unusable source is recorded with the reason. It is tried again if its
    file has changed, or if the reason may be temporary, such as a network or a killed decoder.

    Args:
        inputs: as in `leanvae.latents.clips.list_sources`.
        output: path or fsspec address of the store's folder.
        job: settings of decoding and encoding.
        device: device of the model; with Ray, `cuda` gives each actor a GPU.
        engine: `local`, or `ray` for a cluster, whose actors encode while this process writes.
        shard_bytes: length of a shard.
        update_checkpoint: whether to write the latents' mean and standard deviation into the checkpoint's
            configuration.

    Returns:
        The content of `summary.json`: `sources`, `clips`, `frames`, `shards` and `bytes` of the store, `skipped`
        (`source` and `reason` each), `unfinished` (sources that an engine lost), and `run`, with `clips`, `frames`,
        `seconds`, `clips_per_second` and `frames_per_second` of this run over all ranks.

    Raises:
        SourceError: an input is missing or malformed.
        StoreError: the store was made with other settings; the message says which.
        InvalidInput: another run is writing to the store.
        NotFinite: the model's output is not finite.
        OSError: a file cannot be written; it is named.
    """
    if engine == "ray" and world_size() > 1:
        raise InvalidInput("--engine ray: Ray starts its own processes; start one with plain python")
    if job.nvdec and (engine == "ray" or not device.startswith("cuda")):
        raise InvalidInput(
            f"--nvdec decodes on the model's GPU: not possible with --device {device} and --engine {engine}"
        )
    if job.nvdec:
        import_module("leanvae.media.nvdec")  # reports a missing package once, not for each file
    if update_checkpoint and not Path(job.checkpoint, CONFIG_FILE).is_file():
        raise InvalidInput(f"--update-checkpoint: {job.checkpoint} is not a folder with a {CONFIG_FILE}")
    unreadable: dict[str, str] = {}  # folders with the reason; only on the main rank
    store, sources = Store(output), on_main(lambda: list_sources(inputs, unreadable))
    on_main(lambda: logger.info(weights_line(job.checkpoint)))
    stored_vae = load_vae(job.checkpoint)
    checkpoint = hash_checkpoint(stored_vae)
    started = time.monotonic()
    with writing(store, _made_with(job, stored_vae, checkpoint)):
        orders = _orders(store, [source for source in sources if belongs_to(source, rank(), world_size())])
        with (
            ShardWriter(store, f"{rank():05d}", shard_bytes) as writer,
            Progress("encoding", "file", len(orders), is_shown=rank() == 0) as progress,
        ):
            collector = _Collector(writer, progress, job, checkpoint, orders)
            for encoded in _encode(job, device, engine, stored_vae, orders):
                collector.take(encoded)
        done = gather((progress.counts["clips"], progress.counts["frames"]))
        barrier()
        run = _run_figures([sum(counts) for counts in zip(*done, strict=True)], time.monotonic() - started)
        return on_main(lambda: _close(store, sources, unreadable, run, job if update_checkpoint else None))


def _made_with(job: EncodeJob, vae: VAE, checkpoint: str) -> dict[str, Any]:
    """List the properties that all entries of a store share."""
    compute_dtype = job.compute_dtype or next(vae.parameters()).dtype
    return {
        "model": type(vae).__name__,
        "config": vae.config.model_dump(mode="json", exclude=STATISTICS_FIELDS, exclude_defaults=True),
        "checkpoint": checkpoint,
        "rule": job.rule.model_dump(mode="json"),
        "dtype": str(job.dtype).removeprefix("torch."),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "flips": job.flips,
        "thumbnails": job.thumbnails,
        "decoder": "nvdec" if job.nvdec else "pyav",
    }


def _orders(store: Store, sources: Sequence[Item]) -> list[Order]:
    """Return the remaining sources, each with the first frames of the clips that are already stored."""
    records = store.sources()
    left = [source for source in sources if not _is_done(source, records.get(source.id))]
    known: dict[str, set[int]] = defaultdict(set)
    if left:
        table = store.merge_indexes().select(["source_id", "first_frame"])
        for source_id, first in zip(*(column.to_pylist() for column in table.columns), strict=True):
            known[source_id].add(first)
    return [(source, frozenset(known.get(source.id, ()))) for source in left]


def _is_done(source: Item, record: SourceRecord | None) -> bool:
    """Tell whether nothing is left to do: it has been encoded, or cannot be used until its file changes."""
    if record is None:
        return False
    return record.reason is None or (record.modified != -1 and record.modified == modification_time(source.address))


def _encode(job: EncodeJob, device: str, engine: EngineName, vae: VAE, orders: Sequence[Order]) -> Iterator[Encoded]:
    if not orders:
        return iter(())
    if engine == "ray":
        from leanvae.latents.ray import encode_with_ray

        return encode_with_ray(job, vae, device, orders)
    return encode_here(job, vae, device, orders)


@dataclass
class _OpenSource:
    """A source whose clips have not all been encoded yet."""

    entries: list[StoreEntry] = field(default_factory=list)
    num_bytes: int = 0
    num_encoded: int = 0
    num_written: int = 0
    finished: Finished | None = None


class _Collector:
    """A collector of each source's clips, which writes them once the source has proved to be good."""

    def __init__(
        self, writer: ShardWriter, progress: Progress, job: EncodeJob, checkpoint: str, orders: Sequence[Order]
    ) -> None:
        self._writer = writer
        self._progress = progress
        self._rule = job.rule
        self._checkpoint = checkpoint
        self._num_known = {source.id: len(known) for source, known in orders}
        self._open: dict[str, _OpenSource] = defaultdict(_OpenSource)
        self._closed: set[str] = set()

    def take(self, encoded: Encoded) -> None:
        """Take an engine's output."""
        source = encoded.source
        if source.id in self._closed:
            return  # a clip of a source that was rejected
        state = self._open[source.id]
        if isinstance(encoded, Rejected):
            logger.warning("%s: skipped: %s", source.name, encoded.reason)
            self._close(
                source, num_frames=0, num_clips=self._num_known[source.id] + state.num_written, rejected=encoded
            )
            return
        if isinstance(encoded, EncodedClip):
            entry = make_entry(encoded, self._rule, self._checkpoint)
            state.entries.append(entry)
            state.num_bytes += sum(tensor.nbytes for tensor in entry.tensors.values())
            state.num_encoded += 1
            self._progress.count(clips=1, frames=len(encoded.times))
            if state.num_bytes > _BYTES_HELD_OF_A_SOURCE:
                self._write(state)
        else:
            state.finished = encoded
        if state.finished is not None and state.num_encoded == state.finished.num_sent:
            self._write(state)
            self._close(source, state.finished.num_frames, state.finished.num_clips)
        self._writer.complete_if_due()

    def _write(self, state: _OpenSource) -> None:
        self._writer.add(state.entries)
        state.num_written += len(state.entries)
        state.entries, state.num_bytes = [], 0

    def _close(self, source: Item, num_frames: int, num_clips: int, rejected: Rejected | None = None) -> None:
        reason = None if rejected is None else rejected.reason
        modified = -1 if rejected is not None and rejected.may_pass else modification_time(source.address)
        self._writer.note(SourceRecord(source.id, source.name, modified, num_frames, num_clips, reason))
        del self._open[source.id]
        self._closed.add(source.id)
        self._progress.add()


def _run_figures(counts: Sequence[int], seconds: float) -> dict[str, Any]:
    clips, frames = counts
    return {
        "clips": clips,
        "frames": frames,
        "seconds": round(seconds, 3),
        "clips_per_second": round(clips / seconds, 3),
        "frames_per_second": round(frames / seconds, 3),
    }


def _close(
    store: Store, sources: Sequence[Item], unreadable: dict[str, str], run: dict[str, Any], update: EncodeJob | None
) -> dict[str, Any]:
    """Write the files about the store as a whole; return the summary."""
    index = store.merge_indexes()
    facts = [store.shard_facts(shard) for shard in store.shards()]
    moments = merge_moments(shard.moments for shard in facts)
    if moments.count:
        store.write_json(STATISTICS, {"count": moments.count, "mean": moments.mean, "std": moments.std})
    store.write_table(INDEX, index)
    if update is not None and moments.count:
        write_statistics(Path(update.checkpoint), moments.mean, moments.std)
    records = store.sources()
    listed = [records[source.id] for source in sources if source.id in records]
    summary = {
        "store": store.address,
        "sources": len(sources),
        "clips": index.num_rows,
        "frames": sum(size[0] for size in index["size"].to_pylist()),
        "shards": len(facts),
        "bytes": sum(shard.bytes for shard in facts),
        "skipped": [
            *({"source": known.source, "reason": known.reason} for known in listed if known.reason is not None),
            *({"source": printable(folder), "reason": reason} for folder, reason in unreadable.items()),
        ],
        "unfinished": len(sources) - len(listed),
        "run": run,
    }
    store.write_json(SUMMARY, summary)
    _warn_of_rates(index["fps"].to_pylist())
    return summary


def _warn_of_rates(rates: Sequence[float | None]) -> None:
    """Warn if the clips of a store differ in frame rate: the same motion then differs in speed."""
    known = sorted({rate for rate in rates if rate})
    if known and known[-1] > _SAME_RATE * known[0]:
        logger.warning(
            "the clips have from %.4g to %.4g frames a second: the same motion takes more or fewer frames; "
            "the column fps of the index tells them apart",
            known[0],
            known[-1],
        )


def write_statistics(checkpoint: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write `latent_mean` and `latent_std` into a checkpoint folder's configuration.

    Raises:
        StoreError: a channel is constant, and cannot be scaled.
    """
    if min(std) <= 0:
        raise StoreError(f"latent_std: channel {list(std).index(min(std))} is constant: {checkpoint} is not changed")
    update_config(checkpoint, {"latent_mean": list(mean), "latent_std": list(std)})
