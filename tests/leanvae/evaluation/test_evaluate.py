"""The whole evaluation: real files through small models, tables, resuming, ranks and refusals."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.cli import main as cli
from leanvae.evaluation import run as evaluation
from leanvae.evaluation.baselines import make_baseline
from leanvae.evaluation.records import folder_name
from leanvae.evaluation.run import EvaluationSettings, evaluate
from leanvae.media.folder import read_frames
from leanvae.media.image import read_image
from leanvae.media.info import Frame
from leanvae.media.naming import find_inputs
from leanvae.media.video import VideoReader
from leanvae.media.writer import write_png
from leanvae.metrics.networks import FeatureNetworks
from litevae import LiteVAE, LiteVAEConfig
from litevae.errors import WorkIncomplete


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
TINY = {"low_channels": 4, "high_channels": 8, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a small LeanVAE and a small LiteVAE, with random weights."""
    torch.manual_seed(0)
    LeanVAE(LeanVAEConfig(**TINY)).save_pretrained(tmp_path / "models" / "lean")
    lite = LiteVAEConfig(
        extraction_channels=4,
        extraction_multipliers=(1,),
        aggregation_channels=4,
        aggregation_multipliers=(1,),
        decoder_channels=8,
        decoder_multipliers=(1, 1, 1, 1),
        num_res_blocks=1,
    )
    LiteVAE(lite).save_pretrained(tmp_path / "models" / "lite")
    return tmp_path / "models"


@pytest.fixture
def files(tmp_path: Path, write_clip: Any) -> Path:
    """A folder with two clips, an image, and two files that cannot be read."""
    folder = tmp_path / "files"
    (folder / "deeper").mkdir(parents=True)
    write_clip(folder / "a.mp4", num_frames=18, height=48, width=64)
    write_clip(folder / "deeper" / "b #1.mp4", num_frames=5, height=36, width=44, seed=1)
    rows, columns = np.mgrid[:51, :45]
    image = np.stack([127 + 100 * np.sin(rows / 7 + c) * np.cos(columns / (5 + c)) for c in range(3)], -1)
    write_png(folder / "c.png", image.astype(np.uint8))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "empty.png").touch()
    return folder


def _lines(output: Path, name: str = "clips.csv") -> list[dict[str, str]]:
    with open(output / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class _Random(nn.Module):
    """Features by a random linear map of a small version of what it sees."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x if x.ndim == 4 else x.mean(2)
        return nn.functional.adaptive_avg_pool2d(frames, 4).flatten(1) @ self.weight.T


@pytest.fixture
def random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = FeatureNetworks(None, _Random(0), _Random(1), [])
    monkeypatch.setattr(evaluation, "load_feature_networks", lambda *_: networks)


def test_evaluate_measures_all_and_lists_what_it_cannot_read(models: Path, files: Path, tmp_path: Path) -> None:
    specs = ["identity", "jpeg:40", "h264:35", "bicubic:4", f"{models}/lean", f"{models}/lite"]
    report = evaluate(specs, files, tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [model["name"] for model in report["models"]] == [
        "identity",
        "jpeg:40",
        "h264:35",
        "bicubic:4",
        "lean",
        "lite",
    ]
    assert (report["files"], report["frames"]) == (3, 24)
    assert {entry["input"] for entry in report["skipped"]} == {"broken.mp4", "empty.png"}
    lines = _lines(tmp_path / "out")
    assert len(lines) == 18
    assert len(_lines(tmp_path / "out", "frames.csv")) == 6 * 24
    sizes = {(line["file"], line["kind"], line["frames"], line["height"], line["width"]) for line in lines}
    assert sizes == {
        ("a.mp4", "video", "18", "48", "64"),
        ("deeper/b #1.mp4", "video", "5", "36", "44"),
        ("c.png", "image", "1", "51", "45"),
    }
    totals = {model["name"]: model for model in report["models"]}
    for name in ("jpeg:40", "h264:35", "bicubic:4"):
        assert totals[name]["psnr"]["value"] > 20
    assert totals["jpeg:40"]["block_score"]["value"] > 1.1
    low, high = totals["jpeg:40"]["psnr"]["interval"]
    assert low <= totals["jpeg:40"]["psnr"]["value"] <= high
    assert totals["identity"]["latents"] is None
    assert (totals["lean"]["latents"]["channels"], totals["lite"]["latents"]["channels"]) == (4, 4)
    for name in ("a.mp4/source.mp4", "a.mp4/lean.mp4", "a.mp4/lean.latent.png", "c.png/lite.png", "c.png/jpeg-40-"):
        assert list((tmp_path / "out" / "media").glob(f"{name}*")), name
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "data:video/mp4;base64," in page


def test_measures_agree_with_scikit_image(files: Path, tmp_path: Path) -> None:
    evaluate(["jpeg:20"], files, tmp_path / "out", settings=EvaluationSettings(shown=0))
    baseline = make_baseline("jpeg:20")
    for line in _lines(tmp_path / "out"):
        path = files / line["file"]
        images = [frame.image for frame in iter_frames(path)] if line["kind"] == "video" else [read_image(path)]
        x = np.stack(images) / 255.0
        parts = baseline.reconstruct(Frame(image, None, 0.0) for image in images)
        y = torch.cat([part.output for part in parts]).movedim(1, -1).double().numpy()
        psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(x, y, strict=True)]
        options = {"channel_axis": 2, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}
        ssim = [structural_similarity(a, b, use_sample_covariance=False, **options) for a, b in zip(x, y, strict=True)]
        assert float(line["psnr"]) == pytest.approx(np.mean(psnr), abs=1e-4)
        assert float(line["ssim"]) == pytest.approx(np.mean(ssim), abs=1e-4)
        of_frames = [entry for entry in _lines(tmp_path / "out", "frames.csv") if entry["file"] == line["file"]]
        assert [float(entry["psnr"]) for entry in of_frames] == pytest.approx(psnr, abs=1e-4)


@pytest.mark.usefixtures("random_networks")
def test_identity_is_perfect_with_any_feature_network(models: Path, files: Path, tmp_path: Path) -> None:
    report = evaluate(["identity", f"{models}/lean"], files, tmp_path / "out", settings=EvaluationSettings(shown=0))
    identity, lean = report["models"]
    assert (identity["psnr"]["value"], identity["psnr"]["files"]) == (None, 0)
    assert identity["ssim"]["value"] == pytest.approx(1, abs=1e-6)
    assert identity["flicker"]["value"] == 0
    assert identity["block_score"]["value"] == 1
    assert (identity["rfid"]["samples"], identity["rfvd"]["samples"]) == (24, 1)
    assert identity["rfid"]["value"] == pytest.approx(0, abs=1e-3)
    assert identity["rfid"]["interval"] == pytest.approx([0, 0], abs=1e-3)
    assert lean["rfid"]["value"] > 0.1
    assert lean["rfvd"]["value"] is None  # one sample has no covariance


@pytest.mark.usefixtures("random_networks")
def test_rfvd_is_of_all_windows_of_16_frames(write_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed, frames in enumerate((16, 33, 15)):
        write_clip(tmp_path / "in" / f"{seed}.mp4", frames, seed=seed)
    report = evaluate(
        ["identity", "bicubic:8"], tmp_path / "in", tmp_path / "out", settings=EvaluationSettings(shown=0)
    )
    identity, bicubic = report["models"]
    assert identity["rfvd"]["samples"] == 3
    assert identity["rfvd"]["value"] == pytest.approx(0, abs=1e-3)
    assert bicubic["rfvd"]["value"] > 1e-3


def test_expected_figures_of_small_models(models: Path, tmp_path: Path) -> None:
    """Figures of this code on frames made here; if they change, the measures have changed."""
    (tmp_path / "in").mkdir()
    for seed in range(3):
        noise = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(seed))
        image = nn.functional.interpolate(noise, scale_factor=8, mode="bilinear", align_corners=False)[0]
        write_png(tmp_path / "in" / f"{seed}.png", (255 * image).round().byte().movedim(0, -1).numpy())
    report = evaluate([f"{models}/lean", f"{models}/lite", "bicubic:8"], tmp_path / "in", tmp_path / "out")
    measured = {
        model["name"]: [model[name]["value"] for name in ("psnr", "ssim", "ms_ssim", "block_score")]
        for model in report["models"]
    }
    for name, expected in EXPECTED.items():
        assert measured[name] == pytest.approx(expected, rel=2e-3), name
    assert report["models"][0]["latents"]["mmd"] == pytest.approx(EXPECTED_MMD, rel=2e-2)


EXPECTED = {
    "lean": [14.18978, 0.189410, 0.053842, 1.113840],
    "lite": [12.10785, 0.084414, 0.027440, 1.036455],
    "bicubic:8": [24.76414, 0.848081, 0.931352, 0.804943],
}
EXPECTED_MMD = 0.142274


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_figures(files: Path, models: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint", f"{models}/lean", "jpeg:40", "--input", str(files), "--output"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *flags]
    done = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "3 files evaluated, 2 skipped" in done.stdout
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL, cwd=ROOT)
    first = tmp_path / "killed" / "records" / "lean" / "a.mp4.json"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    written = first.stat().st_mtime_ns
    subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, cwd=ROOT, check=True)
    assert first.stat().st_mtime_ns == written
    for name in ("evaluation.json", "clips.csv", "frames.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_only_what_changed_is_measured_again(
    files: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, str]] = []
    measure = evaluation._Run._measure_candidate

    def counted(self: Any, candidate: Any, job: Any, *rest: Any) -> Any:
        measured.append((candidate.name, job.name))
        return measure(self, candidate, job, *rest)

    monkeypatch.setattr(evaluation._Run, "_measure_candidate", counted)

    def again(*specs: str, **options: Any) -> set[tuple[str, str]]:
        measured.clear()
        evaluate(specs, files, tmp_path / "out", **options)
        return set(measured)

    everything = {("identity", name) for name in ("a.mp4", "c.png", "deeper/b #1.mp4")}
    assert again("identity") == everything
    assert again("identity") == set()
    assert again("identity", "bicubic:4") == {("bicubic:4", name) for _, name in everything}
    write_png(files / "c.png", np.zeros((20, 20, 3), np.uint8))
    assert again("identity") == {("identity", "c.png")}
    assert again("identity", settings=EvaluationSettings(num_frames=2)) == everything
    shutil.rmtree(tmp_path / "out" / "media")
    assert again("identity", settings=EvaluationSettings(num_frames=2)) == everything
    again(f"{models}/lean")
    assert len(again(f"{models}/lean", dtype=torch.bfloat16)) == 3
    torch.manual_seed(1)
    LeanVAE(LeanVAEConfig(**TINY)).save_pretrained(models / "lean")
    assert again(f"{models}/lean") == {("lean", name) for _, name in everything}


def test_files_are_read_once_for_each_model(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = evaluation.read_frames

    def counted(item: Any, *rest: Any) -> Any:
        reads.append(Path(item.name).name)
        return read(item, *rest)

    monkeypatch.setattr(evaluation, "read_frames", counted)
    evaluate(["identity", "h264:30"], files, tmp_path / "out", settings=EvaluationSettings(shown=0))
    assert reads.count("a.mp4") == 3  # once for the file's own features


@pytest.mark.distributed
def test_two_ranks_agree_with_one(
    files: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", f"{models}/lean", "jpeg:40", "--input", str(files), "--output"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "scripts" / "evaluate.py"), *flags, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli.main([*flags, str(tmp_path / "one")], command="evaluate") == 0
    for printed in (done.stdout, capsys.readouterr().out):
        assert printed.count("3 files evaluated, 2 skipped") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["skipped"] == two["skipped"]
    for a, b in zip(one["models"], two["models"], strict=True):
        for name in ("psnr", "ssim", "flicker", "block_score"):
            assert b[name]["value"] == pytest.approx(a[name]["value"], abs=1e-6)
            assert b[name]["interval"] == pytest.approx(a[name]["interval"], abs=1e-6)
    assert (tmp_path / "one" / "clips.csv").read_text() == (tmp_path / "two" / "clips.csv").read_text()


def test_lists_of_files_and_settings_are_followed(files: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# two of them\nfiles/c.png\n\nfiles/deeper/b #1.mp4\n")
    jobs = find_inputs(tmp_path / "list.txt", tmp_path / "out")
    assert [job.name for job in jobs] == ["c.png", "deeper/b #1.mp4"]
    assert len(list(read_frames(jobs[1].item, 3))) == 3
    report = evaluate(["identity"], tmp_path / "list.txt", tmp_path / "out", settings=EvaluationSettings(2, (16, 24)))
    assert (report["files"], report["frames"]) == (2, 3)
    for text, message in (("a.png\n./a.png\n", "twice"), ("\n", "no clips or images found")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_inputs(tmp_path / "list.txt", tmp_path / "out")


def test_parts_leave_no_seams_in_our_models_and_show_in_others(files: Path, models: Path, tmp_path: Path) -> None:
    whole = evaluate([f"{models}/lean"], files, tmp_path / "whole")["models"][0]
    settings = EvaluationSettings(chunk=4, tile=(16, 16))
    parts = evaluate([f"{models}/lean"], files, tmp_path / "parts", settings=settings)["models"][0]
    assert parts["psnr"]["value"] == pytest.approx(whole["psnr"]["value"], abs=1e-3)
    assert (whole["tile_seam"]["value"], whole["chunk_seam"]["value"]) == (None, None)
    assert parts["tile_seam"]["value"] == pytest.approx(whole["block_score"]["value"], rel=0.3)
    assert parts["chunk_seam"]["files"] == 2


def test_more_files_than_are_shown_show_the_worst_and_the_best(files: Path, tmp_path: Path) -> None:
    evaluate(["jpeg:30"], files, tmp_path / "out", settings=EvaluationSettings(shown=2))
    lines = sorted(_lines(tmp_path / "out"), key=lambda line: float(line["psnr"]))
    media = {
        path.parent.relative_to(tmp_path / "out" / "media").as_posix()
        for path in (tmp_path / "out" / "media").rglob("source.*")
    }
    assert media == {lines[0]["file"], lines[-1]["file"]}


def test_a_vae_of_diffusers_is_evaluated_with_its_weights(files: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    wan = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    wan.save_pretrained(tmp_path / "wan")
    torch.manual_seed(0)
    kl = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    kl.save_pretrained(tmp_path / "kl")
    specs = [f"AutoencoderKLWan={tmp_path}/wan", f"wan-2.1={tmp_path}/wan", f"AutoencoderKL={tmp_path}/kl"]
    report = evaluate(specs, files, tmp_path / "out", settings=EvaluationSettings(chunk=9))
    by_class, by_name, images = report["models"]
    assert by_class["psnr"]["value"] == by_name["psnr"]["value"]
    assert by_class["chunk_seam"]["files"] == 1
    assert by_class["latents"]["channels"] == 4
    assert images["psnr"]["value"] > 0
    assert images["chunk_seam"]["files"] == 0


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["identity", "identity"], "expected one or more different ones"),
        (["jpeg:0"], "quality of 1 to 100"),
        (["h264:60"], "CRF of 0 to 51"),
        (["bicubic:x"], "factor of 2 to 64"),
        (["wan-2.1"], "without weights"),
        (["leanvae-c4=folder"], "only the path of its checkpoint"),
        (["AutoencoderKLWan=/nothing/here"], "no folder at"),
        (["nothing"], "no checkpoint at"),
        (["NoSuchClass=folder"], "has no NoSuchClass"),
        (["AutoencoderKL=."], "no weights of AutoencoderKL"),
    ],
)
def test_wrong_models_are_refused(files: Path, tmp_path: Path, specs: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=message):
        evaluate(specs, files, tmp_path / "out")


def test_a_broken_model_is_no_broken_file(files: Path, models: Path, tmp_path: Path) -> None:
    vae = LeanVAE(LeanVAEConfig(**TINY))
    nn.init.constant_(vae.logvar.bias, 0)
    with torch.no_grad():
        next(vae.decoder.parameters()).fill_(float("nan"))
    vae.save_pretrained(models / "lean")
    with pytest.raises(ValueError, match="lean: the decoder's output is not finite"):
        evaluate([f"{models}/lean"], files, tmp_path / "out")


def test_strict_and_nothing_usable_are_errors(files: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkIncomplete, match=r"2 of 5 files could not be evaluated: broken\.mp4"):
        evaluate(["identity"], files, tmp_path / "out", strict=True)
    assert (tmp_path / "out" / "evaluation.json").exists()
    for name in ("a.mp4", "deeper/b #1.mp4", "c.png"):
        (files / name).unlink()
    with pytest.raises(WorkIncomplete, match="2 of 2"):
        evaluate(["identity"], files, tmp_path / "other")


def test_command_prints_a_table(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("leanvae")
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        flags = ["--checkpoint", "identity", "jpeg:50", "--input", str(files), "--output", str(tmp_path / "out")]
        assert cli.main(["evaluate", *flags, "--frames", "3", "--resolution", "32"]) == 0
        out, err = capsys.readouterr()
        assert cli.main(["evaluate", *flags, "--frames", "0"]) == 2
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    table = out.splitlines()
    assert table[0].split() == ["model", "PSNR", "SSIM", "flicker", "blocks"]
    assert table[1].split()[:3] == ["identity", "-", "1.0000"]
    assert f"3 files evaluated, 2 skipped: {tmp_path}/out/report.html" in table[-1]
    assert "broken.mp4: skipped" in err
    assert err.count("LPIPS is left out") == 1
    assert "--frames 0: expected a whole number from 1" in capsys.readouterr().err


def test_folder_names_stay_different() -> None:
    names = ["jpeg:40", "jpeg-40", "jpeg 40", "source", "a/b", "a-b", ".."]
    assert len({folder_name(name) for name in names}) == len(names)
    assert folder_name("jpeg-40") == "jpeg-40"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared clips are not beside the checkout")
@pytest.mark.slow
def test_a_folder_of_real_and_broken_files_evaluates(tmp_path: Path, models: Path) -> None:
    videos = sorted((SHARED / "dev" / "videos").iterdir(), key=lambda path: path.stat().st_size)[:20]
    broken = [path for path in (SHARED / "bad").iterdir() if path.suffix in (".mp4", ".png", ".jpg")]
    (tmp_path / "in").mkdir()
    for path in [*videos, *broken]:
        (tmp_path / "in" / path.name).symlink_to(path)
    specs = ["identity", "jpeg:30", f"{models}/lean"]
    report = evaluate(specs, tmp_path / "in", tmp_path / "out", settings=EvaluationSettings(17, (64, 64)))
    skipped = {entry["input"] for entry in report["skipped"]}
    assert report["files"] >= 20
    assert {"zero_byte.mp4", "text_renamed.png", "truncated_no_moov.mp4"} <= skipped
    assert report["models"][0]["ssim"]["value"] == pytest.approx(1, abs=1e-6)
