"""From pixels to wavelet patches and back (LeanVAE, Figure 1b: Patchifier).

The first frame of a clip stands alone: it gets a 2D transform and image patches. The others get a 3D transform
and video patches. Both give tokens of the same width, so that an image is a clip of one frame.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from leanvae.config import LeanVAEConfig
from leanvae.inference.folding import LinearMap
from leanvae.inference.packed import pack_linear, packed_linear
from litevae.prepared import Preparable
from litevae.wavelet import dwt2d, dwt3d, idwt2d, idwt3d

# The published model's bands are the orthonormal ones times these.
IMAGE_BAND_SCALE = 2.0
VIDEO_BAND_SCALE = 2.0 * 2.0**0.5
COLOURS = 3
FOLDABLE = ("haar", "none")  # transforms that mix nothing beyond a patch


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


@dataclass(frozen=True)
class Patches:
    """How one kind of frames, the image frame or the video frames, is cut.

    Attributes:
        shape: (frames, height, width) of a patch, on the bands.
        channels: band channels by stream.
        pixels: (frames, height, width) of a patch, in pixels.
        is_image: whether it is the image frame that is cut.
    """

    shape: tuple[int, int, int]
    channels: dict[str, int]
    pixels: tuple[int, int, int]
    is_image: bool

    def vector_size(self, stream: str) -> int:
        """Length of a stream's patch vectors."""
        return self.channels[stream] * math.prod(self.shape)

    def of_streams(self, bands: Tensor) -> dict[str, Tensor]:
        """Parts the channels `(B, C, T, H, W)` of the bands by stream."""
        return dict(zip(self.channels, bands.split(list(self.channels.values()), dim=1), strict=True))


def stream_widths(config: LeanVAEConfig) -> dict[str, int]:
    """Channels of the tokens, by stream."""
    if config.streams == "joint":
        return {"joint": config.hidden_channels}
    return {"low": config.low_channels, "high": config.high_channels}


def image_and_video_patches(config: LeanVAEConfig) -> tuple[Patches, Patches]:
    """The patches that a configuration cuts from the image frame and from the video frames."""
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


class PatchEmbedding(Preparable):
    """Linear maps from patches of the bands to tokens, apart for images and videos and for each stream.

    Prepared for inference, the transform and the maps are one, on patches of pixels: `analyse` then leaves the
    pixels as they are.
    """

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        widths, norm = stream_widths(config), config.patch_norm
        self.config = config
        self.patches = image, video = image_and_video_patches(config)
        self.image = nn.ModuleDict({name: _projection(image.vector_size(name), widths[name], norm) for name in widths})
        self.video = nn.ModuleDict({name: _projection(video.vector_size(name), widths[name], norm) for name in widths})

    def analyse(self, clip: Tensor, starts_clip: bool = True) -> Bands:
        """What `forward` takes of a clip `(B, 3, T, H, W)` in [-1, 1] whose sizes the patches divide."""
        if self.prepared is not None:
            return Bands(*split_first_frame(clip, starts_clip))
        return analyse(clip * self.config.data_scale, self.config.wavelet, starts_clip)

    def forward(self, bands: Bands) -> dict[str, Tensor]:
        """Tokens `(B, T', H', W', width)` by stream."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.image}
        for index, (frames, projections) in enumerate(((bands.image, self.image), (bands.video, self.video))):
            if frames is None:
                continue
            patches = self.patches[index]
            if self.prepared is not None:
                vectors = to_patches(frames, patches.pixels)
                for name, linear in self.prepared[index].items():
                    parts[name].append(packed_linear(vectors, *linear))
            else:
                for name, part in patches.of_streams(frames).items():
                    parts[name].append(projections[name](to_patches(part, patches.shape)))
        return {name: torch.cat(part, dim=1) for name, part in parts.items()}

    @torch.no_grad()
    def prepare(self) -> None:
        """Folds the transform into the maps and packs them; not with norms between the two, nor beyond Haar."""
        if self.config.wavelet not in FOLDABLE or self.config.patch_norm:
            return
        self.prepared = tuple(
            {
                name: pack_linear(fold_analysis(cast(nn.Linear, linears[name]), patches, name, self.config))
                for name in linears
            }
            for patches, linears in zip(self.patches, (self.image, self.video), strict=True)
        )


class PatchProjection(Preparable):
    """Linear maps from tokens back to patches of the bands; the mirror image of `PatchEmbedding`.

    Prepared for inference, the maps and the inverse transform are one: `forward` then returns, in `video`, the whole
    clip, and `synthesise` leaves it as it is.
    """

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        widths = stream_widths(config)
        self.config = config
        self.patches = image, video = image_and_video_patches(config)
        self.image = nn.ModuleDict({name: nn.Linear(widths[name], image.vector_size(name)) for name in widths})
        self.video = nn.ModuleDict({name: nn.Linear(widths[name], video.vector_size(name)) for name in widths})

    def forward(self, tokens: dict[str, Tensor], starts_clip: bool = True) -> Bands:
        """Bands of tokens by stream; `starts_clip` tells whether the first of them is the image frame's."""
        if self.prepared is not None:
            return Bands(None, self._pixels(tokens, starts_clip))

        def bands(part: slice, index: int, projections: nn.ModuleDict) -> Tensor | None:
            chosen = {name: of_stream[:, part] for name, of_stream in tokens.items()}
            if not next(iter(chosen.values())).shape[1]:
                return None
            shape = self.patches[index].shape
            return torch.cat([from_patches(projections[name](x), shape) for name, x in chosen.items()], dim=1)

        num_image_frames = int(starts_clip)
        return Bands(
            bands(slice(0, num_image_frames), 0, self.image),
            bands(slice(num_image_frames, None), 1, self.video),
        )

    def synthesise(self, bands: Bands) -> Tensor:
        """The clip `(B, 3, T, H, W)` in [-1, 1] of what `forward` returned."""
        if self.prepared is not None:
            assert bands.video is not None
            return bands.video
        return synthesise(bands, self.config.wavelet) / self.config.data_scale

    def _pixels(self, tokens: dict[str, Tensor], starts_clip: bool) -> Tensor:
        """The clip of tokens by stream."""
        streams, num_image = list(tokens.values()), int(starts_clip)
        batch, num_tokens, rows, columns, _ = streams[0].shape
        frames, height, width = self.config.patch_size
        num_frames = num_image + (num_tokens - num_image) * frames
        clip = streams[0].new_empty(batch, COLOURS, num_frames, rows * height, columns * width)
        self._write_pixels(clip[:, :, :num_image], [x[:, :num_image] for x in streams], 0)
        video, streams = clip[:, :, num_image:], [x[:, num_image:] for x in streams]
        if torch.compiler.is_compiling():
            self._write_pixels(video, streams, 1)  # no loop, whose length would be compiled in
        else:
            for index in range(num_tokens - num_image):
                part = video[:, :, index * frames : (index + 1) * frames]
                self._write_pixels(part, [x[:, index : index + 1] for x in streams], 1)
        return clip

    def _write_pixels(self, clip: Tensor, streams: list[Tensor], index: int) -> None:
        """Computes frames `(B, 3, T, H, W)` from tokens of theirs, and puts them where they belong."""
        if clip.shape[2]:
            pt, ph, pw = self.patches[index].pixels
            patches = rearrange(
                clip, "b c (t pt) (h ph) (w pw) -> b t h w c pt ph pw", pt=pt, ph=ph, pw=pw
            )  # fmt: skip
            vectors = packed_linear(torch.cat(streams, dim=-1), *self.prepared[index])
            patches.copy_(vectors.view(patches.shape))

    @torch.no_grad()
    def prepare(self) -> None:
        """Folds the inverse transform into the maps, makes one of those of the streams, and packs it."""
        if self.config.wavelet not in FOLDABLE:
            return
        self.prepared = tuple(
            pack_linear(fold_synthesis(linears, patches, self.config))
            for patches, linears in zip(self.patches, (self.image, self.video), strict=True)
        )


def analysis_matrix(patches: Patches, stream: str, wavelet: str = "haar") -> Tensor:
    """The wavelet transform of one patch, `(vector_size(stream), P)` float64, of P pixels in the order (C, t, h, w)."""
    size = COLOURS * math.prod(patches.pixels)
    pixels = torch.eye(size, dtype=torch.float64).view(size, COLOURS, *patches.pixels)
    bands = analyse(pixels, wavelet, starts_clip=patches.is_image)
    of_kind = bands.image if patches.is_image else bands.video
    assert of_kind is not None
    return to_patches(patches.of_streams(of_kind)[stream], patches.shape).flatten(1).T


def synthesis_matrix(patches: Patches, wavelet: str = "haar") -> Tensor:
    """The inverse, `(P, S)` float64, of the streams' patch vectors one after the other, S elements in all."""
    sizes = [patches.vector_size(name) for name in patches.channels]
    vectors = torch.eye(sum(sizes), dtype=torch.float64)[:, None, None, None]
    parts = [from_patches(part, patches.shape) for part in vectors.split(sizes, dim=-1)]
    bands = torch.cat(parts, dim=1)
    pixels = synthesise(Bands(bands, None) if patches.is_image else Bands(None, bands), wavelet)
    return pixels.flatten(1).T


def fold_analysis(linear: nn.Linear, patches: Patches, stream: str, config: LeanVAEConfig) -> LinearMap:
    """The map of pixel patches in [-1, 1] that `linear` is of patches of the bands."""
    matrix = config.data_scale * analysis_matrix(patches, stream, config.wavelet).to(linear.weight.device)
    return LinearMap((linear.weight.double() @ matrix).to(linear.weight.dtype), linear.bias)


def fold_synthesis(linears: nn.ModuleDict, patches: Patches, config: LeanVAEConfig) -> LinearMap:
    """The map to pixel patches in [-1, 1], of the streams' tokens side by side, that `linears` are to the bands."""
    of_streams = [cast(nn.Linear, linear) for linear in linears.values()]
    weights = torch.block_diag(*(linear.weight.double() for linear in of_streams))
    biases = torch.cat([linear.bias.double() for linear in of_streams])
    matrix = synthesis_matrix(patches, config.wavelet).to(weights.device) / config.data_scale
    dtype = next(linears.parameters()).dtype
    return LinearMap((matrix @ weights).to(dtype), (matrix @ biases).to(dtype))
