"""How sources become encoded clips; what both engines share, and the one that works in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from leanvae.latents.clips import ClipRequest, ClipRule, Order, decode_ahead
from leanvae.latents.encoding import VAE, ClipEncoder, Encoded, frames_per_latent


@dataclass(frozen=True)
class Work:
    """How clips are decoded and encoded.

    Attributes:
        checkpoint: what `load_vae` reads.
        rule: how files become clips.
        dtype: type of the latents.
        compute_dtype: type of the weights; as stored if None.
        batch_size: clips encoded together.
        flips: also encode mirror images.
        thumbnails: also keep the first frame of each clip.
        num_workers: decoder processes.
        timeout: seconds that a decoder may be silent.
        memory_limit: as in `LeanVAE.encode`.
        nvdec: decode by the GPU that the model is on.
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


def load_for_encoding(vae: VAE, work: Work, device: str) -> VAE:
    """A model as `load_vae` gave it, prepared for inference on a device."""
    return vae.to(device, work.compute_dtype).compile()


def make_decoding(work: Work, vae: VAE) -> ClipRequest:
    """What decoders need to know to serve a model."""
    gpu = str(next(vae.parameters()).device) if work.nvdec else None
    return ClipRequest(work.rule, frames_per_latent(vae), work.thumbnails, gpu)


def make_encoder(work: Work, vae: VAE) -> ClipEncoder:
    """An encoder with a model."""
    return ClipEncoder(vae, work.dtype, work.batch_size, work.flips, work.memory_limit)


def encode_here(work: Work, vae: VAE, orders: Sequence[Order]) -> Iterator[Encoded]:
    """Encodes in this process what decoder processes send."""
    ahead = 2 * (work.num_workers + work.batch_size)
    decoded = decode_ahead(orders, make_decoding(work, vae), work.num_workers, ahead, work.timeout)
    return make_encoder(work, vae).run(decoded)
