"""From pixels to wavelet patches and back (LeanVAE, Figure 1b: Patchifier).

The first frame of a clip stands alone: it gets a 2D transform and image patches. The others get a 3D transform
and video patches. Both give tokens of the same width, so that an image is a clip of one frame.
"""

from typing import NamedTuple

import torch
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
        video: `(B, 24, t/2, H/2, W/2)`, of the t frames after it; `None` where there are none.
    """

    image: Tensor | None
    video: Tensor | None


def split_first_frame(x: Tensor, starts_clip: bool) -> tuple[Tensor | None, Tensor | None]:
    """Parts a chunk `(B, C, T, H, W)` into the frame that stands alone and the others."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if starts_clip else (None, x)
    return first, (rest if rest.shape[2] else None)


def analyse(x: Tensor, wavelet: str = "haar", starts_clip: bool = True) -> Bands:
    """Wavelet bands of a clip, scaled as in the published model (2D by 2, 3D by 2 sqrt 2).

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


def synthesise(bands: Bands, wavelet: str = "haar") -> Tensor:
    """Exact inverse of `analyse`."""
    image, video = bands.image, bands.video
    if wavelet != "none":
        image = None if image is None else idwt2d(image / IMAGE_BAND_SCALE, wavelet)
        video = None if video is None else idwt3d(video / VIDEO_BAND_SCALE, wavelet)
    return torch.cat([part for part in (image, video) if part is not None], dim=2)


class PatchLayout:
    """Sizes of the patches that a configuration cuts, and the widths of the streams they feed.

    Attributes:
        image_patch: (1, height, width) of an image patch, on the bands.
        video_patch: (frames, height, width) of a video patch, on the bands.
        widths: channels of the tokens, by stream.
        image_channels: band channels of an image frame, by stream.
        video_channels: band channels of video frames, by stream.
    """

    def __init__(self, config: LeanVAEConfig) -> None:
        frames, height, width = config.patch_size
        factor, image_bands, video_bands = (1, 1, 1) if config.wavelet == "none" else (2, 4, 8)
        self.image_patch = (1, height // factor, width // factor)
        self.video_patch = (frames // factor, height // factor, width // factor)
        if config.streams == "joint":
            self.widths = {"joint": config.hidden_channels}
            self.image_channels = {"joint": image_bands * COLOURS}
            self.video_channels = {"joint": video_bands * COLOURS}
        else:
            self.widths = {"low": config.low_channels, "high": config.high_channels}
            self.image_channels = {"low": COLOURS, "high": (image_bands - 1) * COLOURS}
            self.video_channels = {"low": COLOURS, "high": (video_bands - 1) * COLOURS}


def to_patches(bands: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`(B, C, T, H, W)` to `(B, T/pt, H/ph, W/pw, C*pt*ph*pw)`; a patch vector is ordered (C, pt, ph, pw)."""
    pt, ph, pw = patch
    return rearrange(
        bands, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw
    )  # fmt: skip


def from_patches(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Exact inverse of `to_patches`."""
    pt, ph, pw = patch
    return rearrange(
        patches, "b t h w (c pt ph pw) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw
    )  # fmt: skip


def _projection(size: int, width: int, norm: bool) -> nn.Module:
    linear = nn.Linear(size, width)
    return nn.Sequential(nn.LayerNorm(size), linear, nn.LayerNorm(width)) if norm else linear


class PatchEmbedding(nn.Module):
    """Linear maps from patches of the bands to tokens, apart for images and videos and for each stream."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.layout = layout = PatchLayout(config)
        image_area = layout.image_patch[1] * layout.image_patch[2]
        video_volume = layout.video_patch[0] * image_area

        def projections(channels: dict[str, int], volume: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: _projection(channels[name] * volume, width, config.patch_norm)
                    for name, width in layout.widths.items()
                }
            )

        self.image = projections(layout.image_channels, image_area)
        self.video = projections(layout.video_channels, video_volume)

    def forward(self, bands: Bands) -> dict[str, Tensor]:
        """Tokens `(B, T', H', W', width)` by stream."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.layout.widths}
        for frames, patch, channels, projections in (
            (bands.image, self.layout.image_patch, self.layout.image_channels, self.image),
            (bands.video, self.layout.video_patch, self.layout.video_channels, self.video),
        ):
            if frames is None:
                continue
            for (name, part), of_stream in zip(
                parts.items(), frames.split(list(channels.values()), dim=1), strict=True
            ):
                part.append(projections[name](to_patches(of_stream, patch)))
        return {name: torch.cat(part, dim=1) for name, part in parts.items()}


class PatchProjection(nn.Module):
    """Linear maps from tokens back to patches of the bands; the mirror image of `PatchEmbedding`."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.layout = layout = PatchLayout(config)
        image_area = layout.image_patch[1] * layout.image_patch[2]
        video_volume = layout.video_patch[0] * image_area

        def projections(channels: dict[str, int], volume: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {name: nn.Linear(width, channels[name] * volume) for name, width in layout.widths.items()}
            )

        self.image = projections(layout.image_channels, image_area)
        self.video = projections(layout.video_channels, video_volume)

    def forward(self, tokens: dict[str, Tensor], starts_clip: bool = True) -> Bands:
        """Bands of tokens by stream; `starts_clip` tells whether the first of them is the image frame's."""

        def bands(part: slice, patch: tuple[int, int, int], projections: nn.ModuleDict) -> Tensor | None:
            chosen = {name: of_stream[:, part] for name, of_stream in tokens.items()}
            if not next(iter(chosen.values())).shape[1]:
                return None
            return torch.cat([from_patches(projections[name](x), patch) for name, x in chosen.items()], dim=1)

        num_image_frames = int(starts_clip)
        return Bands(
            bands(slice(0, num_image_frames), self.layout.image_patch, self.image),
            bands(slice(num_image_frames, None), self.layout.video_patch, self.video),
        )
