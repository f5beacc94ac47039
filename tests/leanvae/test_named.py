"""Weights by name: those of a package, of which the tests make their own, and which names are looked for where."""

import logging
from pathlib import Path

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig, load_vae, named
from leanvae.cli import main as cli
from leanvae.cli.flags import DEFAULT_CHECKPOINT
from leanvae.evaluation.candidates import load_candidates
from leanvae.peers.registry import find_model
from litevae.errors import InvalidInput, MissingFile

SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
PURPOSE = "clips for tests; never for anything else"


def model(seed: int = 0) -> LeanVAE:
    torch.manual_seed(seed)
    return LeanVAE(LeanVAEConfig(**SMALL)).eval()


@pytest.fixture(autouse=True)
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package's weights, with the default ones and others, both in half precision."""
    folder = tmp_path / "weights"
    for seed, name in enumerate((DEFAULT_CHECKPOINT, "other")):
        model(seed).save_pretrained(folder / name, torch.float16)
    card = folder / DEFAULT_CHECKPOINT / "README.md"
    card.write_text(card.read_text().replace("library_name", f"description: {PURPOSE}\nlibrary_name"))
    (folder / "no_weights").mkdir()
    monkeypatch.setattr(named, "PACKAGED", folder)
    logger = logging.getLogger("leanvae")  # to which the command line adds a handler
    for attribute, value in (("handlers", []), ("level", logger.level), ("propagate", True)):
        monkeypatch.setattr(logger, attribute, value)
    monkeypatch.chdir(tmp_path)
    return folder


def test_packaged_weights_load_by_name_in_single_precision(packaged: Path) -> None:
    vae, half = load_vae(DEFAULT_CHECKPOINT), model().half().state_dict()
    assert vae.config == LeanVAEConfig(**SMALL)
    for name, value in vae.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, half[name].float())
    assert named.packaged_names() == [DEFAULT_CHECKPOINT, "other"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_type_that_is_asked_for_wins(dtype: torch.dtype) -> None:
    assert {weight.dtype for weight in load_vae(DEFAULT_CHECKPOINT, dtype=dtype).parameters()} == {dtype}


def test_other_stored_types_stay(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "brain", torch.bfloat16)
    assert {weight.dtype for weight in load_vae(tmp_path / "brain").parameters()} == {torch.bfloat16}


def test_path_that_exists_goes_before_names(tmp_path: Path) -> None:
    model(7).save_pretrained(tmp_path / DEFAULT_CHECKPOINT)
    assert torch.equal(load_vae(DEFAULT_CHECKPOINT).logvar.weight, model(7).logvar.weight)
    model(8).save_pretrained(tmp_path / "someone" / "lean")
    assert torch.equal(load_vae("someone/lean").logvar.weight, model(8).logvar.weight)


@pytest.mark.parametrize(
    "name", ["lean-smal-c16", "no_weights", "./someone/lean", "../lean", "/a/b", "runs/mine/latest", "a/b@", "~/lean"]
)
def test_wrong_name_lists_what_there_is(name: str) -> None:
    message = rf"^no checkpoint at {name}: expected a folder or file .*\({DEFAULT_CHECKPOINT}, other\), or OWNER/NAME"
    with pytest.raises(MissingFile, match=message):
        load_vae(name)


def test_paths_are_never_taken_for_names() -> None:
    for path in (Path(DEFAULT_CHECKPOINT), Path("someone/lean")):
        with pytest.raises(MissingFile, match=r"^no checkpoint at"):
            load_vae(path)


@pytest.mark.parametrize(
    ("name", "repo", "file", "revision"),
    [
        ("Yumic/LeanVAE", "Yumic/LeanVAE", None, None),
        ("Yumic/LeanVAE@v1.0", "Yumic/LeanVAE", None, "v1.0"),
        ("Yumic/LeanVAE/LeanVAE-dim4.ckpt", "Yumic/LeanVAE", "LeanVAE-dim4.ckpt", None),
        ("a_b/c.d-e/sub/f.ckpt@refs/pr/1", "a_b/c.d-e", "sub/f.ckpt", "refs/pr/1"),
    ],
)
def test_names_of_the_hub_are_taken_apart(
    monkeypatch: pytest.MonkeyPatch, name: str, repo: str, file: str | None, revision: str | None
) -> None:
    asked = []
    (Path("folder")).mkdir()

    def download(*arguments: str | None) -> Path:
        asked.append(arguments)
        Path("folder/config.json").write_text('{"model": "LeanVAE"}')
        return Path("folder", file or "config.json")

    monkeypatch.setattr(named, "download", download)
    named.find_weights(name)
    assert asked[0] == (repo, file or "config.json", revision)


def test_line_says_what_weights_are_good_for(packaged: Path) -> None:
    assert named.weights_line(DEFAULT_CHECKPOINT) == f"weights: {DEFAULT_CHECKPOINT}: {PURPOSE}"
    assert named.weights_line("other") == "weights: other"
    assert named.weights_line(packaged / "other") == f"weights: {packaged / 'other'}"


@pytest.mark.parametrize("flags", [["clip.mp4"], ["--input", "clip.mp4"]])
def test_reconstruct_takes_the_packaged_weights_by_default(write_clip, capsys, tmp_path: Path, flags) -> None:
    write_clip(tmp_path / "clip.mp4", num_frames=5)
    assert cli.main(["reconstruct", *flags, "--output", "out"]) == 0
    assert capsys.readouterr().err.splitlines().count(f"weights: {DEFAULT_CHECKPOINT}: {PURPOSE}") == 1
    assert (tmp_path / "out" / "clip.recon.mp4").is_file()
    assert f'"checkpoint": "{DEFAULT_CHECKPOINT}"' in (tmp_path / "out" / "metrics.json").read_text()


@pytest.mark.parametrize("flags", [[], ["clip.mp4", "--input", "clip.mp4"]])
def test_reconstruct_takes_one_input(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["reconstruct", *flags, "--output", "out"])
    assert exit_.value.code == 2
    assert "--input" in capsys.readouterr().err


def test_stores_are_made_and_decoded_with_the_packaged_weights_by_default(write_clip, capsys, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", num_frames=5)
    assert cli.main(["encode_clips", "--input", "clip.mp4", "--output", "store", "--workers", "1"]) == 0
    assert cli.main(["decode_latents", "--input", "store", "--output", "out"]) == 0
    assert capsys.readouterr().err.splitlines().count(f"weights: {DEFAULT_CHECKPOINT}: {PURPOSE}") == 2
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
    flags = ["--input", "clip.mp4", "--output", "again", "--update-checkpoint"]
    assert cli.main(["encode_clips", *flags]) == 2  # the package's own files stay as they are


def test_evaluation_and_benchmark_know_the_names() -> None:
    (candidate,) = load_candidates([DEFAULT_CHECKPOINT])
    assert candidate.name == candidate.source == DEFAULT_CHECKPOINT
    assert "model.safetensors" in candidate.stamp
    assert find_model(DEFAULT_CHECKPOINT).has_weights
    with pytest.raises(InvalidInput, match=f"{DEFAULT_CHECKPOINT}, other"):
        find_model("lean-smal-c16")
