"""The clips that a file is cut into, and their place within its frames, against counting by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from leanvae.data.buckets import Shape
from leanvae.data.samples import Cut, cut_picture
from leanvae.latents.clips import ClipRule, place


def test_clips_touch_unless_told_otherwise():
    rule = ClipRule(frames=5, stride=2)
    assert rule.span == 9
    assert [index for index in range(30) if rule.starts_at(index)] == [0, 9, 18, 27]
    assert [index for index in range(10) if ClipRule(frames=5, every=4).starts_at(index)] == [0, 4, 8]
    assert [index for index in range(10) if ClipRule().starts_at(index)] == [0]


def test_whole_files_have_no_distance_between_clips():
    with pytest.raises(ValidationError, match="also give the frames of a clip"):
        ClipRule(every=4)


def test_resolutions_are_of_pictures():
    with pytest.raises(ValidationError, match="expected HEIGHTxWIDTH, got 17x64x64"):
        ClipRule(resolutions=("17x64x64",))


@pytest.mark.parametrize("size", [(48, 64), (121, 161), (64, 48), (33, 200)])
@pytest.mark.parametrize("resolution", [(32, 32), (16, 48), (300, 200)])
def test_placement_is_what_cutting_does(size, resolution):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    placement = place(size, [Shape(1, *resolution)], "clip.mp4")
    whole = cut_picture(image, placement.resized, Cut())
    top, left = placement.crop
    expected = whole[top : top + resolution[0], left : left + resolution[1]]
    assert whole.shape[:2] == placement.resized
    np.testing.assert_array_equal(cut_picture(image, resolution, Cut()), expected)


def test_files_go_to_the_resolution_of_their_shape():
    resolutions = [Shape(1, 64, 64), Shape(1, 48, 80), Shape(1, 80, 48)]
    assert place((480, 800), resolutions, "wide.mp4").resolution == (48, 80)
    assert place((800, 480), resolutions, "high.mp4").resolution == (80, 48)
    assert place((100, 100), resolutions, "square.mp4").resolution == (64, 64)
    assert place((121, 161), [], "odd.mp4").resolution == (121, 161)
