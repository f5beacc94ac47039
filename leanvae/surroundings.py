"""What lies around a network's tokens: where a convolution finds its neighbours.

Only the convolutions mix positions, so only they need to know whether they see a whole clip, frames that continue one,
or a tile of a frame (`leanvae.inference.tiles`). The network is stated once and gets this as its argument `around`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PAST_FRAMES = 2  # that a 3x3x3 kernel looks back

Past = tuple[
    Tensor, ...
]  # the last frames that each convolution read, `(B, 2, H, W, D)`, in the order in which they run


class Whole:
    """The surroundings of a whole clip: nothing."""

    def convolve(self, conv: Any, x: Tensor, residual: bool) -> Tensor:
        """Convolve tokens `(B, T, H, W, D)`; `residual` adds them to the result."""
        return conv(x, residual=residual)

    def side_by_side(self, stacks: Iterable[Any], tokens: list[Tensor]) -> list[Tensor]:
        """Run each stack of layers on its tokens; the list is overwritten, so that no stack's input outlives it."""
        for index, stack in enumerate(stacks):
            tokens[index] = stack(tokens[index], around=self)
        return tokens

    def hold(self, x: Tensor, num_convs: int) -> Any:
        """Keep tokens until after `num_convs` more convolutions; `here` returns them."""
        return x

    def here(self, held: Any) -> Tensor:
        """Return the part of held tokens at the tokens' current place."""
        return held


class Chunk(Whole):
    """The surroundings of frames that continue a clip.

    Args:
        past: `next_past` of the previous frames; empty at the start of the clip.

    Attributes:
        next_past: the past of the next frames, complete after the network has run.
    """

    def __init__(self, past: Sequence[Tensor] = ()) -> None:
        self.past = past
        self.next_past: list[Tensor] = []

    def convolve(self, conv: Any, x: Tensor, residual: bool) -> Tensor:
        """Convolve tokens after those of the past."""
        past = self.past[len(self.next_past)] if self.past else x.new_zeros(len(x), PAST_FRAMES, *x.shape[2:])
        self.next_past.append(last_frames(past, x))
        return conv(x, past, residual)


WHOLE = Whole()


def last_frames(past: Tensor, x: Tensor) -> Tensor:
    """Copy the last frames of tokens `(B, T, H, W, D)` that follow their past `(B, 2, H, W, D)`."""
    return torch.cat((past, x[:, -PAST_FRAMES:]), dim=1)[:, -PAST_FRAMES:].clone()
