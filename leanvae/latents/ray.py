"""Encoding on a Ray cluster: CPU tasks decode, actors with a model each encode, and the caller writes.

Ray repeats the tasks of workers and nodes that die, and passes on each result once. The caller stores results in the
same way as those of the other engine.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from leanvae.latents.clips import ClipRequest, Decoded, Order, Piece, decode_source
from leanvae.latents.encoder import VAE, Encoded, EncodeJob, make_encoder, make_request
from litevae.errors import InvalidInput, extra

with extra("video"):
    import cv2
with extra("ray"):
    import ray
    import ray.data

_SOURCES_PER_TASK = 8
Batch = Any  # a dictionary of columns; Ray's own type also allows tables


def encode_with_ray(job: EncodeJob, vae: VAE, device: str, orders: Sequence[Order]) -> Iterator[Encoded]:
    """Encode sources on the cluster that `RAY_ADDRESS` names, or on a local one.

    There is an actor for each GPU or, without GPUs, for every two CPUs. A clip goes through the object store as a
    whole.

    Args:
        vae: the model from `load_vae`. Actors get a copy, so it is the same on every node, and no node needs the
            checkpoint.

    Raises:
        InvalidInput: the cluster cannot be joined.
    """
    if not ray.is_initialized():
        # A local cluster's workers would have a niceness of 15, and starve beside anything else.
        os.environ.setdefault("RAY_worker_niceness", "5")
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            cause = str(error.__cause__ or error).strip().splitlines()[-1]
            raise InvalidInput(f"RAY_ADDRESS: {error}: {cause}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # sources lost in this way count as unfinished
    resources = ray.cluster_resources()
    on_gpu = device.startswith("cuda")
    num_actors = int(resources.get("GPU", 1)) if on_gpu else max(1, int(resources["CPU"]) // 2)
    num_tasks = -(-len(orders) // _SOURCES_PER_TASK)
    request = make_request(job, vae)
    stored_vae = [ray.put(vae)]
    results = (
        ray.data.from_items([{"order": order} for order in orders], override_num_blocks=num_tasks)
        .map_batches(lambda batch: _decode(batch, request), batch_size=1, batch_format="numpy", num_cpus=1)
        .map_batches(
            _Encoder,
            batch_size=job.batch_size,
            batch_format="numpy",
            fn_constructor_args=(stored_vae, job, "cuda" if on_gpu else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_gpus=1 if on_gpu else 0,
            num_cpus=0,
        )
    )
    for row in results.iter_rows():
        if isinstance(row["encoded"], Exception):
            raise row["encoded"]
        yield row["encoded"]


def _decode(batch: Batch, request: ClipRequest) -> Iterator[Batch]:
    """Decode sources: a row for each clip, and one at the end of each source."""
    cv2.setNumThreads(1)
    for source, known in batch["order"]:
        for result in _join_pieces(decode_source(source, request, known)):
            yield {"decoded": _column(result)}


def _join_pieces(results: Iterator[Decoded]) -> Iterator[Decoded]:
    """Join the pieces of each clip, because they might otherwise go to several actors."""
    pieces: dict[int, list[Piece]] = {}
    for result in results:
        if not isinstance(result, Piece):
            yield result
            continue
        parts = pieces.setdefault(result.first, [])
        parts.append(result)
        if result.ends:
            del pieces[result.first]
            frames = np.concatenate([part.frames for part in parts])
            times = [time for part in parts for time in part.times]
            yield replace(parts[0], frames=frames, times=times, ends=True)


class _Encoder:
    """An actor with a model."""

    def __init__(self, stored_vae: "list[ray.ObjectRef[VAE]]", job: EncodeJob, device: str) -> None:
        (vae,) = ray.get(stored_vae)
        self._encoder = make_encoder(job, vae, device)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Encode a batch of clips; rows that are not clips pass through, and an error becomes one."""
        try:
            for result in self._encoder.run(iter(batch["decoded"])):
                yield {"encoded": _column(result)}
        except Exception as error:  # Ray would count its sources as lost, without the reason
            yield {"encoded": _column(error)}


def _column(value: object) -> Any:
    """Make a column of one object, which numpy must not unpack."""
    column = np.empty(1, dtype=object)
    column[0] = value
    return column
