"""From pixels to wavelet patches and back (LeanVAE, Figure 1b: Patchifier).

The first frame of a clip stands alone: it gets a 2D transform and image patches. The others get a 3D transform and
    video
patches. Both give tokens of the same width, so an image is a clip of one frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from leanvae.config import LeanVAEConfig
from litevae.wavelet import dwt2d, dwt3d, idwt2d, idwt3d

# The published model's bands are the orthonormal ones times these.
IMAGE_BAND_SCALE = 2.0
VIDEO_BAND_SCALE = 2.0 * 2.0**0.5
COLOURS = 3


class Bands(NamedTuple):
    """Wavelet bands of (a chunk of) a clip, low band first.

    Attributes:
        image: `(B, 12, 1, H/2, W/2)`, of the clip's first frame; `None` in a chunk that does not begin the clip.
        video: `(B, 24, t/2, H/2, W/2)`, of the t frames after it; `None` if there are none.
    """

    image: Tensor | None
    video: Tensor | None


def split_first_frame(x: Tensor, starts_clip: bool) -> tuple[Tensor | None, Tensor | None]:
    """Split a chunk `(B, C, T, H, W)` into the frame that stands alone and the others."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if starts_clip else (None, x)
    return first, (rest if rest.shape[2] else None)


def to_bands(x: Tensor, wavelet: str = "haar", starts_clip: bool = True) -> Bands:
    """Transform a clip to wavelet bands, scaled as in the published model (2D by 2, 3D by 2 sqrt 2).

    Args:
        x: `(B, 3, T, H, W)`, T = 4n + 1 (4n if the chunk does not start the clip), H and W even.
        wavelet: `haar`, a pywt name, or `none`, which returns the pixels themselves.
        starts_clip: whether the first frame of `x` is the first of the clip.
    """
    image, video = split_first_frame(x, starts_clip)
    if wavelet == "none":
        return Bands(image, video)
    return Bands(
        None if image is None else dwt2d(image, wavelet) * IMAGE_BAND_SCALE,
        None if video is None else dwt3d(video, wavelet) * VIDEO_BAND_SCALE,
    )


def from_bands(bands: Bands, wavelet: str = "haar") -> Tensor:
    """Invert `to_bands` exactly."""
    image, video = bands.image, bands.video
    if wavelet != "none":
        image = None if image is None else idwt2d(image / IMAGE_BAND_SCALE, wavelet)
        video = None if video is None else idwt3d(video / VIDEO_BAND_SCALE, wavelet)
    return torch.cat([part for part in (image, video) if part is not None], dim=2)


@dataclass(frozen=True)
class Patches:
    """How one kind of frames is cut: the image frame, or the video frames.

    Attributes:
        shape: (frames, height, width) of a patch, on the bands.
        channels: band channels by stream.
        pixels: (frames, height, width) of a patch, in pixels.
        is_image: whether these are patches of the image frame.
    """

    shape: tuple[int, int, int]
    channels: dict[str, int]
    pixels: tuple[int, int, int]
    is_image: bool

    def vector_size(self, stream: str) -> int:
        """Return the length of a stream's patch vectors."""
        return self.channels[stream] * math.prod(self.shape)

    def of_streams(self, bands: Tensor) -> tuple[Tensor, ...]:
        """Split the bands' channels `(B, C, T, H, W)` by stream."""
        return bands.split(list(self.channels.values()), dim=1)


def stream_widths(config: LeanVAEConfig) -> dict[str, int]:
    """Return the tokens' channels, by stream."""
    if config.streams == "joint":
        return {"joint": config.hidden_channels}
    return {"low": config.low_channels, "high": config.high_channels}


def image_and_video_patches(config: LeanVAEConfig) -> tuple[Patches, Patches]:
    """Return the patches of the image frame and of the video frames."""
    frames, height, width = config.patch_size
    factor, image_bands, video_bands = (1, 1, 1) if config.wavelet == "none" else (2, 4, 8)

    def channels(num_bands: int) -> dict[str, int]:
        if config.streams == "joint":
            return {"joint": num_bands * COLOURS}
        return {"low": COLOURS, "high": (num_bands - 1) * COLOURS}

    area = (height // factor, width // factor)
    return (
        Patches((1, *area), channels(image_bands), (1, height, width), is_image=True),
        Patches((frames // factor, *area), channels(video_bands), config.patch_size, is_image=False),
    )


def to_patches(bands: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Rearrange `(B, C, T, H, W)` to `(B, T/pt, H/ph, W/pw, C*pt*ph*pw)`; patch vectors are ordered (C, pt, ph, pw)."""
    pt, ph, pw = patch
    return rearrange(
        bands, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw
    )  # fmt: skip


def from_patches(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Invert `to_patches` exactly."""
    pt, ph, pw = patch
    return rearrange(
        patches, "b t h w (c pt ph pw) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw
    )  # fmt: skip


def latent_frames(frames: int, group: int, starts_clip: bool = True) -> int:
    """Count the latent frames of `frames` frames, whose last group may be incomplete."""
    first = int(starts_clip)
    return first + -(-(frames - first) // group)


def clip_frames(latent_frames: int, group: int, starts_clip: bool = True) -> int:
    """Count the frames of `latent_frames` latent frames."""
    return group * latent_frames - (group - 1) * int(starts_clip)


def pad_to_patches(clip: Tensor, patch_size: Sequence[int], starts_clip: bool = True) -> Tensor:
    """Replicate the last frame, row and column of `(B, C, T, H, W)` until the patches divide the clip.

    If the clip starts here, its first frame is not part of the groups of `patch_size[0]` frames.
    """
    frames, height, width = clip.shape[2:]
    group, patch_height, patch_width = patch_size
    padding = (-width % patch_width, -height % patch_height, (int(starts_clip) - frames) % group)
    if not any(padding):
        return clip
    right, bottom, after = padding
    return F.pad(clip, (0, right, 0, bottom, 0, after), mode="replicate")


def _projection(size: int, width: int, norm: bool) -> nn.Module:
    linear = nn.Linear(size, width)
    return nn.Sequential(nn.LayerNorm(size), linear, nn.LayerNorm(width)) if norm else linear


class PatchEmbedding(nn.Module):
    """Wavelet transform, then linear maps from patches of the bands to tokens, for images, videos and streams each."""

    is_folded = False  # whether transform and maps are one product

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        widths, norm = stream_widths(config), config.patch_norm
        self.config = config
        self.patches = image, video = image_and_video_patches(config)
        self.image = nn.ModuleDict({name: _projection(image.vector_size(name), widths[name], norm) for name in widths})
        self.video = nn.ModuleDict({name: _projection(video.vector_size(name), widths[name], norm) for name in widths})

    def forward(self, pixels: Tensor, starts_clip: bool = True) -> list[Tensor]:
        """Turn pixels into the tokens of each stream.

        Args:
            pixels: `(B, 3, T, H, W)` in [-1, 1] whose sizes the patches divide.
            starts_clip: whether the first frame is the first of the clip, which stands alone.

        Returns:
            Tokens `(B, T', H', W', width)`, by stream.
        """
        bands = to_bands(pixels * self.config.data_scale, self.config.wavelet, starts_clip)
        tokens: list[list[Tensor]] = [[] for _ in self.image]
        for frames, patches, maps in zip(bands, self.patches, (self.image, self.video), strict=True):
            if frames is not None:
                for stream, (part, linear) in enumerate(zip(patches.of_streams(frames), maps.values(), strict=True)):
                    tokens[stream].append(linear(to_patches(part, patches.shape)))
        return [torch.cat(parts, dim=1) for parts in tokens]


class PatchProjection(nn.Module):
    """Linear maps from tokens back to patches of the bands, then the inverse transform; mirrors `PatchEmbedding`."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        widths = stream_widths(config)
        self.config = config
        self.patches = image, video = image_and_video_patches(config)
        self.image = nn.ModuleDict({name: nn.Linear(widths[name], image.vector_size(name)) for name in widths})
        self.video = nn.ModuleDict({name: nn.Linear(widths[name], video.vector_size(name)) for name in widths})

    def forward(self, tokens: list[Tensor], starts_clip: bool = True) -> Tensor:
        """Turn tokens `(B, T', H', W', width)` by stream into pixels `(B, 3, T, H, W)` in [-1, 1]."""

        def bands(tokens: list[Tensor], patches: Patches, maps: nn.ModuleDict) -> Tensor | None:
            if not tokens[0].shape[1]:
                return None
            parts = zip(maps.values(), tokens, strict=True)
            return torch.cat([from_patches(linear(x), patches.shape) for linear, x in parts], dim=1)

        first = int(starts_clip)
        image = bands([x[:, :first] for x in tokens], self.patches[0], self.image)
        video = bands([x[:, first:] for x in tokens], self.patches[1], self.video)
        return from_bands(Bands(image, video), self.config.wavelet) / self.config.data_scale
