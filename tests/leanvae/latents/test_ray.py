"""Encoding on a Ray cluster, a local one that was started in another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch

from leanvae import load_vae
from leanvae.cli.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, os, sys
import ray
from leanvae.cli.main import main

here = os.getcwd()
os.chdir("/")
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
os.chdir(here)
for checkpoint in ("model", "broken"):
    flags = ["--checkpoint", checkpoint, "--input", "clips", "--output", f"store-{checkpoint}", "--engine", "ray"]
    print("exit", main([*flags, "--frames", "5", "--every", "4", "--resolution", "32x32"], command="encode_clips"))
"""


def test_relative_checkpoints_are_found_and_errors_come_through(checkpoint, clips, tmp_path):
    vae = load_vae(checkpoint)
    vae.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        vae.logvar.bias.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "broken")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith(("{", "exit"))]
    assert lines[1:] == ["exit 0", "exit 2"], run.stderr[-3000:]
    summary = json.loads(lines[0])
    assert (summary["clips"], summary["unfinished"]) == (5, 0)
    assert "the latents are not finite" in run.stderr.splitlines()[-1]


def test_a_cluster_that_cannot_be_joined_is_named_in_one_line(checkpoint, clips, tmp_path, monkeypatch, caplog, capsys):
    def refuse(**_):
        raise ConnectionError("Failed to connect to 127.0.0.1:1") from RuntimeError("Traceback\nInvalidAuthToken: none")

    monkeypatch.setattr(ray, "init", refuse)
    flags = ["--checkpoint", str(checkpoint), "--input", str(clips), "--output", str(tmp_path / "store")]
    assert main([*flags, "--frames", "5", "--engine", "ray"], command="encode_clips") == 2
    shown = caplog.text + capsys.readouterr().err
    assert "RAY_ADDRESS: Failed to connect to 127.0.0.1:1: InvalidAuthToken: none" in shown
    assert "Traceback" not in shown
