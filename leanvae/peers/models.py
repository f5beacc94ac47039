"""Models as benchmark and evaluation use them: the sizes they take, and how they encode and decode."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["image", "video"]


@dataclass(frozen=True, order=True)
class Size:
    """Frames, height and width in pixels; an image has one frame."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Size":
        """The size in a row of results."""
        return cls(row["frames"], row["height"], row["width"])

    @property
    def num_pixels(self) -> int:
        """Pixels of all frames together."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        area = f"{self.height}x{self.width}"
        return area if self.frames == 1 else f"{self.frames}x{area}"


@dataclass(frozen=True)
class Lengths:
    """The lengths `first`, `first + step`, `first + 2 step`, ... that a model takes along an axis.

    Its output is `lead` shorter; a user has to prepend that much.
    """

    first: int
    step: int
    lead: int = 0

    def fit(self, length: int) -> int:
        """Return the smallest length that gives back `length`, which a user has to pad to."""
        return self.first + max(0, -(-(length + self.lead - self.first) // self.step)) * self.step


ANY_LENGTH, EIGHTS = Lengths(1, 1), Lengths(8, 8)
# diffusers' CogVideoX and Mochi (0.42) have a convolution that splits large inputs in time; at 1080p the parts are
# shorter than its kernel, and it fails. It is counted as the convolution that it computes at other sizes.
_SPLITTING_CONV = "CogVideoXSafeConv3d"


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        name: its name on the command line.
        kind: whether it encodes images `(B, 3, H, W)` or clips `(B, 3, T, H, W)`.
        build: makes the module, with random weights if it has no others.
        source: where its configuration is published.
        config: fields that differ from the defaults of its class.
        frames, height, width: the lengths that it takes; others are padded up to them.
        encode: pixels to latent, given the module, instead of `encode` below.
        tiled_only: whether it works only in tiles of its smallest size, which overlap by their steps.
        is_ours: whether it is part of this project.
        has_weights: whether its weights are trained, so that its reconstructions are meaningful.
        note: a remark on its figures.
    """

    name: str
    kind: Kind
    build: Callable[[], nn.Module]
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    frames: Lengths = ANY_LENGTH
    height: Lengths = EIGHTS
    width: Lengths = EIGHTS
    encode: Callable[[nn.Module, Tensor], Tensor] | None = None
    tiled_only: bool = False
    is_ours: bool = False
    has_weights: bool = False
    note: str = ""

    def fit(self, size: Size) -> Size:
        """Return the size used for `size`: one frame for image models, and padded to what the model takes."""
        frames = 1 if self.kind == "image" else self.frames.fit(size.frames)
        return Size(frames, self.height.fit(size.height), self.width.fit(size.width))

    def num_tiles(self, size: Size) -> int:
        """Return the number of tiles for a size that the model takes; 1 for models without fixed tiles."""
        if not self.tiled_only:
            return 1
        axes = ((self.frames, size.frames), (self.height, size.height), (self.width, size.width))
        return math.prod((length - lengths.first) // lengths.step + 1 for lengths, length in axes)

    def pixels_shape(self, size: Size, batch: int = 1) -> tuple[int, ...]:
        """Return the shape of its input at a size that it takes."""
        area = (size.height, size.width)
        return (batch, 3, *area) if self.kind == "image" else (batch, 3, size.frames, *area)

    def build_on_meta(self) -> nn.Module:
        """Build the model without weights, for counting."""
        with torch.device("cpu" if self.has_weights else "meta"):
            vae = self.build()
        for module in vae.modules():
            if type(module).__name__ == _SPLITTING_CONV:
                module.__class__ = nn.Conv3d
        return vae.to("meta").eval()  # some tensors ignore the default device


def encode(model: Model, vae: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Return the most likely latent of pixels, under any name that the model's `encode` uses."""
    if model.encode is not None:
        return model.encode(vae, x)
    return latent_of(vae.encode(x, **options))  # pyright: ignore[reportCallIssue]


def decode(vae: nn.Module, latent: Tensor, **options: Any) -> Tensor:
    """Decode a latent to pixels, padded to what the model takes."""
    decoded: Any = vae.decode(latent, **options)  # pyright: ignore[reportCallIssue]
    return decoded if isinstance(decoded, Tensor) else decoded.sample


def latent_of(encoded: Any) -> Tensor:
    """Return the latent from an encoder's output: a tensor, a posterior, or an output of diffusers."""
    for name in ("latent_dist", "latents", "latent"):
        if hasattr(encoded, name):
            encoded = getattr(encoded, name)
    return encoded if isinstance(encoded, Tensor) else encoded.mode()
