"""Plans: how many latent frames, and tiles of what size, are worked on at once so that memory suffices.

The feedforwards' blocks of tokens are always on; then frames are taken fewer at a time, then tiles. Neither changes a
result where tiles are exact, and both cost next to nothing (`relative_cost`), so the largest parts that fit are taken.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from leanvae.config import LeanVAEConfig
from leanvae.inference.footprint import Work, clip_frames
from litevae.errors import InvalidInput
from litevae.memory import SHARE_OF_FREE, format_bytes, free_memory, parse_bytes
from litevae.tiling import check_tile

if TYPE_CHECKING:
    from leanvae.model import LeanVAE

MOST_LATENT_FRAMES = 16  # that a stream works on at once where memory is limited
PIXELS_AT_ONCE = 2**21  # of decoded frames that are measured and written at a time, but at least one frame
_LIMIT_ON_CPU = 6 * 2**30
_SMALLEST_TILE = 8  # tokens of a planned tile in each direction


@dataclass(frozen=True)
class Plan:
    """How work is cut.

    Attributes:
        work: what is to be done.
        latent_frames: most latent frames at a time; `None` takes all that are there at once.
        tile: most tokens (height, width) of a tile; `None` takes whole frames.
        blend: tiles overlap, are worked on as if each were the whole, and fade into each other.
    """

    work: Work
    latent_frames: int | None = None
    tile: tuple[int, int] | None = None
    blend: bool = False

    @property
    def memory(self) -> int:
        """Bytes that it takes at its peak, the input not counted."""
        return self.work.memory(self.latent_frames, self.tile)

    def halved(self) -> "Plan | None":
        """The largest plan of half the memory, or else the smallest one; `None` if this is it."""
        may_tile = self.blend or why_inexact(self.work.config) is None
        smaller = [plan for plan in _plans(self.work, may_tile, self.blend) if plan.memory < self.memory]
        fitting = (plan for plan in smaller if plan.memory <= self.memory / 2)
        return next(fitting, min(smaller, key=lambda plan: plan.memory, default=None))

    def __str__(self) -> str:
        frames = "all" if self.latent_frames is None else str(self.latent_frames)
        tile = "whole frames" if self.tile is None else f"tiles of {self.tile[0]}x{self.tile[1]} tokens"
        return f"{frames} latent frames at a time, {tile}, about {format_bytes(self.memory)}"


class Parts(NamedTuple):
    """What a caller asks for; `LeanVAE.encode` describes it."""

    tile: Any = None
    chunk: Any = None
    memory_limit: Any = None
    approximate: bool = False

    def are_wanted(self, x: Tensor) -> bool:
        """Whether `x` is perhaps not to be worked on whole: if asked for, or on CUDA, where memory may not suffice."""
        if not (self.tile is None and self.chunk is None and self.memory_limit is None):
            return True
        return x.is_cuda and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def make_plan(work: Work, parts: Parts, device: torch.device) -> Plan:
    """How to do some work.

    Where nothing at all is asked for, the device's free memory is the limit, and the smallest plan the last resort.

    Args:
        work: what is to be done.
        parts: what is asked for.
        device: where it is done.

    Raises:
        ValueError: something asked for is wrong, tiles are asked for or needed and not exact, or nothing fits.
    """
    tile = None if parts.tile is None else check_tile(parts.tile, work.config.patch_size[1:])
    frames = None if parts.chunk is None else _check_chunk(parts.chunk, work)
    limit = None if parts.memory_limit is None else parse_bytes(parts.memory_limit)
    if tile is not None and tile[0] >= work.height and tile[1] >= work.width:
        tile = None
    reason = why_inexact(work.config)
    may_tile = reason is None or parts.approximate
    if tile is not None and not may_tile:
        raise InvalidInput(f"tile is {parts.tile}: not exact, because {reason}; approximate=True blends tiles")
    is_automatic = parts.tile is None and parts.chunk is None and limit is None
    if is_automatic and (free := free_memory(device)) is not None:
        limit = int(SHARE_OF_FREE * free)
    if limit is None:
        return Plan(work, frames, tile, blend=reason is not None)
    if work.is_stream:
        frames = work.latent_frames  # more may arrive at once than are there now
    wanted = Plan(work, frames, tile, blend=reason is not None)
    candidates = [wanted, *_plans(work, may_tile and parts.tile is None, wanted.blend, frames, tile)]
    smallest = min(candidates, key=lambda plan: plan.memory)
    plan = next((plan for plan in candidates if plan.memory <= limit), smallest)
    if plan.memory > limit and not is_automatic:
        hint = "" if may_tile else f"; tiles, which would take less, are not exact, because {reason}"
        raise InvalidInput(
            f"memory_limit is {parts.memory_limit!r}: to {work.name} {work} takes at least "
            f"{format_bytes(smallest.memory)}{hint}"
        )
    return plan


def plan_reconstruction(
    vae: "LeanVAE", width: int, height: int, chunk: int | None = None, memory_limit: int | None = None
) -> tuple[Plan, Plan]:
    """How the frames of a file are encoded and decoded as streams, so that memory suffices for all of the work.

    The past of both streams is held all the time, what else they take by one at a time.

    Args:
        vae: the model.
        width, height: size of the frames in pixels.
        chunk: most frames at a time.
        memory_limit: bytes; if `None`, a device's free memory, or on CPUs 6 GiB if so little suffices.

    Raises:
        ValueError: the limit cannot be kept, or the chunk is below 1.
    """
    weight, group = next(vae.parameters()), vae.config.patch_size[0]
    if chunk is not None and chunk < 1:
        raise InvalidInput(f"chunk is {chunk}: at least one frame is needed")
    most = MOST_LATENT_FRAMES if chunk is None else max(1, chunk // group)
    _, _, rows, columns = vae.latent_shape((height, width))
    works = (
        Work(name, vae.config, 1, most, rows, columns, weight.element_size(), is_stream=True)
        for name in ("encode", "decode")
    )
    may_tile = why_inexact(vae.config) is None
    pairs = list(zip(*(_plans(work, may_tile, False, most) for work in works), strict=True))

    def memory(pair: tuple[Plan, Plan]) -> int:
        encoding, decoding = pair
        kept = [plan.work.kept(plan.tile) for plan in pair]
        # Frames in float32 while they are measured; chunks as bytes, for the model and of the model.
        pixels = 40 * max(3 * width * height, 3 * PIXELS_AT_ONCE)
        pixels += 3 * width * height * group * (encoding.latent_frames or 1) * (2 + 2 * weight.element_size())
        return pixels + max(encoding.memory + kept[1], decoding.memory + kept[0])

    limit = memory_limit or free_memory(weight.device) or _LIMIT_ON_CPU
    smallest = min(pairs, key=memory)
    pair = next((pair for pair in pairs if memory(pair) <= limit), smallest)
    if memory_limit is not None and memory(pair) > memory_limit:
        raise InvalidInput(
            f"memory_limit is {format_bytes(memory_limit)}: to reconstruct frames of {width}x{height} takes about "
            f"{format_bytes(memory(pair))}"
        )
    return pair


def why_inexact(config: LeanVAEConfig) -> str | None:
    """Why tiles of a model do not give what the whole gives; `None` if they do."""
    if config.wavelet in ("haar", "none"):
        return None
    return f"the wavelet {config.wavelet!r} is longer than Haar and reads across their borders"


def _check_chunk(chunk: Any, work: Work) -> int | None:
    """Latent frames of a chunk, `None` for as many as there are."""
    try:
        frames = operator.index(chunk)
    except TypeError:
        frames = 0
    if frames < 1 or isinstance(chunk, bool):
        raise InvalidInput(f"chunk is {chunk!r}: expected a whole number of frames, at least 1")
    group = work.config.patch_size[0]
    if not work.is_stream and frames >= clip_frames(work.latent_frames, group):
        return None
    return max(1, frames // group)


def _plans(
    work: Work,
    may_tile: bool,
    blend: bool,
    frames: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Iterator[Plan]:
    """Plans with ever smaller parts; frames and a tile that are given stay as they are."""
    counts: list[int | None] = [frames]
    if frames is None or work.is_stream:
        counts += [2**power for power in reversed(range(16)) if 2**power < work.latent_frames]
    sizes = [tile, *(_tiles(work.height, work.width) if may_tile else ())]
    for size in sizes:
        for count in counts:
            yield Plan(work, count, size, blend)


def _tiles(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Tiles of ever less of the height over the whole width, then of ever less of the width."""
    while height > _SMALLEST_TILE:
        height = max(_SMALLEST_TILE, height * 3 // 4)
        yield height, width
    while width > _SMALLEST_TILE:
        width = max(_SMALLEST_TILE, width // 2)
        yield height, width
