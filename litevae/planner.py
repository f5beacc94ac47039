"""Plans for images in parts: how many at once, and in tiles of what size, so that memory suffices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from litevae.config import DOWNSAMPLING, NUM_LEVELS, LiteVAEConfig
from litevae.errors import InvalidInput
from litevae.memory import SHARE_OF_FREE, format_bytes, free_memory, parse_bytes, retry_smaller
from litevae.receptive import decoder_halo, encoder_halo, why_decoder_inexact, why_encoder_inexact
from litevae.tiling import Window, blended_windows, check_tile, run_in_windows, windows_with_halo

_STEP = (DOWNSAMPLING, DOWNSAMPLING)
_PIXELS = 3 * DOWNSAMPLING**2  # elements of the image, for each of the latent
_OVERHEAD = 1.08  # of the convolutions' library
_POSITIONS_AT_ONCE = 2**14  # of a level's bands that the wavelet encoder takes on CPUs, in whole images
_SMALLEST_TILE = 8  # latent elements of a planned tile in each direction, without its halo


@dataclass(frozen=True)
class ImageLoad:
    """Images to encode or decode.

    Attributes:
        name: `encode` or `decode`.
        config: the model's configuration.
        batch: number of images.
        height, width: size of the latent.
        item_size: bytes per element.
    """

    name: Literal["encode", "decode"]
    config: LiteVAEConfig
    batch: int
    height: int
    width: int
    item_size: int

    @property
    def halo(self) -> int:
        """Latent elements beyond its own that an output depends on."""
        return (encoder_halo if self.name == "encode" else decoder_halo)(self.config)

    @property
    def why_inexact(self) -> str | None:
        """Why tiles are not exact; None if they are."""
        return (why_encoder_inexact if self.name == "encode" else why_decoder_inexact)(self.config)

    def windows(self, tile: tuple[int, int]) -> tuple[list[Window], list[Window]]:
        """Return the rows and columns of a tile's windows: with a halo if that is exact, else blended."""
        sizes = zip((self.height, self.width), tile, strict=True)
        if self.why_inexact is not None:
            rows, columns = (blended_windows(length, size) for length, size in sizes)
        else:
            rows, columns = (windows_with_halo(length, size, self.halo) for length, size in sizes)
        return rows, columns


@dataclass(frozen=True)
class ImagePlan:
    """A way to cut work.

    Attributes:
        load: what is to be done.
        images: most images at once.
        tile: most latent elements (height, width) of a tile, without its halo; `None` takes whole images.
    """

    load: ImageLoad
    images: int
    tile: tuple[int, int] | None = None

    @property
    def memory(self) -> int:
        """Peak memory in bytes, without the input."""
        return peak_memory(self)

    def halved(self) -> "ImagePlan | None":
        """Return the largest plan with half the memory, or else the smallest one; None if this is it."""
        smaller = [plan for plan in _plans(self.load, self.load.why_inexact is None) if plan.memory < self.memory]
        fitting = (plan for plan in smaller if plan.memory <= self.memory / 2)
        return next(fitting, min(smaller, key=lambda plan: plan.memory, default=None))

    def __str__(self) -> str:
        tile = "whole" if self.tile is None else f"in tiles of {self.tile[0]}x{self.tile[1]} latent elements"
        return f"{self.images} images at a time, {tile}, about {format_bytes(self.memory)}"


def peak_memory(plan: ImagePlan) -> int:
    """Estimate the peak bytes of a plan, without the input, as measured for inference on CPUs."""
    load, height, width = plan.load, plan.load.height, plan.load.width
    if plan.tile is not None:
        rows, columns = load.windows(plan.tile)
        height, width = (max(part.stop - part.start for part in windows) for windows in (rows, columns))
    if load.name == "encode":
        elements = _encoder_elements(load.config, plan.images, height * width)
    else:
        elements = plan.images * height * width * _decoder_elements(load.config)
    # The output; for a batch in parts, the parts and the whole are held at once.
    out = (
        load.batch * load.height * load.width * (_PIXELS if load.name == "decode" else 2 * load.config.latent_channels)
    )
    return int((_OVERHEAD * elements + (2 if plan.images < load.batch else 1) * out) * load.item_size)


def _encoder_elements(config: LiteVAEConfig, images: int, positions: int) -> float:
    """Estimate the elements held at once for so many images with so many latent elements each."""
    if config.encoder == "sd":
        return images * positions * DOWNSAMPLING**2 * 5 * config.encoder_channels
    bands = 8 * _PIXELS
    if config.encoder != "wavelet":
        return images * positions * bands
    widths = [config.extraction_channels * multiplier for multiplier in config.extraction_multipliers]
    skips = config.num_res_blocks * sum(widths) if config.extraction == "unet" else 2 * max(widths)
    size = 4 ** (NUM_LEVELS - min(config.levels))  # of the largest bands, in positions a latent element
    at_once = max(1, _POSITIONS_AT_ONCE // (size * positions))
    return images * positions * bands + min(images, at_once) * positions * size * (skips + 6 * max(widths))


def _decoder_elements(config: LiteVAEConfig) -> float:
    """Estimate the elements held at once for each latent element: at the largest level, twice the input and output."""
    widths = [config.decoder_channels * multiplier for multiplier in reversed(config.decoder_multipliers)]
    num_upsamplings = NUM_LEVELS - int(config.output_type == "wavelet")
    sizes = [4 ** min(level, num_upsamplings) for level in range(len(widths))]
    return max(
        size * 2 * (before + width) for size, before, width in zip(sizes, [widths[0], *widths], widths, strict=False)
    )


def are_parts_wanted(x: Tensor, tile: Any, memory_limit: Any) -> bool:
    """Tell whether `x` may need parts: if requested, or on CUDA, where memory may not suffice."""
    if tile is not None or memory_limit is not None:
        return True
    return x.is_cuda and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def make_plan(
    load: ImageLoad, tile: Any, memory_limit: str | int | None, approximate: bool, device: torch.device
) -> ImagePlan:
    """Cut work; `LiteVAE.encode` describes the arguments.

    By default the device's free memory is the limit, and the smallest plan the last resort.

    Raises:
        ValueError: an argument is wrong, tiles are requested or needed and not exact, or no plan fits the limit.
    """
    size = None if tile is None else check_tile(tile, _STEP)
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if size is not None and size[0] >= load.height and size[1] >= load.width:
        size = None
    may_tile = approximate or load.why_inexact is None
    if size is not None and not may_tile:
        raise InvalidInput(f"tile is {tile}: not exact, because {load.why_inexact}; approximate=True blends tiles")
    is_automatic = tile is None and limit is None
    if is_automatic and (free := free_memory(device)) is not None:
        limit = int(SHARE_OF_FREE * free)
    wanted = ImagePlan(load, load.batch, size)
    if limit is None:
        return wanted
    candidates = [wanted, *_plans(load, may_tile and tile is None, size)]
    smallest = min(candidates, key=lambda plan: plan.memory)
    plan = next((plan for plan in candidates if plan.memory <= limit), smallest)
    if plan.memory > limit and not is_automatic:
        hint = "" if may_tile else f"; tiles, which would need less, are not exact, because {load.why_inexact}"
        raise InvalidInput(
            f"memory_limit is {memory_limit!r}: to {load.name} images of {load.height}x{load.width} latent elements "
            f"needs at least {format_bytes(smallest.memory)}{hint}"
        )
    return plan


def _plans(load: ImageLoad, may_tile: bool, tile: tuple[int, int] | None = None) -> Iterator[ImagePlan]:
    """Yield plans with ever fewer images at once, then with ever smaller tiles; a given tile stays the same."""
    images = load.batch
    while images > 1:
        images = -(-images // 2)
        yield ImagePlan(load, images, tile)
    height, width = load.height, load.width
    while may_tile and max(height, width) > _SMALLEST_TILE:
        if height > _SMALLEST_TILE:
            height = max(_SMALLEST_TILE, height * 3 // 4)
        else:
            width = max(_SMALLEST_TILE, width // 2)
        yield ImagePlan(load, 1, (height, width))


def run_in_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, plan: ImagePlan, in_step: int = 1, out_step: int = 1
) -> Tensor:
    """Run a function of images by a plan; halve the plan once if memory runs out.

    Args:
        function: maps `(B, C, H, W)` to `(B, C', H', W')`.
        x: all images.
        plan: how to cut them.
        in_step: elements of `x` per latent element in each direction.
        out_step: the same for the output.
    """

    def run(plan: ImagePlan) -> Tensor:
        parts = x.split(plan.images)
        if plan.tile is None:
            return torch.cat([function(part) for part in parts])
        steps = {"in_step": (in_step, in_step), "out_step": (out_step, out_step)}
        windows = plan.load.windows(plan.tile)
        return torch.cat([run_in_windows(lambda part, _: function(part), part, *windows, **steps) for part in parts])

    return retry_smaller(run, plan, ImagePlan.halved, plan.load.name)
