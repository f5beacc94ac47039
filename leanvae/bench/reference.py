"""A straightforward implementation of LeanVAE's maths, as a reference for speed; it computes the same as `LeanVAE`.

It is ours, written from the paper's description: a separate wavelet transform, then patches and their linear maps;
channel-first copies around each depthwise convolution; each feedforward on all tokens at once. It reads the weights of
a model of the published architecture that is not prepared for inference.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from leanvae.naf import PAST_FRAMES


def encode(vae: Any, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance `(B, Z, T', H', W')` of a clip whose size the patches divide."""
    tokens = vae.encoder.embedding(clip)
    features = torch.cat([_layers(*pair) for pair in zip(vae.encoder.streams.values(), tokens, strict=True)], dim=-1)
    features = _layers(vae.encoder.fusion, features)
    return (features @ vae.bottleneck.phi.T).movedim(-1, 1), vae.logvar(features).movedim(-1, 1)


def decode(vae: Any, latent: Tensor) -> Tensor:
    """Decode a latent."""
    bottleneck, z = vae.bottleneck, latent.movedim(1, -1)
    x = z @ bottleneck.initial.T
    for step, threshold, forward, backward in zip(
        bottleneck.steps,
        bottleneck.thresholds,
        bottleneck.forward_transforms,
        bottleneck.backward_transforms,
        strict=True,
    ):
        r = x - step * ((x @ bottleneck.phi.T - z) @ bottleneck.phi)
        h = _layers(forward, r)
        h = h.sign() * (h.abs() - threshold).relu()
        x = r + _layers(backward, h)
    features = _layers(vae.decoder.fusion, x)
    parts = features.split(vae.decoder.widths, dim=-1)
    return vae.decoder.projection([_layers(*pair) for pair in zip(vae.decoder.streams.values(), parts, strict=True)])


def _layers(stack: Any, x: Tensor) -> Tensor:
    for conv, feedforward in zip(stack.convs, stack.feedforwards, strict=True):
        y = _convolve(conv, x)
        x = x + y if stack.residual else y
        y = _feed_forward(feedforward, x)
        x = x + y if stack.residual else y
    return x


def _convolve(conv: Any, x: Tensor) -> Tensor:
    frames = rearrange(x, "b t h w d -> b d t h w").contiguous()
    frames = F.pad(frames, (1, 1, 1, 1, PAST_FRAMES, 0))
    y = F.conv3d(frames, conv.weight, conv.bias, groups=x.shape[-1])
    return rearrange(y, "b d t h w -> b t h w d").contiguous()


def _feed_forward(feedforward: Any, x: Tensor) -> Tensor:
    value, gate = feedforward.expand(feedforward.norm(x)).chunk(2, dim=-1)
    return feedforward.contract(value * F.gelu(gate))
