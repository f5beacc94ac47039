"""Clips in parts: streams of frames of any length, and whole clips part by part, with the result of the whole.

The past is a value: a function takes that of its frames and returns that of the next frames. It holds what each
convolution read of the whole frame, so a stream can change the size of its parts at any time. `None` stands for a whole
clip, which leaves no past.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from leanvae.inference.plan import ClipLoad, ClipPlan, Parts, decoding_load, encoding_load, make_plan
from leanvae.inference.tiles import StoppedMidway, decode_tiles, encode_tiles, write_frames
from leanvae.network import Layers, decode_frames, encode_frames
from leanvae.patchify import clip_frames, pad_to_patches
from leanvae.surroundings import WHOLE, Chunk
from litevae.errors import InvalidInput
from litevae.memory import empty_cache, format_bytes, is_out_of_memory
from litevae.pixels import check_dtype, check_pixels, crop
from litevae.posterior import DiagonalGaussian
from litevae.tiling import blended_windows, run_in_windows

logger = logging.getLogger("leanvae")

ResultT = TypeVar("ResultT")

WHOLE_CLIP = Parts()


class EncoderStream:
    """A stream that encodes a clip as its frames arrive, with the result of the whole clip.

    Args:
        layers: the model's layers.
        parts: the requested parts.
        plan: the plan; None makes one from `parts` when the first frames arrive.
    """

    def __init__(self, layers: Layers, parts: Parts = WHOLE_CLIP, plan: ClipPlan | None = None) -> None:
        self._layers, self._parts, self._plan = layers, parts, plan
        self._group = layers.config.patch_size[0]
        self._waiting: Tensor | None = None  # frames of an incomplete group
        self._like: Tensor | None = None
        self._past: Any = ()
        self._starts_clip = True

    def split(self, frames: Tensor) -> Iterator[Tensor]:
        """Cut frames `(B, 3, t, H, W)` to what the plan allows; push each piece before taking the next.

        Raises:
            InvalidInput: the frames have a wrong shape, or do not continue the previous ones.
        """
        self._check_shape(frames)
        while frames.shape[2]:
            count = frames.shape[2]
            if (latent := self._make_plan(frames).latent_frames) is not None:
                waiting = 0 if self._waiting is None else self._waiting.shape[2]
                count = clip_frames(latent, self._group, self._starts_clip) - waiting
            yield frames[:, :, :count]
            frames = frames[:, :, count:]

    def push(self, frames: Tensor) -> DiagonalGaussian | None:
        """Encode the latent frames that these frames `(B, 3, t, H, W)` complete.

        Returns:
            Their posterior, `(B, Z, t', H', W')`, whose `size` counts the true frames that it covers; None if no
            latent frame is complete.

        Raises:
            InvalidInput: as in `split`.
        """
        check_pixels(frames)
        self._check_shape(frames)
        self._make_plan(frames)
        if self._waiting is not None:
            frames = torch.cat((self._waiting, frames), dim=2)
        first = int(self._starts_clip)
        ready = first + (frames.shape[2] - first) // self._group * self._group
        self._waiting = frames[:, :, ready:].clone() if ready < frames.shape[2] else None
        return self._encode(frames[:, :, :ready]) if ready else None

    def finish(self) -> DiagonalGaussian | None:
        """Encode the frames of a last, incomplete group; return None if there are none."""
        frames, self._waiting = self._waiting, None
        return None if frames is None else self._encode(frames)

    def _encode(self, frames: Tensor) -> DiagonalGaussian:
        posteriors, rest = [], frames
        while rest.shape[2]:
            plan = self._make_plan(rest)
            count = rest.shape[2]
            if plan.latent_frames is not None:
                count = min(count, clip_frames(plan.latent_frames, self._group, self._starts_clip))
            part = rest[:, :, :count]
            done, self._plan = attempt(
                lambda plan, part=part: encode_part(self._layers, part, self._past, plan, self._starts_clip), plan
            )
            if done is not None:
                posterior, self._past, self._plan = done
                self._starts_clip, rest = False, rest[:, :, count:]
                posteriors.append(posterior)
        return joined(posteriors, tuple(frames.shape[2:]))

    def _check_shape(self, frames: Tensor) -> None:
        if frames.ndim != 5:
            raise InvalidInput(f"chunk has shape {tuple(frames.shape)}: expected (B, 3, t, H, W)")
        self._like = _check_alike("chunk", frames, self._like)
        check_dtype(frames, self._layers.logvar.weight, "chunk")

    def _make_plan(self, frames: Tensor) -> ClipPlan:
        self._plan = self._plan or make_plan(encoding_load(self._layers, frames, is_stream=True), self._parts)
        return self._plan


class DecoderStream:
    """A stream that decodes a latent as its frames arrive, with the result of the whole latent.

    Args:
        layers: the model's layers.
        parts: the requested parts.
        plan: the plan; None makes one from `parts` when the first latent frames arrive.
    """

    def __init__(self, layers: Layers, parts: Parts = WHOLE_CLIP, plan: ClipPlan | None = None) -> None:
        self._layers, self._parts, self._plan = layers, parts, plan
        self._like: Tensor | None = None
        self._past: Any = ()
        self._starts_clip = True

    def split(self, latent: Tensor) -> Iterator[Tensor]:
        """Cut a latent `(B, Z, t', H', W')` to what the plan allows; push each piece before taking the next.

        Raises:
            InvalidInput: the latent has a wrong shape, or does not continue the previous ones.
        """
        self._check(latent)
        while latent.shape[2]:
            count = self._make_plan(latent).latent_frames or latent.shape[2]
            yield latent[:, :, :count]
            latent = latent[:, :, count:]

    def push(self, latent: Tensor, out: Tensor | None = None) -> Tensor:
        """Decode latent frames `(B, Z, t', H', W')`.

        Args:
            latent: the frames.
            out: tensor for the pixels, `(B, 3, t, H, W)`; padding that does not fit is left out.

        Returns:
            The pixels, `(B, 3, t, H, W)`, padded and about [-1, 1]; or `out`.

        Raises:
            InvalidInput: as in `split`.
        """
        self._check(latent)
        group, patch_height, patch_width = self._layers.config.patch_size
        batch, _, frames, height, width = latent.shape
        if out is None:
            size = (clip_frames(frames, group, self._starts_clip), height * patch_height, width * patch_width)
            out = latent.new_empty(batch, 3, *size)
        done = 0
        while latent.shape[2]:
            plan = self._make_plan(latent)
            part = latent[:, :, : plan.latent_frames or latent.shape[2]]
            count = clip_frames(part.shape[2], group, self._starts_clip)
            room = out[:, :, done : done + count]
            went, self._plan = attempt(
                lambda plan, part=part, room=room: decode_part(
                    self._layers, part, self._past, plan, self._starts_clip, room
                ),
                plan,
            )
            if went is not None:
                self._past, self._plan = went
                self._starts_clip = False
                done, latent = done + count, latent[:, :, part.shape[2] :]
        return out

    def _check(self, latent: Tensor) -> None:
        check_latent(latent, self._layers.config.latent_channels)
        self._like = _check_alike("latent", latent, self._like)
        check_dtype(latent, self._layers.logvar.weight, "latent")

    def _make_plan(self, latent: Tensor) -> ClipPlan:
        self._plan = self._plan or make_plan(decoding_load(self._layers, latent, is_stream=True), self._parts)
        return self._plan


def encode_in_parts(layers: Layers, clip: Tensor, plan: ClipPlan) -> DiagonalGaussian:
    """Encode a clip `(B, 3, T, H, W)` by a plan, or smaller ones if memory runs out."""
    if plan.latent_frames is None:  # no frames follow that would need a past
        done, plan = attempt(lambda plan: encode_part(layers, clip, None, plan), plan)
        if done is not None:
            return done[0]
    stream = EncoderStream(layers, plan=plan)
    posteriors = [stream.push(piece) for piece in stream.split(clip)]
    parts = [posterior for posterior in [*posteriors, stream.finish()] if posterior is not None]
    return joined(parts, tuple(clip.shape[2:]))


def decode_in_parts(layers: Layers, latent: Tensor, size: Sequence[int] | None, plan: ClipPlan) -> Tensor:
    """Decode a latent `(B, Z, T', H', W')` by a plan to `size` (T, H, W), or padded; by smaller plans if necessary."""
    group, patch_height, patch_width = layers.config.patch_size
    batch, _, frames, height, width = latent.shape
    padded = (clip_frames(frames, group), height * patch_height, width * patch_width)
    size = padded if size is None else tuple(size)
    crop(torch.empty(1, 1, *padded, device="meta"), size, layers.config.patch_size)  # refuses a wrong size
    out = latent.new_empty(batch, 3, *size)
    if plan.latent_frames is None:
        done, plan = attempt(lambda plan: decode_part(layers, latent, None, plan, True, out), plan)
        if done is not None:
            return out
    return DecoderStream(layers, plan=plan).push(latent, out)


def encode_part(
    layers: Layers, frames: Tensor, past: Any, plan: ClipPlan, starts_clip: bool = True
) -> tuple[DiagonalGaussian, Any, ClipPlan]:
    """Encode the next frames of a clip.

    Args:
        layers: the model's layers.
        frames: `(B, 3, t, H, W)` in [-1, 1].
        past: left by the previous frames, and overwritten; `()` at the start, None for a whole clip.
        plan: its tile, and whether to blend.
        starts_clip: whether the clip begins here.

    Returns:
        The posterior, whose `size` is the true `(t, H, W)`; the past of the next frames; and the plan for them, with
        fewer at a time if memory ran out.
    """
    at_once = None
    if plan.tile is None:
        around = WHOLE if past is None else Chunk(past)
        pixels = pad_to_patches(frames, layers.config.patch_size, starts_clip)
        mean, logvar = encode_frames(layers, pixels, around=around, starts_clip=starts_clip)
        next_past = _next_past(around)
    elif plan.blend:
        mean, logvar, next_past = _encode_blended(layers, frames, past, plan, starts_clip)
    else:
        mean, logvar, next_past, at_once = encode_tiles(layers, frames, past, plan.tile, starts_clip)
    posterior = DiagonalGaussian(mean, logvar, tuple(frames.shape[2:]))
    return posterior, next_past, _with_frames(plan, at_once, mean.shape[2])


def decode_part(
    layers: Layers, latent: Tensor, past: Any, plan: ClipPlan, starts_clip: bool, out: Tensor
) -> tuple[Any, ClipPlan]:
    """Decode the next latent frames of a clip `(B, Z, t', H', W')` into `out` `(B, 3, t, H, W)`.

    The other arguments are those of `encode_part`. Returns the past of the next frames, and the plan for them.
    """
    if plan.tile is None:
        around = WHOLE if past is None else Chunk(past)
        write_frames(decode_frames(layers, latent, around=around, starts_clip=starts_clip), out)
        return _next_past(around), plan
    if plan.blend:
        return _decode_blended(layers, latent, past, plan, starts_clip, out), plan
    next_past, at_once = decode_tiles(layers, latent, past, plan.tile, starts_clip, out)
    return next_past, _with_frames(plan, at_once, latent.shape[2])


def _with_frames(plan: ClipPlan, at_once: int | None, num_frames: int) -> ClipPlan:
    """Return the plan with the number of latent frames that were possible at once; None if all were."""
    return plan if at_once in (None, num_frames) else replace(plan, latent_frames=at_once)


def _next_past(around: Any) -> tuple[Tensor, ...]:
    return tuple(around.next_past) if isinstance(around, Chunk) else ()


def _encode_blended(
    layers: Layers, frames: Tensor, pasts: Any, plan: ClipPlan, starts_clip: bool
) -> tuple[Tensor, Tensor, Any]:
    """Encode overlapping tiles as if each were the whole, and blend their posteriors; each has its own past."""
    whole, next_pasts = ClipPlan(plan.load), []

    def run(part: Tensor, number: int) -> Tensor:
        posterior, after, _ = encode_part(layers, part, pasts[number] if pasts else pasts, whole, starts_clip)
        next_pasts.append(after)
        return torch.cat((posterior.mean, posterior.logvar), dim=1)

    rows, columns = _windows(plan)
    parameters = run_in_windows(run, frames, rows, columns, in_step=layers.config.patch_size[1:])
    mean, logvar = parameters.chunk(2, dim=1)
    return mean, logvar, next_pasts


def _decode_blended(layers: Layers, latent: Tensor, pasts: Any, plan: ClipPlan, starts_clip: bool, out: Tensor) -> Any:
    """Decode overlapping tiles as if each were the whole, and blend their pixels; each has its own past."""
    next_pasts = []

    def run(part: Tensor, number: int) -> Tensor:
        past = pasts[number] if pasts else pasts
        around = WHOLE if past is None else Chunk(past)
        frames = decode_frames(layers, part, around=around, starts_clip=starts_clip)
        next_pasts.append(_next_past(around))
        return frames

    rows, columns = _windows(plan)
    write_frames(run_in_windows(run, latent, rows, columns, out_step=layers.config.patch_size[1:]), out)
    return next_pasts


def _windows(plan: ClipPlan) -> tuple[Any, Any]:
    assert plan.tile is not None
    rows, columns = (
        blended_windows(*sizes) for sizes in zip((plan.load.height, plan.load.width), plan.tile, strict=True)
    )
    return rows, columns


def whole_first(
    whole: Callable[[], ResultT], in_parts: Callable[[ClipPlan], ResultT], load: Callable[[], ClipLoad]
) -> ResultT:
    """Do work whole; if memory runs out and no gradient is recorded, do it in parts."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return whole()
    try:
        return whole()
    except (RuntimeError, MemoryError) as error:
        plan = _smaller(ClipPlan(load()), error)
    empty_cache()
    return in_parts(plan)


def attempt(work: Callable[[ClipPlan], ResultT], plan: ClipPlan) -> tuple[ResultT | None, ClipPlan]:
    """Do work by a plan; return its result, or None and a smaller plan if memory ran out."""
    try:
        return work(plan), plan
    except (RuntimeError, MemoryError) as error:
        plan = _smaller(plan, error)
    empty_cache()  # outside the handler, after which the error's frames and their tensors are gone
    return None, plan


def _smaller(plan: ClipPlan, error: Exception) -> ClipPlan:
    """Return a smaller plan; raise the error if it is not a lack of memory, or no plan is smaller."""
    can_go_on = is_out_of_memory(error) and not isinstance(error, StoppedMidway)
    smaller = plan.halved() if can_go_on else None
    if smaller is None:
        raise error
    logger.warning(
        "%s: out of memory (%s); continuing with %s; memory_limit='%s' does so at once",
        plan.load.name,
        str(error).splitlines()[0],
        smaller,
        format_bytes(smaller.memory),
    )
    return smaller


def joined(posteriors: Sequence[DiagonalGaussian], size: tuple[int, ...]) -> DiagonalGaussian:
    """Join posteriors that follow each other in time."""
    mean, logvar = (torch.cat([getattr(part, name) for part in posteriors], dim=2) for name in ("mean", "logvar"))
    return DiagonalGaussian(mean, logvar, size)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raise `InvalidInput` unless this is a latent with `channels` channels."""
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise InvalidInput(f"latent has shape {tuple(latent.shape)}: expected (B, {channels}, T', H', W')")


def _check_alike(name: str, part: Tensor, like: Tensor | None) -> Tensor:
    """Raise `InvalidInput` unless a part continues the previous ones; return the reference for the next ones."""
    if like is None:
        return torch.empty_like(part, device="meta")
    if part.dtype != like.dtype or any(part.shape[axis] != like.shape[axis] for axis in (0, 1, 3, 4)):
        batch, channels, _, height, width = like.shape
        raise InvalidInput(
            f"{name} has shape {tuple(part.shape)} and dtype {part.dtype}: the previous ones have "
            f"({batch}, {channels}, any, {height}, {width}) and {like.dtype}"
        )
    return like
