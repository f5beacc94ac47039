"""Running models over frames: bytes in; latents and checked frames out.

All commands use it: `FrameCoder` for LeanVAE and LiteVAE, `leanvae.peers` for other projects' autoencoders, and
`leanvae.evaluation.baselines` for JPEG and the like.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanvae.inference.plan import LIMIT_ON_CPU, PIXELS_AT_ONCE, ClipPlan, Parts, make_plan, plan_reconstruction
from leanvae.inference.stream import DecoderStream, EncoderStream
from leanvae.media.info import Frame
from leanvae.model import LeanVAE
from litevae.config import DOWNSAMPLING
from litevae.errors import NotFinite, extra
from litevae.memory import parse_bytes
from litevae.model import LiteVAE
from litevae.pixels import from_bytes
from litevae.posterior import DiagonalGaussian

with extra("video"):
    import cv2

VAE = LeanVAE | LiteVAE
Tile = tuple[int, int] | None  # (height, width) in pixels
Clip = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]  # (T, H, W, 3), or its frames
IMAGES_AT_ONCE = 4  # most frames that an image model gets at a time


class Seams(NamedTuple):
    """The places where a clip's parts meet: the first row, column and frame of each part except the first."""

    rows: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()
    frames: frozenset[int] = frozenset()

    @classmethod
    def between(
        cls,
        size: Sequence[int],
        tiles: Iterable[Tile] = (),
        first: int | None = None,
        chunk: int = 1,
    ) -> "Seams":
        """Find where tiles and chunks meet.

        Args:
            size: (T, H, W) of the clip.
            tiles: (height, width) in pixels of each tiling of the frames; None for whole frames.
            first: frames of the first chunk; None if the clip is not cut.
            chunk: frames of each further chunk.
        """
        frames, height, width = size
        sides = [tile for tile in tiles if tile is not None]
        return cls(
            frozenset(row for side, _ in sides for row in range(side, height, side)),
            frozenset(column for _, side in sides for column in range(side, width, side)),
            frozenset() if first is None else frozenset(range(first, frames, chunk)),
        )


class Reconstruction(NamedTuple):
    """Some frames and their reconstruction.

    Attributes:
        frames: the frames, unchanged.
        output: `(t, 3, H, W)` float32 in [0, 1], one for each frame.
        latent: `(Z, T', H', W')` of this output and the next ones; None if an earlier output had it, or there is none.
    """

    frames: list[Frame]
    output: Tensor
    latent: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """The frames in the shape, type, range and device of the output."""
        return from_bytes(np.stack([frame.image for frame in self.frames]), self.output.device)


class Reconstructor(Protocol):
    """An encoder and decoder of frames."""

    @property
    def patch(self) -> int:
        """Side in pixels of its patches or blocks."""
        ...

    def seams(self, frames: int, height: int, width: int) -> Seams:
        """Say where tiles and chunks of a clip or image of this size meet."""
        ...

    def reconstruct(self, frames: Iterable[Frame]) -> Iterator[Reconstruction]:
        """Encode and decodes frames of one size, in order and in bounded memory.

        Raises:
            NotFinite: the decoder's output is infinite or NaN.
        """
        ...


class FrameCoder:
    """LeanVAE or LiteVAE as a `Reconstructor`. LiteVAE takes each frame of a clip as an image.

    Args:
        vae: the model, in evaluation mode.
        chunk: most frames at a time; None takes as many as memory allows.
        tile: most (height, width) in pixels of a tile; None takes as much as memory allows.
        memory_limit: bytes, or such as `"6GiB"`, as in `LeanVAE.encode`; `reconstruct` includes its frames. None means
            a device's free memory, and on CPUs 6 GiB, which `reconstruct` may exceed if necessary.
    """

    def __init__(
        self,
        vae: VAE,
        *,
        chunk: int | None = None,
        tile: Tile = None,
        memory_limit: int | str | None = None,
    ) -> None:
        self.vae = vae
        self.patch = vae.config.patch_size[1] if isinstance(vae, LeanVAE) else DOWNSAMPLING
        self._chunk, self._tile = chunk, tile
        self._given_limit = None if memory_limit is None else parse_bytes(memory_limit)
        on_cpu = next(vae.parameters()).device.type == "cpu"
        self._limit = self._given_limit or (LIMIT_ON_CPU if on_cpu else None)

    @torch.inference_mode()
    def encode(self, clips: Sequence[Clip]) -> DiagonalGaussian:
        """Encode clips `(T, H, W, 3)` of one shape together.

        Returns:
            The posterior `(B, Z, T', H', W')`; T' = T for LiteVAE.

        Raises:
            InvalidInput: the memory limit cannot be kept.
        """
        x = to_model(clips, self.vae)
        if isinstance(self.vae, LeanVAE):
            return self.vae.encode(x, tile=self._tile, chunk=self._chunk, memory_limit=self._limit)
        return ImageEncoder(self.vae, self._tile, self._limit).push(x)

    def encoder(self) -> "EncoderStream | ImageEncoder":
        """Open a stream for clips of one size, whose frames `to_model` makes. Use it in inference mode."""
        if isinstance(self.vae, LeanVAE):
            return EncoderStream(self.vae.layers, Parts(self._tile, None, self._limit))
        return ImageEncoder(self.vae, self._tile, self._limit)

    @torch.inference_mode()
    def decode(self, latents: Iterable[Tensor], size: Sequence[int]) -> Iterator[Tensor]:
        """Decode the latent of one clip.

        Args:
            latents: its parts `(1, Z, t', H', W')`, in order, on the model's device and in its type.
            size: the clip's true (T, H, W), to crop the frames to.

        Yields:
            Frames `(t, 3, H, W)`, float32 in [0, 1].

        Raises:
            InvalidInput: the memory limit cannot be kept.
            NotFinite: the decoder's output is infinite or NaN.
        """
        missing, height, width = size
        if isinstance(self.vae, LeanVAE):
            decoder = DecoderStream(self.vae.layers, Parts(self._tile, None, self._limit))
        else:
            decoder = ImageDecoder(self.vae, self._tile, self._limit)
        for latent in latents:
            for part in decoder.split(latent):
                frames = _true_frames(decoder.push(part), missing, height, width)
                missing -= len(frames)
                yield from finite_frames(frames)

    def seams(self, frames: int, height: int, width: int) -> Seams:
        """Say where tiles and chunks of a clip or image of this size meet."""
        size = (frames, height, width)
        if frames == 1 or not isinstance(self.vae, LeanVAE):
            return Seams.between(size, [self._tile])
        plans = self._plans(self.vae, height, width)
        _, *patch = self.vae.config.patch_size
        planned = {plan.tile and (plan.tile[0] * patch[0], plan.tile[1] * patch[1]) for plan in plans}
        return Seams.between(size, [self._tile] if self._tile else planned, *_chunks(plans[0]))

    @torch.inference_mode()
    def reconstruct(self, frames: Iterable[Frame]) -> Iterator[Reconstruction]:
        """Encode and decodes frames of one size; latents are the posterior's mean. A single frame is an image.

        Raises:
            InvalidInput: the memory limit cannot be kept, or tiles are requested and not exact.
            NotFinite: the decoder's output is infinite or NaN.
        """
        rest = iter(frames)
        begin = list(islice(rest, 2))
        if not begin:
            return
        height, width = begin[0].image.shape[:2]
        if isinstance(self.vae, LeanVAE) and len(begin) > 1:
            plans = self._plans(self.vae, height, width)
            first, chunk = _chunks(plans[0])
            encoder = EncoderStream(self.vae.layers, plan=plans[0])
            decoder = DecoderStream(self.vae.layers, plan=plans[1])
        else:
            first = chunk = min(IMAGES_AT_ONCE, self._chunk or IMAGES_AT_ONCE)
            encoder = ImageEncoder(self.vae, self._tile, self._given_limit)
            decoder = ImageDecoder(self.vae, self._tile, self._given_limit)
        waiting: deque[Frame] = deque()

        def posteriors() -> Iterator[DiagonalGaussian | None]:
            for some in in_chunks(chain(begin, rest), first, chunk):
                waiting.extend(some)
                yield encoder.push(to_model([[frame.image for frame in some]], self.vae))
            yield encoder.finish()

        for posterior in posteriors():
            if posterior is None:
                continue
            latent = posterior.mode()
            # The last frame was repeated to fill its group; the copies' output has no source.
            decoded = _true_frames(decoder.push(latent), len(waiting), height, width)
            fresh: Tensor | None = latent[0]
            for output in finite_frames(decoded):
                yield Reconstruction([waiting.popleft() for _ in output], output, fresh)
                fresh = None
        assert not waiting, "a model returns as many frames as it gets"

    def _plans(self, vae: LeanVAE, height: int, width: int) -> tuple[ClipPlan, ClipPlan]:
        """Make plans to encode and decode a clip of this size."""
        plans = plan_reconstruction(vae, width, height, self._chunk, self._given_limit)
        if self._tile is None:
            return plans
        encoding, decoding = (
            replace(make_plan(plan.load, Parts(self._tile)), latent_frames=plan.latent_frames) for plan in plans
        )
        return encoding, decoding


def _chunks(plan: ClipPlan) -> tuple[int, int]:
    """Return the frames of the first and of each further chunk.

    The first is shorter, because its first frame stands alone and groups must stay whole.
    """
    group = plan.load.config.patch_size[0]
    chunk = group * (plan.latent_frames or 1)
    return chunk - group + 1, chunk


class ImageEncoder:
    """An encoder of frames as separate images, with the methods of an `EncoderStream`.

    For a LeanVAE it needs less memory than a stream of one frame, which keeps the past for the next ones.
    """

    def __init__(self, vae: VAE, tile: Tile, memory_limit: int | str | None) -> None:
        self._vae, self._tile, self._limit = vae, tile, memory_limit

    def split(self, frames: Tensor) -> Iterator[Tensor]:
        """Yield the frames unchanged, because `push` takes any number."""
        yield frames

    def push(self, frames: Tensor) -> DiagonalGaussian:
        """Encode `(B, 3, t, H, W)` to `(B, Z, t, H', W')`."""
        posterior = self._vae.encode(_to_images(frames), tile=self._tile, memory_limit=self._limit)
        mean, logvar = (_to_clips(values, len(frames)) for values in (posterior.mean, posterior.logvar))
        return DiagonalGaussian(mean, logvar, tuple(frames.shape[2:]))

    def finish(self) -> None:
        """Return None, because no frame waits for others."""


class ImageDecoder:
    """The inverse of `ImageEncoder`, with the methods of a `DecoderStream`."""

    def __init__(self, vae: VAE, tile: Tile, memory_limit: int | str | None) -> None:
        self._vae, self._tile, self._limit = vae, tile, memory_limit

    def split(self, latent: Tensor) -> Iterator[Tensor]:
        """Yield the latent unchanged, because `push` takes any number."""
        yield latent

    def push(self, latent: Tensor) -> Tensor:
        """Decode `(B, Z, t, H', W')` to `(B, 3, t, H, W)`, padded."""
        images = _to_images(latent) if isinstance(self._vae, LiteVAE) else _to_images(latent).unsqueeze(2)
        return _to_clips(self._vae.decode(images, tile=self._tile, memory_limit=self._limit), len(latent))


def _to_images(clips: Tensor) -> Tensor:
    """Rearrange `(B, C, t, H, W)` to `(B t, C, H, W)`."""
    return clips.transpose(1, 2).flatten(0, 1)


def _to_clips(images: Tensor, batch: int) -> Tensor:
    """Rearrange `(B t, C, H, W)`, or clips of one frame `(B t, C, 1, H, W)`, to `(B, C, t, H, W)`."""
    images = images.squeeze(2) if images.ndim == 5 else images
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def to_model(clips: Sequence[Clip], vae: nn.Module) -> Tensor:
    """Convert clips of bytes `(T, H, W, 3)` to a model's input `(B, 3, T, H, W)` in [-1, 1], on its device.

    Args:
        clips: clips of one shape; a list of frames is a clip, too.
        vae: the model, which decides on device and type.
    """
    like = next(vae.parameters(), torch.empty(0))
    if like.device.type != "cpu":  # moving bytes takes a quarter of the time
        x = torch.from_numpy(np.stack(clips)).to(like.device).movedim(-1, 1).contiguous().to(torch.float32)
        return x.mul_(2 / 255).sub_(1).to(like.dtype)
    num_frames, (height, width, _) = len(clips[0]), clips[0][0].shape
    x = np.empty((len(clips), 3, num_frames, height, width), np.float32)
    for planes, clip in zip(x, clips, strict=True):
        for index, frame in enumerate(clip):  # single frames stay in the cache, which takes a third of the time
            scaled = np.multiply(frame, np.float32(2 / 255), dtype=np.float32)
            scaled -= 1
            cv2.split(scaled, list(planes[:, index]))
    return torch.from_numpy(x).to(like.dtype)


def frames_per_latent(vae: VAE) -> int:
    """Return the frames of each latent frame except the first."""
    return vae.config.patch_size[0] if isinstance(vae, LeanVAE) else 1


def in_chunks(frames: Iterable[Frame], first: int | None, chunk: int | None) -> Iterator[list[Frame]]:
    """Cut frames after the first `first`, then after every `chunk`; None takes all that are left."""
    rest = iter(frames)
    while some := list(islice(rest, first)):
        yield some
        first = chunk


def finite_frames(decoded: Tensor) -> Iterator[Tensor]:
    """Convert a decoder's `(t, 3, H, W)` in about [-1, 1] to float32 in [0, 1], in parts that fit for measuring.

    Raises:
        NotFinite: a value is infinite or NaN.
    """
    height, width = decoded.shape[2:]
    for some in decoded.split(max(1, PIXELS_AT_ONCE // (height * width))):
        frames = some.float()
        if not frames.isfinite().all():
            raise NotFinite(
                "the decoder's output is not finite: the weights are broken, or need another dtype (float32)"
            )
        yield ((frames + 1) / 2).clamp(0, 1)


def _true_frames(decoded: Tensor, count: int, height: int, width: int) -> Tensor:
    """Return the frames `(t, 3, H, W)` of a decoded clip `(1, 3, t, H, W)` without padding, at most `count`."""
    return decoded[0, :, :count, :height, :width].transpose(0, 1)
