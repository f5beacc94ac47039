"""Latents encoded on the fly, for training that augments its clips."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from leanvae.latents.clips import ClipRequest, ClipRule, Decoded, Piece, Rejected, decode_ahead, list_sources
from leanvae.latents.encoder import VAE, ClipEncoder, EncodedClip, frames_per_latent, make_entry
from leanvae.latents.reading import epoch_order, make_item, process_place
from litevae.errors import InvalidInput
from litevae.normalization import normalize_posterior
from litevae.posterior import DiagonalGaussian

logger = logging.getLogger("leanvae")

Augment = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]

_AUGMENTATION, _NOISE = 3, 2


class OnlineLatents:
    """The clips of sources, encoded on the fly, as an iterable of the items of `LatentClips`.

    Each iteration is an epoch over this rank's share of the sources, in an order given by seed and epoch. Clips are
    yielded as they are finished. Clips of a damaged file may be yielded before the damage shows.

    Args:
        sources: as in `leanvae.latents.clips.list_sources`.
        vae: the model, on the device and in the type to compute with.
        rule: the rule by which files become clips.
        mode: whether to take the posterior's mean instead of a sample.
        flip: whether to mirror half of the clips horizontally.
        augment: maps a clip's frames (t, H, W, 3) uint8 to others of the same shape; a clip longer than some seconds
            comes in pieces, each with a generator in the same state.
        normalize: as in `LeanVAE.encode`.
        batch_size: number of clips to encode together.
        num_workers: number of decoder processes.
        timeout: seconds that one of them may be silent.
        seed: seed of order, flips, augmentation and samples.
        rank, world_size: place of this process; None means its place in distributed training.

    Attributes:
        epoch: the current epoch; it advances after an iteration.
    """

    def __init__(
        self,
        sources: str | Sequence[str],
        vae: VAE,
        rule: ClipRule,
        *,
        mode: bool = False,
        flip: bool = False,
        augment: Augment | None = None,
        normalize: bool = False,
        batch_size: int = 1,
        num_workers: int = 2,
        timeout: float = 120.0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._sources = list_sources([sources] if isinstance(sources, str) else sources)
        self._vae = vae
        self._request = ClipRequest(rule, frames_per_latent(vae))
        self._mode = mode
        self._flip = flip
        self._augment = augment
        self._normalize = normalize
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._timeout = timeout
        self._seed = seed
        self._rank, self._world_size = process_place(rank, world_size)
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the items of an epoch.

        Raises:
            InvalidInput: this is a `DataLoader` worker, which may not start decoder processes.
        """
        if get_worker_info() is not None:
            raise InvalidInput("OnlineLatents has its own decoder processes: give the DataLoader num_workers=0")
        order = epoch_order(len(self._sources), self._seed, self.epoch)[self._rank :: self._world_size]
        orders = ((self._sources[number], frozenset[int]()) for number in order.tolist())
        ahead = 2 * (self._num_workers + self._batch_size)
        decoded = decode_ahead(orders, self._request, self._num_workers, ahead, self._timeout)
        encoder = ClipEncoder(self._vae, torch.float32, self._batch_size, flips=False)
        for result in encoder.run(self._augmented(decoded)):
            if isinstance(result, EncodedClip):
                yield self._item(result)
            elif isinstance(result, Rejected):
                logger.warning("%s: skipped: %s", result.source.name, result.reason)
        self.epoch += 1

    def _augmented(self, decoded: Iterator[Decoded]) -> Iterator[Decoded]:
        for result in decoded:
            if isinstance(result, Piece):
                frames = (
                    result.frames[:, :, ::-1] if self._is_flipped(result.source.id, result.first) else result.frames
                )
                if self._augment is not None:
                    frames = self._augment(frames, self._generator(_AUGMENTATION, result.source.id, result.first))
                result = replace(result, frames=np.ascontiguousarray(frames))
            yield result

    def _generator(self, purpose: int, source_id: str, first: int) -> np.random.Generator:
        return np.random.default_rng([purpose, self._seed, self.epoch, int(source_id, 16), first])

    def _is_flipped(self, source_id: str, first: int) -> bool:
        return self._flip and bool(self._generator(0, source_id, first).random() < 0.5)

    def _item(self, clip: EncodedClip) -> dict[str, Any]:
        posterior = DiagonalGaussian(clip.tensors["mean"][None], clip.tensors["logvar"][None])
        if self._normalize:
            posterior = normalize_posterior(posterior, self._vae.config)
        seed = int(self._generator(_NOISE, clip.source.id, clip.first).integers(2**63))
        latent = posterior.mode() if self._mode else posterior.sample(torch.Generator().manual_seed(seed))
        facts = make_entry(clip, self._request.rule, checkpoint="").facts
        return make_item(latent[0], facts, self._is_flipped(clip.source.id, clip.first))
