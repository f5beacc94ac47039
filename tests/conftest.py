"""Fixtures that several test files share."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the tensors are small, and other processes may want the other cores


@pytest.fixture(scope="session")
def write_clip():
    """A function that writes a small real mp4 of moving gradients."""

    def write(path, num_frames=20, height=48, width=64, seed=0, rate=25):
        generator = np.random.default_rng(seed)
        phase, speed = generator.uniform(0, 6, 3), generator.uniform(0.1, 0.5, 3)
        rows, columns = np.mgrid[:height, :width] / 8.0
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(rate))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(num_frames):
                image = np.stack(
                    [127 + 120 * np.sin(rows * (c + 1) / 2 + columns + phase[c] + speed[c] * index) for c in range(3)],
                    -1,
                )
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


class SharedPool:
    """A pool of decoder processes that closing does not end."""

    def __init__(self, pool):
        self.submit = pool.submit

    def __enter__(self):
        return self

    def close(self, *_):
        pass

    __exit__ = close


@pytest.fixture(scope="session")
def pool():
    """A decoder process, which takes a while to start."""
    from leanvae.media.pool import DecoderPool

    with DecoderPool(1, 30.0) as pool:
        yield pool


@pytest.fixture
def one_pool(pool, monkeypatch):
    """All loaders of a test share that process."""
    from leanvae.data import loader

    shared = SharedPool(pool)
    monkeypatch.setattr(loader, "DecoderPool", lambda *_: shared)
    return shared
