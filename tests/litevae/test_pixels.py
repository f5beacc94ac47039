"""What models accept as pixels."""

import pytest
import torch

from litevae.errors import InvalidInput
from litevae.pixels import check_pixels


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (255 * torch.linspace(0, 1, 192), r"from 0 to 255: expected pixels in \[-1, 1\].*x / 127\.5 - 1"),
        (65535 * torch.linspace(0, 1, 192), r"from 0 to 6\.554e\+04: .*x / 32767\.5 - 1"),
        (torch.linspace(0, 2, 192), r"from 0 to 2: .*x / 127\.5 - 1"),
        (torch.linspace(-2.1, 2.6, 192), r"from -2\.1 to 2\.6: expected pixels in \[-1, 1\]$"),
        (torch.linspace(-9, 0, 192).bfloat16(), r"from -9 to 0: expected pixels in \[-1, 1\]$"),
        (torch.arange(192, dtype=torch.uint8), r"torch\.uint8 and values from 0 to 191: .*x\.float\(\) / 127\.5 - 1"),
        (torch.arange(192) - 5, r"torch\.int64 and values from -5 to 186"),
        (torch.zeros(192, dtype=torch.bool), r"torch\.bool"),
        (torch.zeros(192, dtype=torch.complex64), r"torch\.complex64"),
        (torch.full((192,), float("nan")), "not finite"),
        (torch.full((192,), float("-inf")), "not finite"),
    ],
)
def test_values_that_are_no_pixels_are_refused_with_what_helps(x, message):
    with pytest.raises(InvalidInput, match=message):
        check_pixels(x.reshape(1, 3, 8, 8))


@pytest.mark.parametrize("x", [torch.linspace(-1, 1, 192), torch.linspace(0, 1, 192), torch.linspace(-1.3, 1.3, 192)])
def test_pixels_and_what_resizing_makes_of_them_pass(x):
    check_pixels(x.reshape(1, 3, 8, 8))
    check_pixels(x.reshape(1, 3, 1, 8, 8).bfloat16())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"x\[None\] makes it a batch of one"),
        ((3, 5, 8, 8), r"x\[None\] makes it a batch of one"),
        ((1, 8, 8, 3), r"x\.movedim\(-1, 1\) brings its colours there"),
        ((1, 5, 8, 8, 3), r"x\.movedim\(-1, 1\) brings its colours there"),
        ((1, 5, 3, 8, 8), r"x\.transpose\(1, 2\) swaps time and colours"),
        ((1, 4, 8, 8), r"expected \(B, 3, H, W\) or \(B, 3, T, H, W\)$"),
        ((0, 3, 8, 8), "each at least 1"),
        ((1, 3, 0, 8, 8), "each at least 1"),
    ],
)
def test_other_shapes_are_refused_with_what_helps(shape, message):
    with pytest.raises(InvalidInput, match=message):
        check_pixels(torch.zeros(shape))
