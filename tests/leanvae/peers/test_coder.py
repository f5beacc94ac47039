"""Frames through other projects' models: padded to what they take, cropped back, in chunks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leanvae.coder import FrameCoder, Seams
from leanvae.media.info import Frame
from leanvae.peers.coder import PeerCoder, make_reconstructor
from leanvae.peers.models import Lengths, Model
from litevae import LiteVAE, LiteVAEConfig
from litevae.errors import NotFinite


class Recorder(nn.Module):
    """A model that returns its input, and records its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return x

    def decode(self, latent: Tensor) -> Tensor:
        return latent


def _frames(count: int, height: int = 18, width: int = 30) -> list[Frame]:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Frame(image, None, 0.0) for image in images]


def _model(kind: Any) -> Model:
    return Model("recorder", kind, Recorder, "here", frames=Lengths(1, 4))


@pytest.mark.parametrize(
    ("kind", "chunk", "shapes"),
    [
        ("video", None, [(1, 3, 9, 24, 32)]),
        ("video", 5, [(1, 3, 5, 24, 32), (1, 3, 5, 24, 32)]),
        ("image", None, 7 * [(1, 3, 24, 32)]),
        ("image", 2, 7 * [(1, 3, 24, 32)]),
    ],
)
def test_frames_come_back_as_they_were(kind: str, chunk: int | None, shapes: list[tuple[int, ...]]) -> None:
    frames, vae = _frames(7), Recorder()
    coder = PeerCoder(_model(kind), vae, chunk)
    parts = list(coder.reconstruct(iter(frames)))
    assert vae.shapes == shapes
    assert [frame for part in parts for frame in part.frames] == frames
    for part in parts:
        torch.testing.assert_close(part.output, part.reference, atol=1e-6, rtol=0)
    assert parts[0].latent is not None
    assert parts[0].latent.shape[0] == 3
    assert coder.seams(7, 18, 30) == Seams(frames=frozenset({5} if chunk == 5 else ()))


def test_what_is_not_finite_is_refused() -> None:
    class Broken(Recorder):
        def decode(self, latent: Tensor) -> Tensor:
            return latent / 0

    with pytest.raises(NotFinite, match="the decoder's output is not finite"):
        list(PeerCoder(_model("video"), Broken()).reconstruct(_frames(2)))


def test_our_own_models_are_streamed() -> None:
    with torch.device("meta"):
        vae = LiteVAE(LiteVAEConfig.preset("S"))
    assert isinstance(make_reconstructor(_model("image"), vae), FrameCoder)
    assert isinstance(make_reconstructor(_model("image"), Recorder()), PeerCoder)
