"""Baselines return the frames that they get, in order, and hold few of them."""

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from leanvae.evaluation.baselines import make_baseline
from leanvae.media.info import Frame
from leanvae.metrics.frames import psnr

SPECS = ["identity", "jpeg:90", "h264:10", "bicubic:2"]


def _frames(count: int, height: int = 48, width: int = 64) -> Iterator[Frame]:
    """Frames with motion that differ enough to be told apart."""
    y, x = np.mgrid[:height, :width]
    for index in range(count):
        waves = [np.sin((x + 3 * index) / 9), np.cos((y - index) / 7), np.sin((x + y) / 11)]
        image = 127.5 + 60 * np.stack(waves, axis=-1) + 40 * (index % 5 - 2) / 2
        yield Frame(image.round().astype(np.uint8), index, index / 25)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("count", "height", "width"), [(1, 48, 64), (60, 48, 64), (7, 37, 51)])
def test_each_output_is_of_its_frame(spec: str, count: int, height: int, width: int) -> None:
    frames = list(_frames(count, height, width))
    baseline = make_baseline(spec)
    parts = list(baseline.reconstruct(iter(frames)))
    given = [frame for part in parts for frame in part.frames]
    assert all(ours is theirs for ours, theirs in zip(given, frames, strict=True))
    values = torch.cat([psnr(part.output, part.reference) for part in parts])
    assert values.min() > 25
    assert all(part.latent is None for part in parts)
    assert not any(baseline.seams(count, height, width))


@pytest.mark.parametrize("spec", SPECS)
def test_few_frames_are_held(spec: str) -> None:
    num_read = most = num_given = 0

    def read() -> Iterator[Frame]:
        nonlocal num_read
        for frame in _frames(150):
            num_read += 1
            yield frame

    for part in make_baseline(spec).reconstruct(read()):
        num_given += len(part.frames)
        most = max(most, num_read - num_given)
    assert num_given == 150
    assert most <= (48 if spec.startswith("h264") else 0)


def test_h264_writes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file is made")

    for module, name in ((tempfile, "mkdtemp"), (tempfile, "mkstemp"), (os, "open")):
        monkeypatch.setattr(module, name, refuse)
    assert len(list(make_baseline("h264:30").reconstruct(_frames(3)))) == 3


def test_no_frames_give_no_output() -> None:
    for spec in SPECS:
        assert list(make_baseline(spec).reconstruct([])) == []
