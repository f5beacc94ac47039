"""Each file goes to a bucket by its own shape; the notation of buckets is strict."""

import pytest

from leanvae.config import ConfigError, parse_config
from leanvae.data.buckets import Shape, choose_bucket, parse_bucket
from leanvae.data.config import ClipDataConfig, ImageDataConfig

BUCKETS = [Shape(17, 256, 256), Shape(17, 192, 320), Shape(33, 128, 128)]


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [
        (Shape(20, 720, 1280), Shape(17, 192, 320)),  # nearest aspect ratio
        (Shape(500, 720, 1280), Shape(17, 192, 320)),
        (Shape(20, 300, 300), Shape(17, 256, 256)),
        (Shape(20, 1280, 720), Shape(17, 256, 256)),  # of a portrait the square loses least
        (Shape(100, 144, 176), Shape(33, 128, 128)),  # the others would enlarge it
        (Shape(20, 144, 176), Shape(17, 256, 256)),  # all that it has frames for enlarge it
        (Shape(20, 100, 176), Shape(17, 192, 320)),
    ],
)
def test_files_go_where_they_lose_least(shape, bucket):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        assert BUCKETS[choose_bucket(shape, BUCKETS, name)] == bucket


def test_buckets_of_one_aspect_share_files_by_name():
    chosen = [choose_bucket(Shape(100, 512, 512), BUCKETS, f"clip_{number}.mp4") for number in range(200)]
    assert 70 < chosen.count(0) < 130
    assert chosen.count(0) + chosen.count(2) == 200
    assert chosen == [choose_bucket(Shape(90, 300, 300), BUCKETS, f"clip_{number}.mp4") for number in range(200)]


@pytest.mark.parametrize("shape", [None, Shape(3, 720, 1280)])
def test_what_is_unknown_or_too_short_goes_where_the_fewest_frames_are(shape):
    chosen = {choose_bucket(shape, BUCKETS[::-1], f"{number}.mp4") for number in range(20)}
    assert chosen <= {1, 2}


def test_notation():
    assert parse_bucket("17x256x320") == Shape(17, 256, 320)
    assert parse_bucket("192x320") == parse_bucket("1x192x320") == Shape(1, 192, 320)
    assert str(Shape(17, 256, 320)) == "17x256x320"
    config = ClipDataConfig(buckets=("17x256x256",))
    assert ClipDataConfig.model_validate_json(config.model_dump_json()) == config
    for text, message in [
        ("256", "expected FRAMESxHEIGHTxWIDTH, as in 17x256x256, got '256'"),
        ("17x0x256", "must be at least 1, got '17x0x256'"),
        ("axbxc", "expected FRAMESxHEIGHTxWIDTH"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_bucket(text)


@pytest.mark.parametrize(
    ("config_class", "tree", "message"),
    [
        (ClipDataConfig, {"buckets": ["17x256x256", "17x256x256"]}, "each bucket may be given once"),
        (ImageDataConfig, {"buckets": ["5x64x64"]}, "5x64x64 is for clips; images have one frame"),
        (ImageDataConfig, {"sources": [{"path": "a", "kind": "clips"}]}, "trained on images, not on clips"),
        (ClipDataConfig, {"sources": [{"path": "a", "kind": "films"}]}, "'clips' or 'images'"),
        (
            ClipDataConfig,
            {"stride": [3, 2]},
            r"stride: got .* expected a positive number, or \[lowest, highest\], got \[3, 2\]",
        ),
        (ClipDataConfig, {"fps": 0}, "fps: got 0.*expected a positive number"),
        (ClipDataConfig, {"fps": 8, "stride": 2}, "stride and fps: both say which frames are taken"),
    ],
)
def test_wrong_settings_say_what_is_wrong(config_class, tree, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(config_class, tree, "run.yaml")
