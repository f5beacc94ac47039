"""The documented example of diffusion on a store runs as its docstring says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from leanvae.media.video import VideoReader


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "video_diffusion.py"


@pytest.mark.integration
def test_transformer_learns_on_a_store_and_its_sample_decodes(store, checkpoint, tmp_path):
    flags = ["--store", str(store), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "sample.mp4")]
    command = [sys.executable, str(EXAMPLE), *flags, "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = map(float, re.search(r"loss ([\d.]+) at the start, ([\d.]+) at the end", done.stdout).groups())
    assert last < first
    frames = list(iter_frames(tmp_path / "sample.mp4"))
    assert [frame.image.shape for frame in frames] == [(32, 32, 3)] * 5
