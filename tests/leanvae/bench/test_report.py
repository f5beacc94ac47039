"""Reports: files, tables, ratios, pictures, and the command line."""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.bench import quality
from leanvae.bench import run as run_module
from leanvae.bench.compare import compare_reports
from leanvae.bench.jobs import BenchRow
from leanvae.bench.plots import write_plots
from leanvae.bench.report import make_report, memory_limits, read_report, table3_ratios, write_report
from leanvae.bench.run import Benchmark
from leanvae.bench.settings import BenchSettings
from leanvae.bench.tables import print_report
from leanvae.cli import bench as command
from leanvae.media.errors import MediaError
from leanvae.media.info import Frame
from leanvae.media.item import Item
from leanvae.media.writer import write_png
from leanvae.peers.models import Model
from leanvae.peers.registry import find_model

FLAGS = ["--models", "leanvae-c4,litevae-s", "--resolutions", "16", "32", "--frames", "5,9"]


def fake_result(job: BenchRow, seconds: float, timeout: float | None) -> dict[str, Any]:
    """A process's result; the largest images run out of memory."""
    if job.model == "litevae-s" and job.height == 32 and job.batch == 1:
        return {"status": "out of memory", "reason": "too large", "wall_seconds": 1.0}
    pixels = job.frames * job.height * job.width
    timing = {"median": 1e-6 * pixels, "quartiles": [9e-7 * pixels, 1.1e-6 * pixels], "repeats": 3}
    timing |= {"warm_up": True, "peak_bytes": 100 * pixels}
    result = {"status": "ok", "encode": timing, "parameters": 5, "latent_elements": 8, "wall_seconds": 1.0}
    return result if job.encode_only else {**result, "decode": timing}


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "run_child", fake_result)
    monkeypatch.setattr(run_module, "matrix_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(run_module, "memory_bandwidth", lambda device: 1e10)


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    return parser.parse_args(flags)


def test_the_command_writes_tables_files_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parse(*FLAGS, "--output", str(tmp_path))) == 0
    out = capsys.readouterr().out
    for expected in ("leanvae-c4", "9x32x32", "ran out at 32", "out of memory: too large", "GFLOP/s float32"):
        assert expected in out
    report = read_report(tmp_path / "results.json")
    assert report["machine"]["hardware"]["cores"] >= 1
    assert report["machine"]["software"]["torch"]
    assert {row["status"] for row in report["rows"]} == {"ok", "out of memory"}
    row = next(row for row in report["rows"] if row["model"] == "leanvae-c4" and row["frames"] == 9)
    assert row["encode"]["frames_per_second"] == pytest.approx(9 / row["encode"]["median"])
    assert row["encode"]["times_floor"] == pytest.approx(row["encode"]["median"] / (row["encode"]["flops"] / 1e11))
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["rows"]) == 6
    assert float(lines[0]["encode_median"]) > 0
    for name in ("flops_and_time", "memory", "frames", "scatter"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert command.run(parse(*FLAGS, "--output", str(tmp_path), "--strict")) == 3


def test_table_3_prints_the_ratios_to_the_sd_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parse("--table3", "--output", str(tmp_path))) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Table 3" in out
    assert "448 and 466 against 271 GFLOP" in out
    names = [entry["model"] for entry in read_report(tmp_path / "results.json")["table3"]]
    assert set(names) == {"sd-vae-nchw", "sd-vae", "litevae-s", "litevae-b"}


def test_table_3_ratios_are_those_of_speed_memory_and_flops() -> None:
    def row(model: str, speed: float, peak: int, flops: int) -> dict[str, Any]:
        part = {"frames_per_second": speed, "peak_bytes": peak, "flops": flops}
        return {"model": model, "encode_only": True, "status": "ok", "batch": 8, "height": 256, "encode": part}

    base, small = table3_ratios([row("sd-vae-nchw", 2.0, 1000, 80), row("litevae-s", 40.0, 100, 8)])
    assert (base["speed_ratio"], base["memory_ratio"], base["flops_ratio"]) == (1, 1, 1)
    assert (small["speed_ratio"], small["memory_ratio"], small["flops_ratio"]) == (20, 0.1, 0.1)


def test_memory_limits_grow_with_the_area() -> None:
    row = {"model": "a", "mode": "whole", "dtype": "float32", "batch": 1, "frames": 17, "height": 64, "width": 64}
    row |= {"status": "ok", "encode": {"peak_bytes": 100}, "decode": {"peak_bytes": 50}, "parameters": 25}
    assert memory_limits([row], 100 + 400) == [{"model": "a", "frames": 17, "side": 128, "from": "64"}]


def test_comparison_gives_ratios_of_what_both_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(parse(*FLAGS, "--output", str(tmp_path)))
    before = read_report(tmp_path / "results.json")
    after = json.loads(json.dumps(before))
    after["rows"] = [row for row in after["rows"] if row["model"] == "leanvae-c4"]
    for row in after["rows"]:
        row["decode"]["median"] *= 2
    entries = compare_reports(before, after)
    assert len(entries) == 4
    assert all(entry["decode"] == {"median": 2, "peak_bytes": 1} for entry in entries)
    write_report(after, tmp_path)
    (tmp_path / "before.json").write_text(json.dumps(before), encoding="utf-8")
    capsys.readouterr()
    assert command.run(parse("--compare", f"{tmp_path}/before.json", f"{tmp_path}/results.json")) == 0
    assert "2.00" in capsys.readouterr().out


def test_reconstruction_is_judged_for_models_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"low_channels": 4, "high_channels": 8, "num_fusion_layers": 1, "ista_iterations": 1}
    LeanVAE(LeanVAEConfig(**config)).save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in" / "a.png", np.full((20, 30, 3), 90, np.uint8))
    flags = ["--models", str(tmp_path / "model"), "--resolutions", "16", "--output", str(tmp_path / "out")]
    assert command.run(parse(*flags, "--reconstruction", str(tmp_path / "in"))) == 0
    (entry,) = read_report(tmp_path / "out" / "results.json")["reconstruction"]
    assert (entry["files"], entry["frames"], entry["skipped"]) == (1, 1, 0)
    assert entry["psnr"] > 0
    assert "PSNR" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of the models has weights"):
        command.run(parse(*FLAGS, "--output", str(tmp_path / "o"), "--reconstruction", str(tmp_path / "in")))


def _saved_model(folder: Path) -> LeanVAE:
    vae = LeanVAE(LeanVAEConfig(low_channels=4, high_channels=8, num_fusion_layers=1, ista_iterations=1))
    vae.save_pretrained(folder)
    return vae


def test_a_clip_whose_size_changes_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved_model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "in" / name).touch()

    def frames(item: Item, count: int) -> Iterator[Frame]:
        for width in (24, 24, 24):
            yield Frame(np.full((16, width, 3), 90, np.uint8), None, 0.0)
        if item.address.endswith("a.mp4"):
            raise MediaError(item.name, "the size changes from 24x16 to 32x16 at frame 3")

    monkeypatch.setattr(quality, "read_frames", frames)
    judged = quality.judge(find_model(str(tmp_path / "model")), tmp_path / "in", "cpu", torch.float32)
    assert (judged["files"], judged["skipped"], judged["frames"]) == (1, 1, 3)


def test_a_model_whose_output_is_not_finite_has_no_figures(tmp_path: Path) -> None:
    vae = _saved_model(tmp_path / "model")
    with torch.no_grad():
        next(vae.decoder.parameters()).fill_(torch.nan)
    (tmp_path / "in").mkdir()
    write_png(tmp_path / "in" / "a.png", np.full((20, 30, 3), 90, np.uint8))
    model = Model("broken", "video", lambda: vae, "here", has_weights=True)
    judged = quality.judge(model, tmp_path / "in", "cpu", torch.float32)
    assert (judged["files"], judged["psnr"], judged["ssim"]) == (1, None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "nothing"], "expected one of leanvae-c4, .*vidtok"),
        (["--resolutions", "big"], "resolution is .*: expected .*1080p"),
        (["--dtype", "float8"], "expected one of float32, bfloat16, float16"),
        (["--modes", "half"], "expected one of whole, compiled, chunked, tiled"),
        (["--frames", "none"], "whole number"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--budget", "0"], "--budget"),
        (["--full", "--budget", "5"], "--budget"),
    ],
)
def test_wrong_flags_list_what_there_is(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command.run(parse(*flags, "--output", str(tmp_path)))


def test_a_report_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json: not a report"):
        read_report(tmp_path / "a.json")


def test_sizes_that_a_model_fails_at_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("smaller than its kernel")

    monkeypatch.setattr(run_module, "count", fail)
    settings = BenchSettings(("leanvae-c4",), ((16, 16),), (5,), ("whole",), ("float32",), "cpu", tmp_path, 600.0)
    bench = Benchmark(settings)
    bench.run()
    assert [entry["reason"] for entry in make_report(bench)["left_out"]] == ["its FLOPs cannot be counted"]
    bench.results.add(next(iter(bench.ranks)), fake_result(next(iter(bench.ranks)), 1.0, None))
    report = make_report(bench)
    print_report(report, Console(quiet=True))
    write_plots(report, tmp_path)
    assert report["rows"][0]["encode"]["flops"] is None


def test_an_empty_run_makes_an_empty_report(tmp_path: Path) -> None:
    settings = BenchSettings(("leanvae-c4",), ((16, 16),), (5,), ("whole",), ("float32",), "cpu", tmp_path, 1.0)
    bench = Benchmark(settings)
    bench.run()
    report = make_report(bench)
    assert [entry["reason"][:7] for entry in report["left_out"]] == ["no time"]
    print_report(report, Console(quiet=True))
    assert [path.name for path in write_plots(report, tmp_path)] == ["flops_and_time.png"]
