"""Every file in configs/: built on the meta device, trained briefly at a tiny size, and as the paper describes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from leanvae.checkpoint import build_vae
from leanvae.config import ConfigError, load_config, merge
from leanvae.training.build import build_networks
from leanvae.training.config import TrainImageConfig, TrainVideoConfig
from litevae.discriminators import PatchDiscriminator, StyleDiscriminator, UNetDiscriminator
from litevae.unet import NAFNet, VisionTransformer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
VIDEO_ABLATIONS = sorted((CONFIGS / "ablations" / "video").glob("*.yaml"))
IMAGE_ABLATIONS = sorted((CONFIGS / "ablations" / "image").glob("*.yaml"))

TINY = ["training.engine=plain", "losses.perceptual=none", "training.batch_size=2", "optimizer.warmup_steps=0"]
TINY_GAN = ["gan.start_step=0", "gan.warmup_steps=0", "gan.discriminator.base_channels=8"]
TINY_VIDEO = ["model.low_channels=8", "model.high_channels=24", "data.num_frames=5", "training.max_steps=3"]
TINY_VIDEO += ["training.tokens_per_batch=null", "training.tokens_per_micro_batch=null"]
TINY_BUCKETS = ("5x32x32", "1x24x32")
TINY_IMAGE = [
    *(f"model.{part}_channels=8" for part in ("extraction", "aggregation", "encoder", "decoder")),
    "model.num_res_blocks=1",
]
SIZES = {64: 16, 128: 24, 256: 32}  # of the tiny runs, by the resolution in the file


def config_class(path):
    names = path.stem, path.parent.name
    return TrainVideoConfig if names[0].startswith(("lean", "demo")) or names[1] == "video" else TrainImageConfig


def load(path, overrides=()):
    return load_config(config_class(path), path, overrides)


def tiny(path, *overrides):
    """A configuration as in the file, for a network of a few channels and images of a few pixels."""
    config = load(path)
    overrides = [*TINY, *(TINY_GAN if config.gan else []), *overrides]
    if isinstance(config, TrainVideoConfig):
        overrides += [*TINY_VIDEO, "data.resolution=[32,32]", "training.micro_batch_size=1"]
        if config.phases:
            short = {"steps": 2, "buckets": list(TINY_BUCKETS)}
            small = [phase.model_dump(mode="json") | short for phase in config.phases]
            overrides += [f"phases={json.dumps(small)}", "training.max_steps=null"]
        return load(path, overrides)
    resolutions = [(phase.resolution or config.data.resolution)[0] for phase in config.stretches]
    phases = [{"resolution": SIZES[resolution], "steps": 2, "batch": 2} for resolution in resolutions]
    if config.model.aggregation == "vit":
        overrides.append("model.vit_grid=[3,3]")
    return load(path, [*overrides, *TINY_IMAGE, f"phases={phases}"])


def train(config, num_steps=None):
    """Trains on random pixels; returns the step and the logs of all steps."""
    take_step, _ = build_networks(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    logs = []
    for step in range(num_steps or config.curriculum.max_steps):
        buckets = list(config.curriculum.phases[config.curriculum.number_at(step)].batches)
        size = pixel_size(buckets[step % len(buckets)])
        pixels = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
        logs.append(take_step(pixels, [0, 1], step))
    return take_step, logs


def pixel_size(bucket):
    """Size of a clip, or of an image."""
    return bucket.resolution if bucket.is_image else (bucket.frames, *bucket.resolution)


def meta_model(config):
    with torch.device("meta"):
        return build_vae(config.model)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_builds_its_model_at_its_sizes(path):
    config = load(path)
    vae = meta_model(config)
    for bucket in {bucket for phase in config.curriculum.phases for bucket in phase.batches}:
        size = pixel_size(bucket)
        with torch.device("meta"):
            reconstruction, posterior = vae(torch.empty(1, 3, *size), torch.empty(1, *vae.latent_shape(size)))
        assert reconstruction.shape == (1, 3, *size)
        assert posterior.mean.shape[1] == config.model.latent_channels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_configuration_trains_at_a_tiny_size(path):
    config = tiny(path)
    assert config.curriculum.max_steps >= 2
    take_step, logs = train(config, max(3, config.curriculum.max_steps))
    assert all(torch.tensor(list(entry.values())).isfinite().all() for entry in logs)
    assert ("discriminator" in logs[-1]) == (config.gan is not None)
    weights = dict(take_step.vae.module.named_parameters())
    fresh = dict(build_networks(config, torch.device("cpu"))[0].vae.module.named_parameters())
    assert any(not torch.equal(weights[name], fresh[name]) for name in weights)


def test_configurations_keep_their_runs_apart():
    outputs = [load(path).training.output for path in FILES]
    assert len(set(outputs)) == len(outputs)


def differences(config, base):
    """Dotted names of the settings that differ."""

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    ours, theirs = dict(flat(config.model_dump())), dict(flat(base.model_dump()))
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} - {"training.output"}


def base_of(path):
    return path.parent / yaml.safe_load(path.read_text())["base"]


def test_the_main_configurations_differ_in_what_their_names_say():
    base = load(CONFIGS / "lean_17f.yaml")
    assert differences(load(CONFIGS / "lean_17f_published.yaml"), base) == {"model.decoder_norm", "training.start"}
    assert differences(load(CONFIGS / "lean_17f_c16.yaml"), base) == {"model.latent_channels"}
    for size in "sbml":
        narrow, wide = load(CONFIGS / f"lite_{size}_f8c4.yaml"), load(CONFIGS / f"lite_{size}_f8c12.yaml")
        assert differences(wide, narrow) == {"model.latent_channels"}
        preset = type(narrow.model).preset(size.upper(), decoder_norm="smc")
        assert narrow.model == preset
    sd = load(CONFIGS / "sdvae_f8c4.yaml")
    assert differences(sd, load(CONFIGS / "lite_b_f8c4.yaml")) == {
        "model.encoder",
        "model.latent_conv",
        "model.decoder_norm",
    }


@pytest.mark.parametrize("path", VIDEO_ABLATIONS, ids=lambda path: path.stem)
def test_video_ablations_differ_from_the_published_model_alone(path):
    changed = differences(load(path), load(CONFIGS / "lean_17f_published.yaml"))
    assert changed
    assert all(name.startswith("model.") for name in changed)


def norms_outside_attention(decoder):
    return [name for name, m in decoder.named_modules() if isinstance(m, nn.GroupNorm) and "attention" not in name]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def trained_with(*names):
    """A check that the loss has these terms, and that its base has not."""

    def check(config, base):
        (_, logs), (_, base_logs) = train(config, 1), train(base, 1)
        assert set(names) <= logs[0].keys()
        assert not set(names) & base_logs[0].keys()

    return check


def has_discriminator(kind):
    def check(config, base):
        assert isinstance(train(base, 1)[0].discriminator.module, UNetDiscriminator)
        assert isinstance(train(config, 1)[0].discriminator.module, kind)

    return check


def has_model(check_models):
    def check(config, base):
        check_models(build_vae(config.model), build_vae(base.model))

    return check


def has_self_modulated_decoder(vae, base):
    assert not norms_outside_attention(vae.decoder)
    assert norms_outside_attention(base.decoder)


def has_no_encoder(vae, base):
    assert parameters(vae.encoder) == 0 < parameters(base.encoder)


def has_latent_conv(vae, base):
    assert parameters(vae) - parameters(base) == 8 * 8 + 8 + 4 * 4 + 4


def has_nafnet(vae, base):
    assert all(isinstance(network, NAFNet) for network in vae.encoder.extraction.values())


def has_one_extractor(vae, base):
    assert len(base.encoder.extraction) == 3
    assert 3 * parameters(vae.encoder.extraction) == parameters(base.encoder.extraction)


def has_vit(vae, base):
    assert isinstance(vae.encoder.aggregation, VisionTransformer)


def has_two_levels(vae, base):
    assert list(vae.encoder.extraction) == ["level2", "level3"]


def has_logistic_loss(config, base):
    """Check that both losses of the first step are logistic: near ln 2 each for a network that returns about 0."""
    (_, logs), (_, base_logs) = train(config, 1), train(base, 1)
    assert logs[0]["discriminator"] == pytest.approx(2 * 0.69, abs=0.2)  # two outputs
    assert base_logs[0]["discriminator"] == pytest.approx(2 * 1.0, abs=0.2)


# By table: the settings that may differ from the base, and what that must do.
TABLES = {
    "t04_smc": ({"model.decoder_norm"}, has_model(has_self_modulated_decoder)),
    "t05_256_full": ({"phases"}, None),
    "t05_128_full": ({"phases"}, None),
    "t08_adaptive_weight": ({"gan.weighting", "gan.weight"}, trained_with("adaptive_weight")),
    "t09_gaussian_loss": ({"losses.gaussian"}, trained_with("gaussian")),
    "t09_wavelet_loss": ({"losses.gaussian", "losses.wavelet"}, trained_with("gaussian", "wavelet")),
    "t10_patchgan": ({"gan.discriminator.kind"}, has_discriminator(PatchDiscriminator)),
    "t10_stylegan": ({"gan.discriminator.kind"}, has_discriminator(StyleDiscriminator)),
    "t11_t12_dwt": ({"model.encoder", "model.latent_channels", "model.latent_conv"}, has_model(has_no_encoder)),
    "t12_dwt2": ({"model.encoder", "model.latent_channels", "model.latent_conv"}, has_model(has_no_encoder)),
    "t14_esrgan": ({"losses.lpips", "losses.vgg"}, None),  # trained below, with a backbone
    "t15_ldl": ({"losses.ldl"}, trained_with("ldl")),
    "t16_logistic": ({"gan.loss", "gan.generator_loss"}, has_logistic_loss),
    "t17_latent_conv": ({"model.latent_conv"}, has_model(has_latent_conv)),
    "t18_nafnet": ({"model.extraction"}, has_model(has_nafnet)),
    "t19_shared_extraction": ({"model.shared_extraction"}, has_model(has_one_extractor)),
    "t20_vit": ({"model.aggregation"}, has_model(has_vit)),
    "t21_two_levels": ({"model.levels"}, has_model(has_two_levels)),
    "t22_sdvae_256_full": ({"phases"}, None),
    "t22_sdvae_128_full": ({"phases"}, None),
}


def test_every_table_has_its_rows():
    assert {path.stem for path in IMAGE_ABLATIONS} == set(TABLES)


@pytest.mark.parametrize("path", IMAGE_ABLATIONS, ids=lambda path: path.stem)
def test_image_ablations_change_what_their_table_says(path):
    settings, check = TABLES[path.stem]
    assert differences(load(path), load(base_of(path))) == settings
    if check:
        check(tiny(path), tiny(base_of(path)))


@pytest.mark.parametrize(("table", "base"), [("t05", "lite_b_f8c4"), ("t22_sdvae", "sdvae_f8c4")])
def test_resolutions_of_the_curriculum_are_those_of_its_tables(table, base):
    def phases(path):
        return [(phase.resolution, phase.steps) for phase in load(path).stretches]

    folder = CONFIGS / "ablations" / "image"
    assert phases(CONFIGS / f"{base}.yaml") == [((128, 128), 100_000), ((256, 256), 50_000)]
    assert phases(folder / f"{table}_128_full.yaml") == [((128, 128), 150_000)]
    assert phases(folder / f"{table}_256_full.yaml") == [((256, 256), 150_000)]


def test_esrgan_ablation_trains_on_features_of_vgg19(tmp_path):
    from litevae.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from torchvision.models import vgg19

    torch.manual_seed(0)
    torch.save(vgg19(weights=None).features.state_dict(prefix="features."), tmp_path / "vgg19.pth")
    path = CONFIGS / "ablations" / "image" / "t14_esrgan.yaml"
    backbone = [f"losses.vgg_backbone={tmp_path / 'vgg19.pth'}", "losses.perceptual=required"]
    _, logs = train(tiny(path, *backbone), 1)
    assert logs[0]["vgg"] > 0
    assert "lpips" not in logs[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps=3"], r"training\.steps: unknown key; expected one of max_steps, batch_size"),
        (["gan.discriminator.width=3"], r"gan\.discriminator\.width: unknown key; expected one of kind, base_channels"),
        (["optimizer.betas=[0.5,1.5]"], r"optimizer\.betas\.1: got 1\.5: .*less than 1"),
        (["training.batch_size=0"], r"training\.batch_size: got 0"),
        (["model.bottleneck=vq"], r"model\.bottleneck: got 'vq'.*'ista' or 'linear'"),
        (["training.batch_size"], "expected key.path=value"),
        (["training.seed.low=1"], r"training\.seed is 0, not a mapping"),
        (["training.seed=[1"], "not valid YAML"),
        (["deepspeed.zero_optimisation.stage=3"], r"deepspeed\.zero_optimisation: unknown key"),
        (["deepspeed.fp16.enabled=true"], r"deepspeed\.fp16: training in float16 is not supported"),
        (["data.num_frames=16"], r"data\.num_frames is 16: model\.patch_size needs 4n \+ 1"),
        (["gan.weighting=adaptive"], r"gan\.weighting: the video model has no single last layer"),
        (["gan.log_gradient_ratio=true"], r"gan\.log_gradient_ratio: the video model"),
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
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("data:\n  a: 1\n  b: 2\n  a: 3", "'a' stands twice, in lines 2 and 4"),
        ("- 1", "expected a mapping"),
        ("!!python/object:os.x {}", "YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(TrainVideoConfig, tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(TrainVideoConfig, tmp_path / "none.yaml")


IMAGE_CONFIG = CONFIGS / "lite_b_f8c4.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["losses.gaussian.weight=-1"], r"losses\.gaussian is 1\.0, not a mapping"),
        (["losses.gaussian=-1"], r"losses\.gaussian\.weight: got -1"),
        (
            ["losses.gaussian={weight: 1, start: 3}"],
            r"losses\.gaussian\.start: unknown key; expected one of weight, start_step",
        ),
        (["phases=[{resolution: 128}]"], r"phases\.0\.steps: missing"),
        (["phases=[{resolution: 100, steps: 1}]"], r"resolution \(100, 100\) is not divisible by .* \(8, 8\)"),
        (["model.aggregation=vit"], r"model\.vit_grid is \(16, 16\): images of \(256, 256\) need \(32, 32\)"),
        (["model.encoder=dwt"], "set latent_channels to 12"),
        (["data.num_frames=5"], r"data\.num_frames: unknown key; expected one of sources"),
    ],
)
def test_bad_image_overrides_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainImageConfig, IMAGE_CONFIG, overrides)


def test_terms_of_the_loss_start_when_they_should():
    config = load_config(TrainImageConfig, IMAGE_CONFIG, ["losses.gaussian={weight: 0.5, start_step: 10}"])
    assert (config.losses.gaussian.at(9), config.losses.gaussian.at(10)) == (0.0, 0.5)
    tree = config.model_dump(mode="json")["losses"]
    assert tree["gaussian"] == {"weight": 0.5, "start_step": 10}
    assert tree["l1"] == 1.0


def test_defaults_of_images_are_those_of_the_paper():
    config = TrainImageConfig()
    assert config.optimizer.learning_rate == config.optimizer.final_learning_rate == 1e-4
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.training.batch_size == 16
    assert config.curriculum.max_steps == 200_000
    assert config.gan.discriminator.kind == "unet"
    assert (
        TrainImageConfig.model_validate({"gan": {"discriminator": {"base_channels": 8}}}).gan.discriminator.kind
        == "unet"
    )
    assert TrainImageConfig.model_validate({"gan": None}).gan is None


def test_a_base_is_merged_key_by_key(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("model: {latent_channels: 8, streams: joint}\ngan: {weight: 0.5}\n")
    (tmp_path / "sub" / "over.yaml").write_text("base: ../base.yaml\nmodel: {latent_channels: 16}\ngan: null\n")
    config = load_config(TrainVideoConfig, tmp_path / "sub" / "over.yaml", ["model.low_channels=4"])
    assert (config.model.latent_channels, config.model.streams, config.model.low_channels) == (16, "joint", 4)
    assert config.gan is None
    assert merge({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": 2}) == {"a": [3], "b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", r"none\.yaml \(the base of .*over\.yaml\): cannot be read"),
        ("base: over.yaml", "is its own base"),
        ("base: 3", "base: expected the path of a YAML file, got 3"),
    ],
)
def test_bad_bases_are_refused(tmp_path, text, message):
    (tmp_path / "over.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(TrainVideoConfig, tmp_path / "over.yaml")
