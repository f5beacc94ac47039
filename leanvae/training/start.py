"""A start in closed form: the network as the best linear codec of its shape, the truncated Karhunen-Loeve transform.

LeanVAE is an identity with residual branches round linear maps. With its branches closed it is linear: patches to tokens,
tokens to the latent, and back. Of all linear maps through Z numbers, projection on the Z leading principal components of
the patches loses least (Eckart and Young, 1936), so training starts there and not at noise.

Image frames and groups of video frames have principal components of their own. Each stream of tokens carries its part of
them; see `linear_maps`.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvae.bottleneck import ISTABottleneck
from leanvae.config import LeanVAEConfig
from leanvae.inference.prepare import FOLDABLE, analysis_matrix, synthesis_matrix
from leanvae.model import LeanVAE
from leanvae.naf import NAFLayers
from leanvae.patchify import COLOURS, image_and_video_patches, stream_widths, to_bands, to_patches
from litevae.smc import SelfModulatedLinear

CLOSED_GAIN = 1e-3  # of a self-modulated map that closes a branch: 0 would keep its weight from learning
START_LOGVAR = -6.0  # of latents with variance 1
_KINDS = ("image", "video")


@dataclass
class PatchStatistics:
    """Sums over patch vectors, whose means and covariances follow from them.

    Attributes:
        count: number of vectors.
        total: `(S,)` float64, their sum.
        products: `(S, S)` float64, the sum of their outer products.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of_size(cls, size: int) -> "PatchStatistics":
        """Those of no vectors of this size."""
        return cls(0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))

    def add(self, vectors: Tensor) -> None:
        """Adds vectors `(N, S)`."""
        vectors = vectors.double()
        self.count += len(vectors)
        self.total += vectors.sum(0).cpu()
        self.products += (vectors.T @ vectors).cpu()

    @property
    def mean(self) -> Tensor:
        """`(S,)` float64."""
        return self.total / max(1, self.count)

    @property
    def covariance(self) -> Tensor:
        """`(S, S)` float64."""
        return self.products / max(1, self.count) - torch.outer(self.mean, self.mean)


@dataclass
class ClipStatistics:
    """Statistics of the patches of image frames and of groups of video frames.

    Attributes:
        image, video: of each kind.
    """

    image: PatchStatistics
    video: PatchStatistics

    @classmethod
    def for_model(cls, config: LeanVAEConfig) -> "ClipStatistics":
        """Those of no clips."""
        sizes = [sum(map(patches.vector_size, patches.channels)) for patches in image_and_video_patches(config)]
        return cls(*map(PatchStatistics.of_size, sizes))

    def add(self, pixels: Tensor, config: LeanVAEConfig) -> None:
        """Adds clips `(B, 3, T, H, W)` in [-1, 1] whose sizes the patches divide."""
        bands = to_bands(pixels * config.data_scale, config.wavelet)
        for frames, patches, statistics in zip(
            bands, image_and_video_patches(config), (self.image, self.video), strict=True
        ):
            if frames is not None:
                parts = [to_patches(part, patches.shape) for part in patches.of_streams(frames)]
                statistics.add(torch.cat(parts, dim=-1).flatten(0, 3))


def principal_components(covariance: Tensor, count: int) -> Tensor:
    """The leading eigenvectors of a covariance `(S, S)` as rows, `(count, S)`; rows of zeros beyond S."""
    leading = _leading(covariance, count).T
    # An eigenvector's sign is arbitrary: its largest element is made positive, on every machine.
    signs = leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()
    return _padded(leading * signs, count)


def start_linear(model: LeanVAE, statistics: ClipStatistics) -> None:
    """Makes a model the best linear codec of patches with these statistics, in place.

    Raises:
        ValueError: the model has norms between patches and tokens, so that it has no linear skeleton.
    """
    if model.config.patch_norm:
        raise ValueError("patch_norm: norms between patches and tokens leave no linear skeleton")
    with torch.no_grad():
        close_branches(model)
        state = dict(model.named_parameters())
        for name, value in linear_maps(model.config, statistics).items():
            state[name].copy_(value)
        model.logvar.weight.zero_()
        model.logvar.bias.fill_(START_LOGVAR)


def close_branches(model: LeanVAE) -> None:
    """Closes the residual branches of a model and the learned transforms of its bottleneck, in place.

    The maps that a branch ends with are zero or nearly; the others are left to be learned.
    """
    for part in (model.encoder, model.decoder):
        for stack in (module for module in part.modules() if isinstance(module, NAFLayers)):
            for conv in stack.convs:
                nn.init.zeros_(conv.weight)
            for feedforward in stack.feedforwards:
                _close(feedforward.contract)
    if isinstance(model.bottleneck, ISTABottleneck):
        for stack in model.bottleneck.backward_transforms:
            _close(stack.feedforwards[-1].contract)


def _close(linear: nn.Module) -> None:
    if isinstance(linear, SelfModulatedLinear):
        nn.init.constant_(linear.gain, CLOSED_GAIN)
    else:
        nn.init.zeros_(linear.weight)


@dataclass
class _Kind:
    """One kind of patches, image or video.

    Attributes:
        name: of the kind.
        share: of all tokens.
        mean, covariance: of its patch vectors, `(S,)` and `(S, S)`.
        components: their principal components, `(Z, S)`, perhaps turned among themselves.
        parts: elements of the vectors by stream.
    """

    name: str
    share: float
    mean: Tensor
    covariance: Tensor
    components: Tensor
    parts: dict[str, slice]


def linear_maps(config: LeanVAEConfig, statistics: ClipStatistics) -> dict[str, Tensor]:
    """The linear maps of the best linear codec, by the names of a model's parameters, in float64.

    The principal components V (Z, S) of a kind of patches are cut by stream into V_s. With n streams, a stream's first
    features are sqrt(n) V_s (x_s - mean), and the latent is their sum over sqrt(n), and back likewise. So the latent is
    V (x - mean), scaled to variance 1 over the tokens of both kinds. A stream that is narrower than Z keeps the
    directions with the most variance, and the decoder does what is best with those.
    """
    num_latent, widths = config.latent_channels, stream_widths(config)
    kinds = _kinds(config, statistics)
    root = math.sqrt(len(widths))
    bases = {
        stream: torch.eye(num_latent, dtype=torch.float64)
        if width >= num_latent
        else _leading(
            sum(
                kind.share * _inner(kind.components[:, part], kind.covariance[part, part])
                for kind in kinds
                for part in [kind.parts[stream]]
            ),
            width,
        )
        for stream, width in widths.items()
    }
    down = torch.cat([basis / root for basis in bases.values()], dim=1)
    up = torch.linalg.solve(down @ down.T, down).T  # down @ up = 1, which the gradient step of ISTA-Net+ leaves alone
    is_exact = all(basis.shape[1] == num_latent for basis in bases.values())
    maps: dict[str, Tensor] = {}
    variance = torch.zeros(num_latent, dtype=torch.float64)
    for kind in kinds:
        embedding = {stream: root * basis.T @ kind.components[:, kind.parts[stream]] for stream, basis in bases.items()}
        to_latent = down @ torch.block_diag(*embedding.values())
        latent_covariance = _inner(to_latent, kind.covariance)
        variance += kind.share * latent_covariance.diagonal()
        rows = 0
        for stream, weight in embedding.items():
            part, back = kind.parts[stream], up[rows : rows + len(weight)]
            rows += len(weight)
            projection = weight.T
            if not is_exact:
                observed = _inner(back, latent_covariance)
                projection = (kind.covariance @ to_latent.T)[part] @ back.T @ torch.linalg.pinv(observed)
            further = _further_directions(kind, part, weight, widths[stream])
            names = [f"{side}.{kind.name}.{stream}" for side in ("encoder.embedding", "decoder.projection")]
            weight = _padded(torch.cat((weight, further)), widths[stream])
            maps[f"{names[0]}.weight"] = weight
            maps[f"{names[0]}.bias"] = -weight @ kind.mean[part]
            maps[f"{names[1]}.weight"] = _padded(torch.cat((projection, further.T), dim=1).T, widths[stream]).T
            maps[f"{names[1]}.bias"] = kind.mean[part]
    scale = torch.where(variance > 1e-12 * variance.max(), variance, 1.0).sqrt()
    down, up = down / scale[:, None], up * scale
    latent = _spread(down, bases, widths), _spread(up.T, bases, widths).T
    if config.bottleneck == "ista":
        return maps | {"bottleneck.phi": latent[0], "bottleneck.initial": latent[1]}
    zeros = {"bottleneck.down.bias": torch.zeros(num_latent), "bottleneck.up.bias": torch.zeros(len(latent[1]))}
    return maps | {"bottleneck.down.weight": latent[0], "bottleneck.up.weight": latent[1]} | zeros


def _kinds(config: LeanVAEConfig, statistics: ClipStatistics) -> list[_Kind]:
    """The kinds of which there are any, image frames turned to mean the same as video frames."""
    found = []
    counts = {name: getattr(statistics, name).count for name in _KINDS}
    for name, patches in zip(_KINDS, image_and_video_patches(config), strict=True):
        sums: PatchStatistics = getattr(statistics, name)
        if sums.count:
            sizes = [patches.vector_size(stream) for stream in patches.channels]
            ends = list(itertools.accumulate(sizes))
            parts = {s: slice(end - size, end) for s, size, end in zip(patches.channels, sizes, ends, strict=True)}
            share = counts[name] / sum(counts.values())
            components = principal_components(sums.covariance, config.latent_channels)
            found.append(_Kind(name, share, sums.mean, sums.covariance, components, parts))
    if len(found) == 2 and config.wavelet in FOLDABLE:
        image, video = found
        # What a group of frames that all show an image would be in the video's components (Procrustes).
        still = _still_vectors(config)
        left, _, right = torch.linalg.svd(video.components @ still @ image.components.T)
        image.components = left @ right @ image.components
    return found


def _still_vectors(config: LeanVAEConfig) -> Tensor:
    """The map from an image's patch vector to that of video frames which all show it, `(S video, S image)`."""
    image, video = image_and_video_patches(config)
    frames, height, width = video.pixels
    pixels = synthesis_matrix(image, config.wavelet).view(COLOURS, 1, height, width, -1)
    repeated = pixels.expand(-1, frames, -1, -1, -1).flatten(0, 3)
    return torch.cat([analysis_matrix(video, stream, config.wavelet) for stream in video.channels]) @ repeated


def _inner(matrix: Tensor, covariance: Tensor) -> Tensor:
    """The covariance of `matrix @ x`."""
    return matrix @ covariance @ matrix.T


def _leading(covariance: Tensor, count: int) -> Tensor:
    """The directions with the most variance, as columns."""
    return torch.linalg.eigh(covariance)[1].flip(1)[:, :count]


def _further_directions(kind: _Kind, part: slice, weight: Tensor, width: int) -> Tensor:
    """Directions with the most variance in what a stream's first features leave of its vectors, as rows.

    They are not in the latent; the layers can use them.
    """
    count = min(width, weight.shape[1]) - len(weight)
    if count <= 0:
        return weight[:0]
    basis = torch.linalg.svd(weight, full_matrices=False)[2]
    rest = torch.eye(weight.shape[1], dtype=torch.float64) - basis.T @ basis
    return _leading(_inner(rest, kind.covariance[part, part]), count).T


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows of zeros after the given ones, to a number."""
    return torch.cat((rows, rows.new_zeros(count - len(rows), rows.shape[1])))


def _spread(matrix: Tensor, bases: dict[str, Tensor], widths: dict[str, int]) -> Tensor:
    """Columns by the streams' first features, `(Z, M)`, where those stand among all features, `(Z, D)`."""
    parts = matrix.split([basis.shape[1] for basis in bases.values()], dim=1)
    return torch.cat(
        [F.pad(part, (0, width - part.shape[1])) for part, width in zip(parts, widths.values(), strict=True)], 1
    )
