"""A model as the benchmark and the evaluation use it: what it takes, and how it encodes and decodes."""

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

    Of each it gives `lead` less back, which a user has to put in front.
    """

    first: int
    step: int
    lead: int = 0

    def fit(self, length: int) -> int:
        """The smallest of them that gives `length` back: what a user has to pad to."""
        return self.first + max(0, -(-(length + self.lead - self.first) // self.step)) * self.step


ANY_LENGTH, EIGHTS = Lengths(1, 1), Lengths(8, 8)
# A convolution of diffusers' CogVideoX and Mochi that splits large inputs in time, at 1080p into parts shorter than its
# kernel, which fails (0.42). It is counted as the convolution that it computes where that works.
_SPLITTING_CONV = "CogVideoXSafeConv3d"


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        name: what it is called on the command line.
        kind: whether it encodes images `(B, 3, H, W)` or clips `(B, 3, T, H, W)`.
        build: makes it, with random weights where none are its own.
        source: where its configuration stands.
        config: what that says beyond the defaults of its class.
        frames, height, width: the lengths that it takes; others are padded up to them.
        encode: pixels to latent, given the module, if not by `encode` below.
        tiled_only: whether it works in tiles of its smallest size alone, which overlap by their steps.
        is_ours: whether it is of this project.
        has_weights: whether its weights mean something, so that its reconstructions can be judged.
        note: what a reader of its figures should know.
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
        """The size that is worked on for `size`: one frame for image models, and padded to what the model takes."""
        frames = 1 if self.kind == "image" else self.frames.fit(size.frames)
        return Size(frames, self.height.fit(size.height), self.width.fit(size.width))

    def num_tiles(self, size: Size) -> int:
        """Tiles that a size which it takes is cut into; 1 for models that work on the whole."""
        if not self.tiled_only:
            return 1
        axes = ((self.frames, size.frames), (self.height, size.height), (self.width, size.width))
        return math.prod((length - lengths.first) // lengths.step + 1 for lengths, length in axes)

    def pixels_shape(self, size: Size, batch: int = 1) -> tuple[int, ...]:
        """Shape of its input at a size that it takes."""
        area = (size.height, size.width)
        return (batch, 3, *area) if self.kind == "image" else (batch, 3, size.frames, *area)

    def build_on_meta(self) -> nn.Module:
        """The model without weights, for counting."""
        with torch.device("cpu" if self.has_weights else "meta"):
            vae = self.build()
        for module in vae.modules():
            if type(module).__name__ == _SPLITTING_CONV:
                module.__class__ = nn.Conv3d
        return vae.to("meta").eval()  # some tensors are made on the CPU whatever the default device


def encode(model: Model, vae: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """The most likely latent of pixels, by whatever name the model's `encode` returns it."""
    if model.encode is not None:
        return model.encode(vae, x)
    return latent_of(vae.encode(x, **options))  # pyright: ignore[reportCallIssue]


def decode(vae: nn.Module, latent: Tensor, **options: Any) -> Tensor:
    """Pixels of a latent, padded to what the model takes."""
    decoded: Any = vae.decode(latent, **options)  # pyright: ignore[reportCallIssue]
    return decoded if isinstance(decoded, Tensor) else decoded.sample


def latent_of(encoded: Any) -> Tensor:
    """The latent in what an encoder returns: a tensor, a posterior, or one of diffusers' outputs."""
    for name in ("latent_dist", "latents", "latent"):
        if hasattr(encoded, name):
            encoded = getattr(encoded, name)
    return encoded if isinstance(encoded, Tensor) else encoded.mode()
