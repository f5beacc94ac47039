"""What reconstructs frames, whatever it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from leanvae.metrics.artefacts import Parts

Observe = Callable[[Tensor], None]


def _whole(height: int, width: int) -> Parts:
    """Frames are worked on whole, and clips are not cut."""
    return Parts()


@dataclass(frozen=True)
class Coder:
    """Something that encodes and decodes frames.

    Attributes:
        name: what it is called in tables; different from others in a run.
        source: where it comes from, in words.
        stamp: changes when its weights do.
        period: side in pixels of the patches or blocks that it works on.
        run: frames `(3, H, W)` in [0, 1], one by one, to their reconstructions `(n, 3, H, W)`, clamped to [0, 1], as
            many and in order; each latent `(Z, T', H', W')` is handed to the function given last.
        parts: how it works on frames of a height and width in parts.
    """

    name: str
    source: str
    stamp: str
    period: int
    run: Callable[[Iterable[Tensor], Observe], Iterator[Tensor]]
    parts: Callable[[int, int], Parts] = _whole
