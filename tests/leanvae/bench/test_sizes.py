"""Sizes on the command line, and the sizes that models take."""

import pytest

from leanvae.bench.sizes import parse_frames, parse_resolution, resolution_name
from leanvae.peers.models import Lengths, Size
from leanvae.peers.registry import choose


@pytest.mark.parametrize(
    ("text", "area"), [("256", (256, 256)), ("480x640", (480, 640)), ("1080p", (1080, 1920)), ("4K", (2160, 3840))]
)
def test_resolutions_are_read(text: str, area: tuple[int, int]) -> None:
    assert parse_resolution(text) == area
    assert parse_resolution(resolution_name(*area)) == area


@pytest.mark.parametrize("text", ["", "12q", "0", "256x0", "x256", "-5", "2k"])
def test_unknown_resolutions_list_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r": expected .*HEIGHTxWIDTH.*480p, 720p, 1080p, 4k"):
        parse_resolution(text)


@pytest.mark.parametrize("text", ["0", "x", "1.5", "-1"])
def test_unknown_frames_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_frames(text)


@pytest.mark.parametrize("lengths", [Lengths(1, 4), Lengths(24, 16), Lengths(8, 8), Lengths(4, 4, lead=3)])
def test_a_fit_is_the_smallest_length_that_gives_one_back(lengths: Lengths) -> None:
    taken = [lengths.first + lengths.step * index for index in range(500)]
    for length in range(1, 500):
        assert lengths.fit(length) == min(candidate for candidate in taken if candidate - lengths.lead >= length)


def test_sizes_are_written_with_frames_first() -> None:
    assert (str(Size(17, 64, 128)), str(Size(1, 64, 128))) == ("17x64x128", "64x128")


def test_unknown_names_list_what_there_is_and_the_nearest() -> None:
    assert choose("dtype", "float32", ["float32", "bfloat16"]) == "float32"
    with pytest.raises(ValueError, match=r"dtype 'float23' .*did you mean float32.*expected one of float32, bfloat16"):
        choose("dtype", "float23", ["float32", "bfloat16"])
