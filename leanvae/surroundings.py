"""What lies around the tokens that a network works on: where a convolution finds its neighbours.

The convolutions alone mix positions, so they alone need to know whether they see a whole clip, frames that continue
one, or a tile of a frame (`leanvae.inference.tiles`). The network is stated once and is told by its argument `around`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

PAST_FRAMES = 2  # that a 3x3x3 kernel looks back

Past = tuple[Tensor, ...]  # by convolution, in the order in which they run: the last frames read, `(B, 2, H, W, D)`


class Whole:
    """A whole clip: nothing lies around it."""

    def convolve(self, conv: Any, x: Tensor, residual: bool) -> Tensor:
        """Convolves tokens `(B, T, H, W, D)`; `residual` adds them to the result."""
        return conv(x, residual=residual)

    def side_by_side(self, stacks: Iterable[Any], tokens: list[Tensor]) -> list[Tensor]:
        """Runs each stack of layers on its tokens; the list is used up, so that no stack's input outlives it."""
        for index, stack in enumerate(stacks):
            tokens[index] = stack(tokens[index], around=self)
        return tokens

    def hold(self, x: Tensor, num_convs: int) -> Any:
        """Keeps tokens to be read after this many convolutions; `here` gives them back."""
        return x

    def here(self, held: Any) -> Tensor:
        """Gives the part of held tokens that lies where the tokens are by now."""
        return held


class Chunk(Whole):
    """Frames that continue a clip.

    Args:
        past: `next_past` of the frames before; empty at the start of the clip.

    Attributes:
        next_past: the past of the frames after these, complete once the network has run.
    """

    def __init__(self, past: Sequence[Tensor] = ()) -> None:
        self.past = past
        self.next_past: list[Tensor] = []

    def convolve(self, conv: Any, x: Tensor, residual: bool) -> Tensor:
        """Convolves tokens behind those of the past."""
        past = self.past[len(self.next_past)] if self.past else x.new_zeros(len(x), PAST_FRAMES, *x.shape[2:])
        self.next_past.append(last_frames(past, x))
        return conv(x, past, residual)


WHOLE = Whole()


def last_frames(past: Tensor, x: Tensor) -> Tensor:
    """Copies the last frames of tokens `(B, T, H, W, D)` that follow their past `(B, 2, H, W, D)`."""
    return torch.cat((past, x[:, -PAST_FRAMES:]), dim=1)[:, -PAST_FRAMES:].clone()
