"""Fine-tuning: the weights that a new run takes from a file, and those that it freezes."""

from pathlib import Path

import pytest
import torch
import yaml

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from leanvae.config import ConfigError
from leanvae.training.build import build_autoencoder, build_networks
from leanvae.training.config import TrainVideoConfig
from leanvae.training.dry_run import _memory
from leanvae.training.initial import frozen_names, load_initial
from leanvae.training.loop import train
from leanvae.training.step import update_average
from litevae import LiteVAE, LiteVAEConfig

PUBLISHED = Path(__file__).parents[1] / "golden" / "official_small.ckpt"
CPU = torch.device("cpu")
SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
DECODER_ONLY = ["encoder.*", "bottleneck.phi", "logvar.*"]
SETTINGS = {
    "model": SMALL,
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "held_out": 0.3},
    "losses": {"perceptual": "none"},
    "gan": None,
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
    "training": {"engine": "plain", "max_steps": 2, "batch_size": 2, "validate_every": 100},
}


def config_with(model=None, **training):
    tree = {**SETTINGS, "model": SMALL | (model or {}), "training": SETTINGS["training"] | training}
    return TrainVideoConfig.model_validate(tree)


def dry_run(config):
    return list(_memory(config, 1))


@pytest.fixture
def save(tmp_path):
    """A function that saves a small model unlike those that a run draws, and returns its folder and itself."""

    def save(**fields):
        torch.manual_seed(7)
        model = LeanVAE(LeanVAEConfig(**SMALL | fields))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "trained")
        return tmp_path / "trained", model

    return save


def differing(a, b):
    """Names of the weights that two models share by name and shape, but not by value."""
    there, here = dict(a.named_parameters()), dict(b.named_parameters())
    return {name for name in there.keys() & here.keys() if not torch.equal(there[name], here[name])}


def test_weights_of_the_same_architecture_are_all_taken(save):
    folder, trained = save()
    model = LeanVAE(LeanVAEConfig(**SMALL))
    fit = load_initial(model, folder)
    assert fit.is_complete
    assert fit.share == 1.0
    assert not differing(trained, model)


def test_published_checkpoints_are_taken():
    trained = load_vae(PUBLISHED)
    model = LeanVAE(trained.config)
    assert load_initial(model, PUBLISHED).is_complete
    assert not differing(trained, model)


def test_another_latent_width_starts_the_latents_anew_and_nothing_else(save):
    folder, trained = save(latent_channels=4)
    model = LeanVAE(LeanVAEConfig(**SMALL, latent_channels=16))
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit = load_initial(model, folder)
    assert set(fit.new) == {"bottleneck.phi", "bottleneck.initial", "logvar.weight", "logvar.bias"}
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in fit.new)
    assert set(fit.loaded) == before.keys() - fit.new.keys()
    assert all(torch.equal(model.get_parameter(name), trained.get_parameter(name)) for name in fit.loaded)
    text = str(fit)
    assert "bottleneck.phi starts fresh: 4x24 in the file, 16x24 here" in text
    assert "latent_channels: 4 -> 16" in text


def test_self_modulated_maps_take_nothing_from_plain_ones(save):
    folder, trained = save(decoder_norm="layer")
    model = LeanVAE(LeanVAEConfig(**SMALL, decoder_norm="smc"))
    fit = load_initial(model, folder)
    assert (
        "of a Linear in the file, of a SelfModulatedLinear here"
        in fit.new["decoder.fusion.feedforwards.0.expand.weight"]
    )
    assert fit.new["decoder.fusion.feedforwards.0.expand.gain"] == "it is not in the file"
    assert fit.unused["decoder.fusion.feedforwards.0.norm.weight"] == "the model has none"
    assert all("feedforwards" in name for name in [*fit.new, *fit.unused])
    assert differing(trained, model) == {name for name in fit.new if name.endswith("weight")}


def test_what_shares_nothing_is_refused(tmp_path):
    small = {f"{part}_channels": 8 for part in ("extraction", "aggregation", "decoder")}
    LiteVAE(LiteVAEConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"a LiteVAE of which nothing fits this LeanVAE"):
        load_initial(LeanVAE(LeanVAEConfig(**SMALL)), tmp_path)


def test_missing_and_spoilt_files_are_named(save, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.initial_weights: no checkpoint at .*nowhere"):
        load_initial(LeanVAE(LeanVAEConfig(**SMALL)), tmp_path / "nowhere")
    folder, trained = save()
    trained.bottleneck.phi.data[0, 0] = torch.inf
    trained.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"trained: bottleneck\.phi is not finite"):
        load_initial(LeanVAE(LeanVAEConfig(**SMALL)), folder)


def test_patterns_name_parameters():
    model = LeanVAE(LeanVAEConfig(**SMALL))
    names = [name for name, _ in model.named_parameters()]
    assert frozen_names(model, []) == []
    assert frozen_names(model, ["encoder.*"]) == [name for name in names if name.startswith("encoder.")]
    assert frozen_names(model, ["logvar.bias", "*.phi"]) == ["bottleneck.phi", "logvar.bias"]
    with pytest.raises(ConfigError, match=r"'encodr\.\*' matches no parameter.*encoder, bottleneck, logvar, decoder"):
        frozen_names(model, ["encoder.*", "encodr.*"])
    with pytest.raises(ConfigError, match="nothing to train"):
        frozen_names(model, ["*"])


@pytest.mark.parametrize(
    ("always", "phases", "message"),
    [
        (
            ["encoder.*", "bottleneck.*", "logvar.*"],
            [[], ["decoder.*"]],
            r"phases\.1\.freeze: decoder\.\* and training",
        ),
        (["encoder.*", "decoder.fusion.*"], [[], ["bottleneck.*", "logvar.*", "decoder.*"]], "leave nothing to train"),
        (
            [],
            [[], [], ["encoder.*", "bottleneck.*", "logvar.*", "decoder.*"]],
            r"phases\.2\.freeze: .* nothing to train",
        ),
        ([], [["encodr.*"]], r"phases\.0\.freeze: 'encodr\.\*' matches no parameter"),
    ],
)
@pytest.mark.parametrize("begin", [lambda config: build_autoencoder(config, resumes=False), dry_run])
def test_a_phase_that_freezes_all_that_is_left_is_refused_before_the_run(always, phases, message, begin):
    stretches = [{"steps": 2, "freeze": patterns} for patterns in phases]
    tree = {**SETTINGS, "phases": stretches, "training": {**SETTINGS["training"], "freeze": always, "max_steps": None}}
    with pytest.raises(ConfigError, match=message):
        begin(TrainVideoConfig.model_validate(tree))


def test_a_frozen_encoder_has_no_backward_pass():
    model = build_autoencoder(config_with(freeze=DECODER_ONLY), resumes=False)
    posterior = model.encode(torch.rand(1, 3, 5, 32, 32))
    assert not posterior.mean.requires_grad
    assert not posterior.logvar.requires_grad
    assert model.decode(posterior.mode()).requires_grad


def test_frozen_parameters_stay_and_the_average_starts_from_the_file(save):
    folder, trained = save()
    config = config_with(freeze=DECODER_ONLY, initial_weights=str(folder), gradient_clipping=0.0)
    take_step, average = build_networks(config, CPU)
    assert all(torch.equal(average[name], value) for name, value in trained.named_parameters())
    pixels = torch.randint(0, 256, (2, 3, 5, 32, 32), dtype=torch.uint8)
    for step in range(2):
        take_step(pixels, [0, 1], step)
        update_average(average, take_step.vae.full_weights(), 0.5)
    frozen = set(frozen_names(take_step.vae.module, DECODER_ONLY))
    weights = dict(take_step.vae.module.named_parameters())
    for found in (weights, average):
        moved = {name for name, value in trained.named_parameters() if not torch.equal(found[name], value)}
        assert not moved & frozen
        assert moved == weights.keys() - frozen
    optimized = [id(weight) for group in take_step.vae._optimizer.param_groups for weight in group["params"]]
    assert {name for name, weight in weights.items() if id(weight) in optimized} == weights.keys() - frozen


@pytest.mark.integration
def test_a_run_that_resumes_needs_no_initial_weights(save, tmp_path, write_clip, caplog):
    folder, _ = save(latent_channels=2)
    (tmp_path / "clips").mkdir()
    for index in range(4):
        write_clip(tmp_path / "clips" / f"clip{index}.mp4", seed=index)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(SETTINGS))

    def run(*overrides):
        settings = [f"data.sources=[{tmp_path / 'clips'}]", "training.freeze=[encoder.*]", *overrides]
        return train(TrainVideoConfig, tmp_path / "train.yaml", settings, tmp_path / "out")

    with caplog.at_level("INFO", logger="leanvae"):
        assert run(f"training.initial_weights={folder}") == 0
    assert "bottleneck.phi starts fresh: 2x24 in the file, 4x24 here" in caplog.text
    assert "parameters are frozen" in caplog.text
    (folder / "model.safetensors").unlink()
    assert run(f"training.initial_weights={folder}", "training.max_steps=3") == 0
    with pytest.raises(ConfigError, match=r"another training\.freeze"):
        run("training.freeze=[decoder.*]", "training.max_steps=4")
