"""Analysis of images with tiny random models: tables, plots, and unfit images."""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.cli.analyse import add_arguments, measures_table, run
from leanvae.evaluation.analysis import analyse, analyse_models, model_names, shrink_square
from leanvae.evaluation.analysis_record import Autoencoder, ModelRecord, Study
from leanvae.media.image import read_image
from leanvae.media.writer import write_png
from leanvae.metrics.frames import psnr, ssim
from litevae import LiteVAE, LiteVAEConfig
from litevae.analysis import feature_imbalance
from litevae.errors import NotFinite, WorkIncomplete
from litevae.perceptual import find_backbone

SMALL: dict[str, Any] = {
    "extraction_channels": 4,
    "extraction_multipliers": (1,),
    "aggregation_channels": 4,
    "aggregation_multipliers": (1,),
    "num_res_blocks": 1,
    "decoder_channels": 8,
    "decoder_multipliers": (1, 1, 1, 1),
}
STUDY = Study(resolutions=(16, 32, 64), size=32, sigmas=(5.0, 50.0), num_pictures=2)
# Width, height: one is too small for 64, one for all but 16.
SIZES = {"a.png": (64, 70), "b.png": (96, 64), "c.png": (40, 50), "d.png": (20, 90)}


def _lite(**fields: Any) -> LiteVAE:
    torch.manual_seed(0)
    return LiteVAE(LiteVAEConfig(**SMALL | fields)).eval()


def _lean() -> LeanVAE:
    torch.manual_seed(0)
    config = LeanVAEConfig(
        low_channels=4, high_channels=4, num_stream_layers=1, num_fusion_layers=1, ista_iterations=1, ista_layers=1
    )
    return LeanVAE(config).eval()


@pytest.fixture(scope="module")
def models() -> Mapping[str, Autoencoder]:
    return {"group": _lite(), "smc": _lite(decoder_norm="smc", output_type="wavelet"), "lean": _lean()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inputs = tmp_path / "images"
    inputs.mkdir()
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin((x + 9 * number) / 9), np.cos(y / 7), np.sin((x + y) / 11)]
        write_png(inputs / name, (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8))
    return inputs


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _png_size(path: Path) -> tuple[int, int]:
    height, width = read_image(path).shape[:2]
    return width, height


def test_analyse_models_writes_tables_and_pictures(
    tmp_path: Path, folder: Path, models: Mapping[str, Autoencoder]
) -> None:
    output = tmp_path / "out"
    report = analyse_models(models, folder, output, STUDY)
    names = {"analysis.json", "mmd.csv", "resolution.csv", "resolution.png", "features.png", "latents.png"}
    assert {path.name for path in output.iterdir()} == names
    assert json.loads((output / "analysis.json").read_text()) == report
    assert (report["images"], report["skipped"]) == (4, [])
    assert report["left_out"] == {"16": 0, "32": 1, "64": 2}
    rows = _rows(output / "resolution.csv")
    assert [(row["model"], row["resolution"], row["images"]) for row in rows] == [
        (name, side, count) for name in models for side, count in (("16", "4"), ("32", "3"), ("64", "2"))
    ]
    distances = _rows(output / "mmd.csv")
    assert [(row["model"], row["sigma"]) for row in distances] == [(n, s) for n in models for s in ("5.0", "50.0")]
    assert [model["mmd"]["images"] for model in report["models"]] == [3, 3, 3]
    assert [model["imbalance"] is not None for model in report["models"]] == [True, True, False]
    # 150 dots an inch; two rows of pictures, and columns of 2.4 inches.
    assert _png_size(output / "features.png") == (360 * 3 + 150, 870)
    assert _png_size(output / "latents.png") == (360 * 7, 870)
    num_measures = 2 + (find_backbone(None) is not None)
    assert _png_size(output / "resolution.png") == (600 * num_measures, 540)
    for picture in ("features.png", "latents.png", "resolution.png"):
        assert len(np.unique(read_image(output / picture))) > 50
    text = measures_table(report)
    assert all(name in text for name in models)
    assert "nan" not in text


def test_analyse_models_measures_what_its_parts_measure(
    tmp_path: Path, folder: Path, models: Mapping[str, Autoencoder]
) -> None:
    report = analyse_models(models, folder, tmp_path / "out", STUDY)
    images = [shrink_square(read_image(folder / name), 32) for name in ("a.png", "b.png", "c.png")]
    x = torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255
    for model in report["models"]:
        vae = models[model["name"]]
        with torch.no_grad():
            latent = vae.encode(2 * x - 1).mode()
            y = ((vae.decode(latent, size=(32, 32)) + 1) / 2).clamp(0, 1)
        row = model["resolution"][1]
        assert row["psnr"] == pytest.approx(psnr(y, x).mean().item(), abs=1e-4)
        assert row["ssim"] == pytest.approx(ssim(y, x).mean().item(), abs=1e-5)
        assert model["mmd"]["dimension"] == latent[0].numel()
        if isinstance(vae, LiteVAE):
            with torch.no_grad():
                imbalance = feature_imbalance(vae.decoder.features(latent))
            assert model["imbalance"]["images"] == 3
            assert model["imbalance"]["peak_ratio"] == pytest.approx(imbalance.peak_ratio.mean().item(), rel=1e-4)
            assert model["imbalance"]["top_share"] == pytest.approx(imbalance.top_share.mean().item(), rel=1e-4)


def test_mmd_of_a_posterior_that_is_the_gaussian_is_near_zero() -> None:
    vae = _lite()
    for parameter in vae.encoder.aggregation.conv_out.parameters():  # pyright: ignore
        torch.nn.init.zeros_(parameter)  # mean 0, variance 1
    record = ModelRecord("model", vae, STUDY)
    images = list(np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8))
    with torch.inference_mode():
        record.update(images)
        values = record.summary()["mmd"]["values"]
    # Latents that shared their noise with the Gaussian samples would stand out in the spread.
    assert all(abs(value["mean"]) < 1e-3 and 0 < value["std"] < 1e-3 for value in values)


def test_results_do_not_depend_on_the_batches(
    tmp_path: Path, folder: Path, models: Mapping[str, Autoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = analyse_models(models, folder, tmp_path / "one", STUDY)
    monkeypatch.setattr("leanvae.evaluation.analysis._BATCH_PIXELS", 1)
    two = analyse_models(models, folder, tmp_path / "two", STUDY)
    for a, b in zip(one["models"], two["models"], strict=True):
        assert [row["images"] for row in a["resolution"]] == [row["images"] for row in b["resolution"]]
        assert [row["psnr"] for row in a["resolution"]] == pytest.approx([row["psnr"] for row in b["resolution"]])
        assert a["mmd"]["images"] == b["mmd"]["images"]


@pytest.mark.parametrize("strict", [False, True])
def test_broken_images_are_listed_and_the_others_done(tmp_path: Path, folder: Path, strict: bool) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "clip.mp4").write_bytes(b"passed over")
    if strict:
        with pytest.raises(WorkIncomplete, match=r"1 of 5 images could not be read: broken\.png"):
            analyse_models({"model": _lite()}, folder, tmp_path / "out", STUDY, strict=True)
    else:
        analyse_models({"model": _lite()}, folder, tmp_path / "out", STUDY)
    report = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert report["images"] == 4
    assert [entry["input"] for entry in report["skipped"]] == ["broken.png"]


def test_images_that_cannot_be_analysed_are_errors(tmp_path: Path, folder: Path) -> None:
    models = {"model": _lite()}
    with pytest.raises(ValueError, match="none of the 4 images is that large"):
        analyse_models(models, folder, tmp_path / "out", Study(resolutions=(16,), size=512))
    with pytest.raises(ValueError, match="output folder"):
        analyse_models(models, folder, folder, STUDY)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(WorkIncomplete, match="none of 4 images could be read"):
        analyse_models(models, folder, tmp_path / "out", STUDY)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clips or images found"):
        analyse_models(models, tmp_path / "empty", tmp_path / "out", STUDY)


def test_one_image_has_measures_but_no_mmd(tmp_path: Path, folder: Path) -> None:
    report = analyse_models({"lean": _lean()}, folder / "a.png", tmp_path / "out", STUDY)
    assert report["models"][0]["mmd"]["values"] == []
    assert (tmp_path / "out" / "mmd.csv").read_text() == "model,sigma,mean,std\n"
    assert _png_size(tmp_path / "out" / "features.png") == (360 + 150, 465)  # the source alone


def test_a_broken_model_is_named(tmp_path: Path, folder: Path) -> None:
    vae = _lite()
    torch.nn.init.constant_(vae.decoder.conv_in.weight, float("nan"))
    with pytest.raises(NotFinite, match="bad: the decoder's output is not finite"):
        analyse_models({"bad": vae}, folder, tmp_path / "out", STUDY)


def test_a_transformer_is_measured_at_its_own_size(tmp_path: Path, folder: Path) -> None:
    models = {"vit": _lite(aggregation="vit", vit_grid=(4, 4))}
    report = analyse_models(models, folder, tmp_path / "out", STUDY)
    rows = report["models"][0]["resolution"]
    assert [(row["images"], row["psnr"] is None) for row in rows] == [(0, True), (3, False), (0, True)]
    with pytest.raises(ValueError, match="transformer in vit"):
        analyse_models(models, folder, tmp_path / "out", Study(resolutions=(32,), size=64))


@pytest.mark.parametrize(
    ("field", "value"),
    [("resolutions", ()), ("resolutions", (0,)), ("resolutions", (8, 8)), ("size", 36), ("sigmas", (0.0,))]
    + [("num_pictures", 0)],
)
def test_study_refuses_wrong_numbers(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Study(**{field: value})


def test_shrink_square_averages_the_middle() -> None:
    image = np.zeros((4, 10, 3), np.uint8)
    image[:, 3:5], image[:, 5:7] = 100, 50
    assert shrink_square(image, 2)[..., 0].tolist() == [[100, 50], [100, 50]]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/smc"], ["smc"]),
        (["runs/smc/checkpoints/latest", "runs/group/checkpoints/latest"], ["smc", "group"]),
        (["a/x/1", "a/y/2"], ["x/1", "y/2"]),
        (["a/b", "a/b/c"], ["b", "b/c"]),
        (["c", "a/c"], ["c", "a/c"]),
    ],
)
def test_model_names_are_short_and_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = model_names(paths)
    assert len(set(found)) == len(paths)
    assert all(name.endswith(expected) for name, expected in zip(found, names, strict=True))


def test_model_names_refuse_one_twice() -> None:
    with pytest.raises(ValueError, match="different"):
        model_names(["a", "./a"])
    with pytest.raises(ValueError, match="one or more"):
        model_names([])


def test_command_analyses_checkpoints(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        _lean().save_pretrained(tmp_path / name)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    flags = ["--checkpoint", f"{tmp_path}/one", f"{tmp_path}/two", "--input", str(folder), "--output"]
    args = parser.parse_args([*flags, f"{tmp_path}/out", "--resolutions", "16", "--size", "32", "--device", "cpu"])
    assert run(args) == 0
    out = capsys.readouterr().out
    assert f"4 images analysed, 0 skipped: {tmp_path}/out/analysis.json" in out
    report = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [(model["name"], model["checkpoint"]) for model in report["models"]] == [
        (name, f"{tmp_path}/{name}") for name in ("one", "two")
    ]


def test_missing_checkpoints_are_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        analyse([tmp_path / "nowhere"], folder, tmp_path / "out")


def test_flags_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'av', 'matplotlib'}"
    program = f"import sys, leanvae.cli.analyse; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
