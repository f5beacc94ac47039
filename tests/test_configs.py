"""Every file in configs/: valid, built on the meta device, and run on a tiny clip."""

from pathlib import Path

import pytest
import torch

from leanvae import LeanVAE
from leanvae.config import ConfigError, load_config
from leanvae.training.config import TrainVideoConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_trains_a_model_that_runs(path):
    config = load_config(TrainVideoConfig, path)
    with torch.device("meta"):
        vae = LeanVAE(config.model)
        size = (config.data.num_frames, *config.data.resolution)
        clip = torch.empty(1, 3, *size)
        reconstruction, posterior = vae(clip, torch.empty(1, *vae.latent_shape(size)))
    assert reconstruction.shape == clip.shape
    assert posterior.mean.shape[1] == config.model.latent_channels
    small = config.model.model_copy(update={"low_channels": 8, "high_channels": 24})
    vae = LeanVAE(small)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert vae.decode(vae.encode(clip).mode(), (5, 16, 16)).isfinite().all()


def test_configurations_keep_their_runs_apart():
    outputs = [load_config(TrainVideoConfig, path).training.output for path in FILES]
    assert len(set(outputs)) == len(outputs)


def test_the_main_configurations_differ_in_what_their_names_say():
    base = load_config(TrainVideoConfig, CONFIGS / "lean_17f.yaml")
    published = load_config(TrainVideoConfig, CONFIGS / "lean_17f_published.yaml")
    wide = load_config(TrainVideoConfig, CONFIGS / "lean_17f_c16.yaml")
    assert published.model == base.model.model_copy(update={"decoder_norm": "layer"})
    assert wide.model == base.model.model_copy(update={"latent_channels": 16})
    for other in (published, wide):
        assert (other.data, other.losses, other.gan, other.optimizer) == (
            base.data,
            base.losses,
            base.gan,
            base.optimizer,
        )


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_ablations_differ_from_the_published_model(path):
    config = load_config(TrainVideoConfig, path)
    published = load_config(TrainVideoConfig, CONFIGS / "lean_17f_published.yaml")
    assert config.model != published.model
    same = {"model": published.model, "training": published.training}
    assert config.training == published.training.model_copy(update={"output": config.training.output})
    assert config.model_copy(update=same) == published


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps=3"], r"training\.steps: unknown key; there are max_steps, batch_size"),
        (["gan.discriminator.width=3"], r"gan\.discriminator\.width: unknown key; there are kind, base_channels"),
        (["optimizer.betas=[0.5,1.5]"], r"optimizer\.betas\.1: got 1\.5: .*less than 1"),
        (["training.batch_size=0"], r"training\.batch_size: got 0"),
        (["model.bottleneck=vq"], r"model\.bottleneck: got 'vq'.*'ista' or 'linear'"),
        (["training.batch_size"], "expected key.path=value"),
        (["training.seed.low=1"], r"training\.seed is 0, not a mapping"),
        (["training.seed=[1"], "no valid YAML"),
        (["deepspeed.zero_optimisation.stage=3"], r"deepspeed\.zero_optimisation: unknown key"),
        (["deepspeed.fp16.enabled=true"], r"deepspeed\.fp16: training in float16 is not supported"),
        (["data.num_frames=16"], r"data\.num_frames is 16: model\.patch_size needs 4n \+ 1"),
    ],
)
def test_bad_overrides_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainVideoConfig, CONFIGS / "lean_17f.yaml", overrides)


def test_overrides_reach_lists_and_new_blocks():
    overrides = ["data.sources=[{path: a, weight: 2}, {path: b, weight: 1}]", "deepspeed.bf16.enabled=true", "gan=null"]
    config = load_config(TrainVideoConfig, CONFIGS / "lean_17f.yaml", overrides)
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert config.deepspeed["bf16"] == {"enabled": True}
    assert config.gan is None


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "no valid YAML"), ("- 1", "expected a mapping"), ("!!python/object:os.x {}", "YAML")]
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(TrainVideoConfig, tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(TrainVideoConfig, tmp_path / "none.yaml")
