"""The `data:` block says what is wrong with it, and survives its own dump."""

import pytest

from leanvae.config import ConfigError, parse_config
from leanvae.data.config import ClipDataConfig, ImageDataConfig, source_weights


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_frames": -3}, "num_frames: got -3"),
        ({"resolution": [0, 64]}, "resolution: got .*at least 1 pixel"),
        ({"resolution": [64]}, "resolution"),
        ({"sources": "clips"}, "sources: got 'clips': .*list of paths"),
        ({"sources": []}, "sources"),
        ({"sources": [{"path": "a", "weight": 0}]}, r"sources.0.weight: got 0"),
        ({"sources": [{"path": "a", "weight": 2}, "b"]}, "every source a weight or none; 'b' has none"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"strides": 2}, "strides: unknown key"),
    ],
)
def test_config_errors_name_the_key_and_the_rule(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ClipDataConfig, tree, "run.yaml")


def test_config_takes_paths_and_weights_and_survives_its_own_dump():
    config = ClipDataConfig.model_validate({"sources": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]})
    assert source_weights(config, [10, 20]) == [2.0, 1.0]
    assert source_weights(ClipDataConfig(sources=["a", "b"]), [10, 20]) == [10.0, 20.0]
    assert ClipDataConfig.model_validate(config.model_dump(mode="json")) == config
    assert ClipDataConfig().sources[0].path == "builtin"


def test_configurations_differ_by_kind_and_take_one_number_for_both_sides():
    assert ImageDataConfig.model_validate({"resolution": 128}).resolution == (128, 128)
    assert ClipDataConfig.model_validate({"resolution": [64, 96]}).resolution == (64, 96)
    config = ImageDataConfig(resolution=(128, 64))
    assert ImageDataConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="num_frames: unknown key"):
        parse_config(ImageDataConfig, {"num_frames": 5}, "run.yaml")
    for bad in (0, [64], True, "large", 1.5):
        with pytest.raises(ConfigError, match="resolution"):
            parse_config(ImageDataConfig, {"resolution": bad}, "run.yaml")
