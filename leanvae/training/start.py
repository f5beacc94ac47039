"""A start in closed form: the network as the best linear codec of its shape, the truncated Karhunen-Loeve transform.

LeanVAE is an identity with residual branches around linear maps. With its branches closed it is linear: patches to
tokens, tokens to the latent, and back. Of all linear maps through Z numbers, projection on the Z leading principal
components of the patches loses least (Eckart and Young, 1936), so training starts there instead of at noise.

Image frames and groups of video frames have principal components of their own, and each stream of tokens carries its
part of them; see `linear_maps`. Spare channels of the decoder's tokens hold what neighbouring tokens say, for training
to use; see `open_context`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck
from leanvae.config import LeanVAEConfig
from leanvae.model import LeanVAE
from leanvae.naf import CausalDepthwiseConv, FeedForward, NAFLayers
from leanvae.patchify import (
    COLOURS,
    IMAGE_BAND_SCALE,
    VIDEO_BAND_SCALE,
    Bands,
    Patches,
    from_bands,
    from_patches,
    image_and_video_patches,
    stream_widths,
    to_bands,
)
from leanvae.training.patch_statistics import ClipStatistics, patch_vectors
from litevae.smc import SelfModulatedLinear

CLOSED_GAIN = 1e-3  # of a self-modulated map that closes a branch: 0 would keep its weight from learning
START_LOGVAR = -6.0  # of latents with variance 1
# What neighbours say of a token, as weights by (frame, row, column) in a causal 3x3x3 kernel, whose last frame is the
# token's: slopes across and down, differences to one and two frames before, the Laplacian.
CONTEXT_KERNELS: tuple[dict[tuple[int, int, int], float], ...] = (
    {(2, 1, 0): -0.5, (2, 1, 2): 0.5},
    {(2, 0, 1): -0.5, (2, 2, 1): 0.5},
    {(1, 1, 1): 1.0, (2, 1, 1): -1.0},
    {(0, 1, 1): 1.0, (2, 1, 1): -1.0},
    {(2, 1, 1): -1.0, (2, 0, 1): 0.25, (2, 1, 0): 0.25, (2, 1, 2): 0.25, (2, 2, 1): 0.25},
)
_LEAST_VARIANCE = 1e-9  # of a component; rounding pixels to bytes adds more. Channels without content stay 0


@dataclass(frozen=True)
class LinearStart:
    """The linear maps of a model that starts in closed form, and what they promise.

    Attributes:
        maps: values of parameters, float32, by name.
        psnr: expected PSNR in dB of image frames and of the other frames, from the mean squared error over all
            patches of the statistics; none of a kind that there was nothing of.
        lost: dB that the model lies below the truncated KLT, because a stream is narrower than the latent; likewise.
    """

    maps: dict[str, Tensor]
    psnr: dict[str, float]
    lost: dict[str, float]


def start_model(model: LeanVAE, start: LinearStart) -> None:
    """Set a model to its start, in place."""
    with torch.no_grad():
        close_branches(model)
        parameters = dict(model.named_parameters())
        for name, value in start.maps.items():
            parameters[name].copy_(value)
        model.logvar.weight.zero_()
        model.logvar.bias.fill_(START_LOGVAR)
        open_context(model)


def close_branches(model: LeanVAE) -> None:
    """Close the residual branches of a model and the learned transforms of its bottleneck, in place.

    The maps that a branch ends with become zero or nearly zero; the others are left to be learned.
    """
    for part in (model.encoder, model.decoder):
        for stack in (module for module in part.modules() if isinstance(module, NAFLayers)):
            for conv in stack.convs:
                assert isinstance(conv, CausalDepthwiseConv)
                nn.init.zeros_(conv.weight)
            for feedforward in stack.feedforwards:
                _close(feedforward)
    if isinstance(model.bottleneck, ISTABottleneck):
        for stack in model.bottleneck.backward_transforms:
            assert isinstance(stack, NAFLayers)
            _close(stack.feedforwards[-1])


def _close(feedforward: nn.Module) -> None:
    assert isinstance(feedforward, FeedForward)
    linear = feedforward.contract
    if isinstance(linear, SelfModulatedLinear):
        nn.init.constant_(linear.gain, CLOSED_GAIN)
    else:
        nn.init.zeros_(linear.weight)


def context_channels(config: LeanVAEConfig) -> dict[str, range]:
    """Return the spare channels of each stream's tokens in the decoder that hold context.

    They come after the stream's first Z channels; `linear_start` keeps them from the pixels.
    """
    first = config.latent_channels
    wanted = len(CONTEXT_KERNELS) * first if config.num_fusion_layers else 0
    return {stream: range(first, min(width, first + wanted)) for stream, width in stream_widths(config).items()}


def open_context(model: LeanVAE) -> None:
    """Let spare channels of the decoder's tokens hold what neighbouring tokens say, in place.

    Each holds one of `CONTEXT_KERNELS` of one latent channel. No map leads from there to the pixels yet, so the
    reconstruction stays as it is. But the projection can learn at once how the neighbours improve a patch; the residual
    branches, which multiply, learn that slowly.
    """
    if not model.config.num_fusion_layers:
        return
    recover = model.bottleneck.initial if isinstance(model.bottleneck, ISTABottleneck) else model.bottleneck.up.weight
    conv = model.decoder.fusion.convs[0]
    assert isinstance(conv, CausalDepthwiseConv)
    weights = conv.weight
    offset = 0
    with torch.no_grad():
        for stream, width in stream_widths(model.config).items():
            for number, channel in enumerate(context_channels(model.config)[stream]):
                latent, kernel = divmod(number, len(CONTEXT_KERNELS))
                recover[offset + channel].zero_()
                recover[offset + channel, latent] = 1.0
                weights[offset + channel].zero_()
                for place, value in CONTEXT_KERNELS[kernel].items():
                    weights[(offset + channel, 0, *place)] = value
                weights[offset + channel, 0, 2, 1, 1] -= 1.0  # takes the token away, which the residual adds
            offset += width


@dataclass
class _Kind:
    """One kind of patches, image or video.

    Attributes:
        name: of the kind.
        patches: how it is cut.
        share: of all tokens.
        mean: `(S,)`, of its patch vectors.
        factor: `(S, K)`; see `PatchStatistics.factor`.
        components: principal components `(Z, S)`, perhaps turned among themselves.
    """

    name: str
    patches: Patches
    share: float
    mean: Tensor
    factor: Tensor
    components: Tensor

    def parts(self) -> dict[str, slice]:
        """Return which elements of the vectors each stream carries."""
        parts, end = {}, 0
        for stream in self.patches.channels:
            start, end = end, end + self.patches.vector_size(stream)
            parts[stream] = slice(start, end)
        return parts

    def error(self, decode: Tensor, encode: Tensor) -> float:
        """Return the mean squared error of pixels in [-1, 1] times `data_scale`, for linear maps there and back."""
        scale = (IMAGE_BAND_SCALE if self.patches.is_image else VIDEO_BAND_SCALE) if self.has_bands else 1.0
        error = self.factor - decode @ (encode @ self.factor)
        return float(error.square().sum()) / (len(error) * scale**2)

    @property
    def has_bands(self) -> bool:
        """Whether the vectors hold wavelet bands and not pixels."""
        return self.patches.shape != self.patches.pixels


def linear_start(statistics: ClipStatistics) -> LinearStart:
    """Return the best linear codec of patches with these statistics.

    The principal components V (Z, S) of a kind of patches are cut by stream into V_s. With n streams, a stream's first
    features are sqrt(n) V_s (x_s - mean), and the latent is their sum over sqrt(n), and back likewise. So the latent is
    V (x - mean), scaled to variance 1 over the tokens of both kinds. A stream that is narrower than Z keeps the
    directions with the most variance, and the decoder does what is best with those.

    Raises:
        ValueError: the model has norms between patches and tokens, so that it has no linear skeleton; or there are no
            statistics.
    """
    config = statistics.config
    if config.patch_norm:
        raise ValueError("patch_norm: norms between patches and tokens leave no linear skeleton")
    kinds = _kinds(statistics)
    if not kinds:
        raise ValueError("expected statistics of some patches")
    num_latent, widths = config.latent_channels, stream_widths(config)
    bases = {stream: _carried(kinds, stream, num_latent, width) for stream, width in widths.items()}
    root = math.sqrt(len(widths))
    down = torch.cat([basis / root for basis in bases.values()], dim=1)
    up = torch.linalg.solve(down @ down.T, down).T  # down @ up = 1, which the gradient step of ISTA-Net+ leaves alone
    ups = dict(zip(bases, up.split([basis.shape[1] for basis in bases.values()]), strict=True))
    maps: dict[str, Tensor] = {}
    psnr, lost, variance = {}, {}, torch.zeros(num_latent, dtype=torch.float64)
    for kind in kinds:
        embeddings = {
            stream: root * bases[stream].T @ kind.components[:, part] for stream, part in kind.parts().items()
        }
        encode = down @ torch.block_diag(*embeddings.values())
        latent = encode @ kind.factor
        variance += kind.share * latent.square().sum(1)
        projections = {stream: _projection(kind, part, ups[stream], latent) for stream, part in kind.parts().items()}
        decode = torch.cat([projections[stream] @ ups[stream] for stream in projections])
        error, least = kind.error(decode, encode), kind.error(kind.components.T, kind.components)
        psnr[kind.name] = -10 * math.log10(max(error / (2 * config.data_scale) ** 2, 1e-12))
        lost[kind.name] = 10 * math.log10(max(error, 1e-30) / max(least, 1e-30))
        for stream, part in kind.parts().items():
            maps |= _maps_of_stream(config, kind, stream, part, embeddings[stream], projections[stream])
    scale = torch.where(variance > _LEAST_VARIANCE, variance, 1.0).sqrt()
    to_latent, from_latent = _spread(down / scale[:, None], widths, bases), _spread((up * scale).T, widths, bases).T
    if config.bottleneck == "ista":
        maps |= {"bottleneck.phi": to_latent, "bottleneck.initial": from_latent}
    else:
        maps |= {"bottleneck.down.weight": to_latent, "bottleneck.down.bias": torch.zeros(num_latent)}
        maps |= {"bottleneck.up.weight": from_latent, "bottleneck.up.bias": torch.zeros(len(from_latent))}
    return LinearStart({name: value.float().contiguous() for name, value in maps.items()}, psnr, lost)


def _kinds(statistics: ClipStatistics) -> list[_Kind]:
    """Return the kinds of which there are any, image frames turned to mean the same as video frames."""
    config = statistics.config
    sums = (statistics.image, statistics.video)
    total = sum(each.count for each in sums)
    found = []
    for name, patches, each in zip(("image", "video"), image_and_video_patches(config), sums, strict=True):
        if each.count:
            mean, factor = each.factor()
            components = principal_components(factor, config.latent_channels)
            found.append(_Kind(name, patches, each.count / total, mean, factor, components))
    if len(found) == 2:
        image, video = found
        # What a group of frames that all show an image would be in the video's components (orthogonal Procrustes).
        left, _, right = torch.linalg.svd(video.components @ _still_vectors(config, image.components).T)
        image.components = left @ right @ image.components
    return found


def principal_components(factor: Tensor, count: int) -> Tensor:
    """Return the leading principal directions as rows, `(count, S)`; rows of zeros beyond the rank.

    Args:
        factor: `(S, K)`, of a covariance; see `PatchStatistics.factor`.
        count: Z.
    """
    leading = factor[:, :count].T
    norms = torch.linalg.vector_norm(leading, dim=1, keepdim=True)
    rows = torch.where(norms > 1e-9 * norms.max(), leading / norms.clamp_min(1e-300), 0.0)
    # An eigenvector's sign is arbitrary: its largest element is made positive, on every machine.
    return _padded(rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign(), count)


def _still_vectors(config: LeanVAEConfig, vectors: Tensor) -> Tensor:
    """Return the patch vectors `(N, S video)` of frames that all show the images of patch vectors `(N, S image)`."""
    image, video = image_and_video_patches(config)
    parts = vectors[:, None, None, None].split([image.vector_size(stream) for stream in image.channels], dim=-1)
    bands = torch.cat([from_patches(part, image.shape) for part in parts], dim=1)
    pixels = from_bands(Bands(bands, None), config.wavelet)
    frames = pixels.expand(-1, COLOURS, video.pixels[0], -1, -1)
    repeated = to_bands(frames, config.wavelet, starts_clip=False).video
    assert repeated is not None
    return patch_vectors(repeated, video)


def _carried(kinds: list[_Kind], stream: str, num_latent: int, width: int) -> Tensor:
    """Return the directions of the latent `(Z, d)` that a stream's tokens carry: all, or those with most variance."""
    if width >= num_latent:
        return torch.eye(num_latent, dtype=torch.float64)
    latents = [
        math.sqrt(kind.share) * kind.components[:, part] @ kind.factor[part]
        for kind in kinds
        for part in [kind.parts()[stream]]
    ]
    return torch.linalg.svd(torch.cat(latents, dim=1), full_matrices=False)[0][:, :width]


def _projection(kind: _Kind, part: slice, up: Tensor, latent: Tensor) -> Tensor:
    """Return the map `(S_s, d)` from a stream's first features to its part of the patch vectors: least squares."""
    observed = up @ latent
    return kind.factor[part] @ observed.T @ torch.linalg.pinv(observed @ observed.T, hermitian=True)


def _maps_of_stream(
    config: LeanVAEConfig, kind: _Kind, stream: str, part: slice, embedding: Tensor, projection: Tensor
) -> dict[str, Tensor]:
    """Return the maps from a kind's patches to a stream's tokens and back, with spare channels filled.

    Those of the encoder, and those of the decoder that hold no context, get further directions of the patches. They are
    not in the latent, but the layers can use them.
    """
    width, context = stream_widths(config)[stream], len(context_channels(config)[stream])
    further = _further_directions(kind.factor[part], embedding, width - len(embedding))
    to_tokens = _padded(torch.cat((embedding, further)), width)
    unseen = projection.new_zeros(len(projection), context)
    from_tokens = _padded(torch.cat((projection, unseen, further.T), dim=1).T, width)[:width].T
    mean = kind.mean[part]
    encoder, decoder = (f"{side}.{kind.name}.{stream}" for side in ("encoder.embedding", "decoder.projection"))
    return {
        f"{encoder}.weight": to_tokens,
        f"{encoder}.bias": -to_tokens @ mean,
        f"{decoder}.weight": from_tokens,
        f"{decoder}.bias": mean,
    }


def _further_directions(factor: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return up to `count` directions with the most variance in what `rows` leave of vectors, as rows."""
    count = min(count, factor.shape[0] - len(rows))
    if count <= 0:
        return rows[:0]
    basis = torch.linalg.svd(rows, full_matrices=False)[2]
    return _leading_directions(factor - basis.T @ (basis @ factor), count).T


def _leading_directions(factor: Tensor, count: int) -> Tensor:
    """Return the first left singular vectors of `(S, K)`, by the eigenvectors of the smaller product with itself."""
    if len(factor) <= factor.shape[1]:
        return torch.linalg.eigh(factor @ factor.T)[1].flip(1)[:, :count]
    leading = factor @ torch.linalg.eigh(factor.T @ factor)[1].flip(1)[:, :count]
    return leading / torch.linalg.vector_norm(leading, dim=0).clamp_min(1e-300)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Append rows of zeros up to a number."""
    return torch.cat((rows, rows.new_zeros(max(0, count - len(rows)), rows.shape[1])))


def _spread(matrix: Tensor, widths: dict[str, int], bases: dict[str, Tensor]) -> Tensor:
    """Move columns for the streams' first features, `(Z, d)`, to where those stand among all features, `(Z, D)`."""
    parts = matrix.split([basis.shape[1] for basis in bases.values()], dim=1)
    return torch.cat([_padded(part.T, widths[stream]) for stream, part in zip(bases, parts, strict=True)]).T
