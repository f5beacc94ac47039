"""Encoding pieces of clips: short clips of one shape in batches, long ones piece by piece, in order of arrival."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvae.coder import VAE, FrameCoder, ImageEncoder, frames_per_latent, to_model
from leanvae.inference.stream import EncoderStream, joined
from leanvae.latents.clips import ClipRequest, ClipRule, Decoded, Finished, Order, Piece, Rejected, decode_ahead
from leanvae.latents.entry import StoreEntry
from leanvae.media.item import Item
from litevae.errors import NotFinite
from litevae.memory import return_freed_memory
from litevae.posterior import DiagonalGaussian

_FLIPPED = "flipped_"
_SECONDS_BETWEEN_RETURNS = 0.25  # between returns of freed memory to the system


@dataclass(frozen=True)
class EncodeJob:
    """The settings of decoding and encoding.

    Attributes:
        checkpoint: a checkpoint in any form that `load_vae` reads.
        rule: the rule by which files become clips.
        dtype: type of the latents.
        compute_dtype: type of the weights; None uses the stored one.
        batch_size: number of clips to encode together.
        flips: whether to also encode mirror images.
        thumbnails: whether to also keep the first frame of each clip.
        num_workers: number of decoder processes.
        timeout: seconds that a decoder may be silent.
        memory_limit: as in `LeanVAE.encode`.
        nvdec: whether to decode on the model's GPU.
    """

    checkpoint: str | Path
    rule: ClipRule
    dtype: torch.dtype = torch.float16
    compute_dtype: torch.dtype | None = None
    batch_size: int = 4
    flips: bool = False
    thumbnails: bool = False
    num_workers: int = 2
    timeout: float = 120.0
    memory_limit: str | int | None = None
    nvdec: bool = False


@dataclass(frozen=True)
class EncodedClip:
    """A clip's posterior, and the clip's origin.

    Attributes:
        last: the clip's last piece, without its frames.
        times: (T,) seconds of all its frames since the file's start.
        thumbnail: first frame as JPEG, if requested.
        tensors: `mean` and `logvar` `(Z, T', H', W')`, and with flips `flipped_mean` and `flipped_logvar`.
    """

    source: Item
    first: int
    last: Piece
    times: list[float]
    thumbnail: bytes | None
    tensors: dict[str, Tensor]


Encoded = EncodedClip | Finished | Rejected


class ClipEncoder:
    """An encoder of pieces of clips.

    Args:
        vae: the model; a `LiteVAE` encodes each frame separately.
        dtype: type of the latents.
        batch_size: number of clips to encode together, if they have the same shape and arrive in one piece.
        flips: whether to also encode each clip mirrored horizontally.
        memory_limit: as in `LeanVAE.encode`; None means 6 GiB on CPUs.
    """

    def __init__(
        self, vae: VAE, dtype: torch.dtype, batch_size: int, flips: bool, memory_limit: str | int | None = None
    ) -> None:
        self._coder = FrameCoder(vae, memory_limit=memory_limit)
        self._dtype = dtype
        self._batch_size = batch_size
        self._flips = flips
        self._waiting: dict[tuple[int, ...], list[Piece]] = {}
        self._open: dict[tuple[str, int], _LongClip] = {}
        self._memory_returned = 0.0

    def run(self, decoded: Iterator[Decoded]) -> Iterator[Encoded]:
        """Encode the output of decoders; their reports on sources pass through.

        Raises:
            NotFinite: the model's output is infinite or NaN.
        """
        for result in decoded:
            if isinstance(result, Piece):
                yield from self._add(result)
            else:
                self._forget(result.source, is_void=isinstance(result, Rejected))
                yield result
        for shape in list(self._waiting):
            yield from self._encode_batch(self._waiting.pop(shape))

    @torch.inference_mode()
    def _add(self, piece: Piece) -> Iterator[EncodedClip]:
        if piece.begins and piece.ends:
            shape = piece.frames.shape
            batch = self._waiting.setdefault(shape, [])
            batch.append(piece)
            if len(batch) == self._batch_size:
                yield from self._encode_batch(self._waiting.pop(shape))
            elif (
                sum(map(len, self._waiting.values())) >= 2 * self._batch_size
            ):  # with many shapes, no batch might ever fill
                fullest = max(self._waiting, key=lambda shape: len(self._waiting[shape]))
                yield from self._encode_batch(self._waiting.pop(fullest))
            return
        key = (piece.source.id, piece.first)
        if piece.begins:
            self._open[key] = _LongClip(self._coder.encoder(), piece.thumbnail)
        clip = self._open[key]
        clip.encode(to_model(self._views([piece]), self._coder.vae), piece)
        self._return_memory()
        if piece.ends:
            del self._open[key]
            yield self._finish(piece, clip.times, clip.thumbnail, joined(clip.posteriors, ()))

    @torch.inference_mode()
    def _encode_batch(self, pieces: list[Piece]) -> Iterator[EncodedClip]:
        posterior = self._coder.encode(self._views(pieces))
        self._return_memory()
        parts = (values.chunk(len(pieces)) for values in (posterior.mean, posterior.logvar))
        for piece, mean, logvar in zip(pieces, *parts, strict=True):
            yield self._finish(piece, piece.times, piece.thumbnail, DiagonalGaussian(mean, logvar))

    def _return_memory(self) -> None:
        """Return freed memory now and then, because frames come and go beside kept tensors, and the heap would grow."""
        if time.monotonic() - self._memory_returned > _SECONDS_BETWEEN_RETURNS:
            return_freed_memory(next(self._coder.vae.parameters()).device)
            self._memory_returned = time.monotonic()

    def _views(self, pieces: list[Piece]) -> list[NDArray[np.uint8]]:
        """Return the frames of each piece; with flips, each is followed by its mirror image."""
        if not self._flips:
            return [piece.frames for piece in pieces]
        return [frames for piece in pieces for frames in (piece.frames, piece.frames[:, :, ::-1])]

    def _finish(
        self, piece: Piece, times: list[float], thumbnail: bytes | None, posterior: DiagonalGaussian
    ) -> EncodedClip:
        """Pack the posterior `(1 or 2, Z, T', H', W')` of a clip and, with flips, its mirror image."""
        tensors = {}
        for prefix, mean, logvar in zip(("", _FLIPPED), posterior.mean, posterior.logvar, strict=False):
            tensors[f"{prefix}mean"] = mean.to("cpu", self._dtype).contiguous()
            tensors[f"{prefix}logvar"] = logvar.to("cpu", self._dtype).contiguous()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise NotFinite(
                f"{piece.source.name}: the latents are not finite in {self._dtype}: the weights are broken, "
                "or need another --dtype"
            )
        last = replace(piece, frames=np.empty((0, *piece.frames.shape[1:]), np.uint8), thumbnail=None)
        return EncodedClip(piece.source, piece.first, last, times, thumbnail, tensors)

    def _forget(self, source: Item, is_void: bool) -> None:
        """Drop the clips of a source that will not end or, if it is void, all that have not been encoded yet."""
        for key in [key for key in self._open if key[0] == source.id]:
            del self._open[key]
        if is_void:
            for shape in list(self._waiting):
                kept = [piece for piece in self._waiting.pop(shape) if piece.source != source]
                if kept:
                    self._waiting[shape] = kept


@dataclass
class _LongClip:
    """A clip that arrives in pieces."""

    encoder: EncoderStream | ImageEncoder
    thumbnail: bytes | None
    times: list[float] = field(default_factory=list)
    posteriors: list[DiagonalGaussian] = field(default_factory=list)

    def encode(self, x: Tensor, piece: Piece) -> None:
        """Encode the next piece, which is `x` for the model."""
        self.times += piece.times
        found = [self.encoder.push(part) for part in self.encoder.split(x)]
        if piece.ends:
            found.append(self.encoder.finish())
        self.posteriors += [posterior for posterior in found if posterior is not None]


def make_request(job: EncodeJob, vae: VAE) -> ClipRequest:
    """Return the settings for decoders that serve a model on its device."""
    gpu = str(next(vae.parameters()).device) if job.nvdec else None
    return ClipRequest(job.rule, frames_per_latent(vae), job.thumbnails, gpu)


def make_encoder(job: EncodeJob, vae: VAE, device: str) -> ClipEncoder:
    """Make an encoder with a model from `load_vae`, prepared for inference on a device."""
    vae = vae.to(device, job.compute_dtype).compile()
    return ClipEncoder(vae, job.dtype, job.batch_size, job.flips, job.memory_limit)


def encode_here(job: EncodeJob, vae: VAE, device: str, orders: Sequence[Order]) -> Iterator[Encoded]:
    """Encode the output of decoder processes in this process."""
    encoder = make_encoder(job, vae, device)
    ahead = 2 * (job.num_workers + job.batch_size)
    return encoder.run(decode_ahead(orders, make_request(job, vae), job.num_workers, ahead, job.timeout))


def make_entry(clip: EncodedClip, rule: ClipRule, checkpoint: str) -> StoreEntry:
    """Assemble a clip's entry for the store.

    Args:
        checkpoint: hash of the weights and the configuration of its encoder.
    """
    source, last, caption = clip.source, clip.last, clip.source.columns.get("caption")
    facts = {
        "key": f"{source.id}_{clip.first:07d}",
        "source": source.name,
        "start": source.start,
        "end": source.end,
        "first_frame": clip.first,
        "stride": rule.stride,
        "fps": last.fps,
        "times": clip.times,
        "size": [len(clip.times), *last.placement.resolution],
        "source_size": list(last.source_size),
        "resized": list(last.placement.resized),
        "crop": list(last.placement.crop),
        "latent_shape": list(clip.tensors["mean"].shape),
        "dtype": str(clip.tensors["mean"].dtype).removeprefix("torch."),
        "flipped": len(clip.tensors) > 2,
        "checkpoint": checkpoint,
        "caption": None if caption is None else str(caption),
        "columns": source.columns,
    }
    return StoreEntry(facts, clip.tensors, clip.thumbnail)
