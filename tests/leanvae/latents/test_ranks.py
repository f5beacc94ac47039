"""Two ranks encode, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "encode_clips.py"


@pytest.mark.distributed
def test_the_summary_is_printed_once(checkpoint, clips, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--checkpoint", checkpoint, "--input", clips, "--output", tmp_path / "store", "--device", "cpu"]
    flags += ["--frames", "5", "--resolution", "32x32", "--workers", "1"]
    run = subprocess.run(
        [*launcher, SCRIPT, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = run.stdout.splitlines()
    assert json.loads(line)["clips"] == 3
    assert run.stderr.count("skipped: too short") == 1
