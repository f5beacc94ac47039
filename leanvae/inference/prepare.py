"""The model's twin for inference, with norms, self-modulation and wavelet transform folded into the weights.

The layers know nothing of it. Sums are formed in float64 and rounded once, to the dtype of the weights. Then widths are
padded and, on CPUs with oneDNN, weights are packed.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from leanvae.config import LeanVAEConfig
from leanvae.inference.packed import LinearMap, pack, pack_linear, packed_feedforward, packed_linear
from leanvae.naf import FeedForward
from leanvae.patchify import (
    COLOURS,
    Bands,
    PatchEmbedding,
    Patches,
    PatchProjection,
    from_bands,
    from_patches,
    split_first_frame,
    to_bands,
    to_patches,
)
from litevae.smc import SelfModulatedLinear
from litevae.snapshot import make_twin

FOLDABLE = ("haar", "none")  # transforms that do not reach beyond a patch
WIDTH_MULTIPLE = 32  # matrix kernels are faster on its multiples; the published 1,365 becomes 1,376


def prepare(vae: Any, options: Mapping[str, Any]) -> Any:
    """Make a LeanVAE's twin, which computes the same up to rounding.

    Args:
        vae: the model.
        options: of `torch.compile`. Encoder and decoder are compiled on GPUs, once for all sizes. On CPUs they are
            compiled only if there are options, because compiling gains almost nothing beside the packed products.
    """
    twin: Any = make_twin(vae, _prepared)
    if options or next(vae.parameters()).is_cuda:
        for part in (twin.encoder, twin.decoder):
            # Without fullgraph, which raises at torch's limit of recompilations.
            part.compile(**{"dynamic": True, **options})
    return twin


def _prepared(module: nn.Module) -> nn.Module | None:
    """Return the substitute for a module, or None to keep it."""
    if isinstance(module, FeedForward):
        return PackedFeedForward(module)
    # A norm between transform and map prevents folding them.
    if isinstance(module, PatchEmbedding) and module.config.wavelet in FOLDABLE and not module.config.patch_norm:
        return FoldedEmbedding(module)
    if isinstance(module, PatchProjection) and module.config.wavelet in FOLDABLE:
        return FoldedProjection(module)
    return None


class PackedFeedForward(nn.Module):
    """A `FeedForward` whose norm or modulation is folded into its packed weights."""

    def __init__(self, feedforward: FeedForward) -> None:
        super().__init__()
        expand, contract, norm = (
            _plain_weight(feedforward.expand),
            _plain_weight(feedforward.contract),
            feedforward.norm,
        )
        self.value, self.gate = (
            pack_linear(pad_outputs(LinearMap(weight, None) if norm is None else fold_norm(weight, norm)))
            for weight in expand.chunk(2)
        )
        self.contract = pack(pad_inputs(contract))
        self.eps = None if norm is None else norm.eps

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        return packed_feedforward(x, *self.value, *self.gate, self.contract, self.eps, residual)


class FoldedEmbedding(nn.Module):
    """A `PatchEmbedding` that applies transform and maps as one product, to patches of pixels."""

    is_folded = True

    def __init__(self, embedding: PatchEmbedding) -> None:
        super().__init__()
        self.patches = embedding.patches
        self.maps = [
            [pack_linear(fold_analysis(linear, patches, name, embedding.config)) for name, linear in _linears(maps)]
            for patches, maps in zip(self.patches, (embedding.image, embedding.video), strict=True)
        ]

    def forward(self, pixels: Tensor, starts_clip: bool = True) -> list[Tensor]:
        tokens: list[list[Tensor]] = [[] for _ in self.maps[0]]
        for frames, patches, maps in zip(split_first_frame(pixels, starts_clip), self.patches, self.maps, strict=True):
            if frames is not None:
                vectors = to_patches(frames, patches.pixels)
                for stream, linear in enumerate(maps):
                    tokens[stream].append(packed_linear(vectors, *linear))
        return [torch.cat(parts, dim=1) for parts in tokens]


class FoldedProjection(nn.Module):
    """A `PatchProjection` that applies maps and inverse transform as one product, to the streams' joined tokens."""

    def __init__(self, projection: PatchProjection) -> None:
        super().__init__()
        self.patches = projection.patches
        self.maps = [
            pack_linear(fold_synthesis(maps, patches, projection.config))
            for patches, maps in zip(self.patches, (projection.image, projection.video), strict=True)
        ]

    def forward(self, tokens: list[Tensor], starts_clip: bool = True) -> Tensor:
        num_image = int(starts_clip)
        batch, num_tokens, rows, columns, _ = tokens[0].shape
        frames, height, width = self.patches[1].pixels
        num_frames = num_image + (num_tokens - num_image) * frames
        clip = tokens[0].new_empty(batch, COLOURS, num_frames, rows * height, columns * width)
        self._write(clip[:, :, :num_image], [x[:, :num_image] for x in tokens], 0)
        video, tokens = clip[:, :, num_image:], [x[:, num_image:] for x in tokens]
        if torch.compiler.is_compiling():
            self._write(video, tokens, 1)  # unrolled, because a loop's length would be compiled in
        else:
            for index in range(num_tokens - num_image):
                part = video[:, :, index * frames : (index + 1) * frames]
                self._write(part, [x[:, index : index + 1] for x in tokens], 1)
        return clip

    def _write(self, clip: Tensor, tokens: list[Tensor], index: int) -> None:
        """Compute frames `(B, 3, T, H, W)` from their tokens, and write them to their place."""
        if clip.shape[2]:
            pt, ph, pw = self.patches[index].pixels
            patches = rearrange(
                clip, "b c (t pt) (h ph) (w pw) -> b t h w c pt ph pw", pt=pt, ph=ph, pw=pw
            )  # fmt: skip
            vectors = packed_linear(torch.cat(tokens, dim=-1), *self.maps[index])
            patches.copy_(vectors.view(patches.shape))


def _plain_weight(linear: nn.Linear | SelfModulatedLinear) -> Tensor:
    """Return the weight with which a plain linear map computes the same."""
    return linear.fold() if isinstance(linear, SelfModulatedLinear) else linear.weight


def _linears(maps: nn.ModuleDict) -> list[tuple[str, nn.Linear]]:
    return [(name, cast(nn.Linear, linear)) for name, linear in maps.items()]


def fold_norm(weight: Tensor, norm: nn.LayerNorm) -> LinearMap:
    """Return the map of tokens normalized without scale and shift that equals `weight` after `norm`.

    Args:
        weight: `(O, I)`.
        norm: over I channels.
    """
    scaled = weight.double() * norm.weight.double()
    return LinearMap(scaled.to(weight.dtype), (weight.double() @ norm.bias.double()).to(weight.dtype))


def pad_outputs(linear: LinearMap, multiple: int = WIDTH_MULTIPLE) -> LinearMap:
    """Add outputs that are always zero until `multiple` divides their number."""
    extra = -len(linear.weight) % multiple
    bias = None if linear.bias is None else F.pad(linear.bias, (0, extra))
    return LinearMap(F.pad(linear.weight, (0, 0, 0, extra)), bias)


def pad_inputs(weight: Tensor, multiple: int = WIDTH_MULTIPLE) -> Tensor:
    """Add inputs with zero weights until `multiple` divides their number."""
    return F.pad(weight, (0, -weight.shape[1] % multiple))


def analysis_matrix(patches: Patches, stream: str, wavelet: str = "haar") -> Tensor:
    """Return a patch's wavelet transform, `(vector_size(stream), P)` float64, of P pixels in the order (C, t, h, w)."""
    size = COLOURS * math.prod(patches.pixels)
    pixels = torch.eye(size, dtype=torch.float64).view(size, COLOURS, *patches.pixels)
    bands = to_bands(pixels, wavelet, starts_clip=patches.is_image)
    of_kind = bands.image if patches.is_image else bands.video
    assert of_kind is not None
    part = dict(zip(patches.channels, patches.of_streams(of_kind), strict=True))[stream]
    return to_patches(part, patches.shape).flatten(1).T


def synthesis_matrix(patches: Patches, wavelet: str = "haar") -> Tensor:
    """Return the inverse, `(P, S)` float64, of the streams' concatenated patch vectors, S elements in total."""
    sizes = [patches.vector_size(name) for name in patches.channels]
    vectors = torch.eye(sum(sizes), dtype=torch.float64)[:, None, None, None]
    parts = [from_patches(part, patches.shape) for part in vectors.split(sizes, dim=-1)]
    bands = torch.cat(parts, dim=1)
    pixels = from_bands(Bands(bands, None) if patches.is_image else Bands(None, bands), wavelet)
    return pixels.flatten(1).T


def fold_analysis(linear: nn.Linear, patches: Patches, stream: str, config: LeanVAEConfig) -> LinearMap:
    """Return the map of pixel patches in [-1, 1] that equals `linear` on patches of the bands."""
    matrix = config.data_scale * analysis_matrix(patches, stream, config.wavelet).to(linear.weight.device)
    return LinearMap((linear.weight.double() @ matrix).to(linear.weight.dtype), linear.bias)


def fold_synthesis(linears: nn.ModuleDict, patches: Patches, config: LeanVAEConfig) -> LinearMap:
    """Return the map from the streams' joined tokens to pixel patches in [-1, 1] that equals `linears`."""
    of_streams = [linear for _, linear in _linears(linears)]
    weights = torch.block_diag(*(linear.weight.double() for linear in of_streams))
    biases = torch.cat([linear.bias.double() for linear in of_streams])
    matrix = synthesis_matrix(patches, config.wavelet).to(weights.device) / config.data_scale
    dtype = next(linears.parameters()).dtype
    return LinearMap((matrix @ weights).to(dtype), (matrix @ biases).to(dtype))
