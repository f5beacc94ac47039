"""The README's commands work as written (training for two steps)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]
PROGRAMS = [text for language, text in BLOCKS if language == "python"]


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_readme_shows_the_main_commands():
    assert any(line.startswith("deepspeed scripts/train_video.py --config configs/lean_17f.yaml") for line in COMMANDS)
    assert any(line.startswith("python scripts/reconstruct.py") for line in COMMANDS)


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\b((?:configs|scripts|leanvae|litevae|tests|docs)/[\w./]*\w)", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_map_names_every_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Map of the repository") :]
    packages = ["litevae", *(f"leanvae/{path.parent.name}" for path in (ROOT / "leanvae").glob("*/__init__.py"))]
    assert [package for package in packages if f"`{package}/`" not in table] == []


@pytest.mark.slow
@pytest.mark.integration
def test_readme_commands_run(tmp_path, write_clip):
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "CLIPS").mkdir()
    for index in range(8):
        write_clip(tmp_path / "CLIPS" / f"clip{index}.mp4", num_frames=20, height=64, width=64, seed=index)
    write_clip(tmp_path / "CLIP.mp4", num_frames=10)
    (tmp_path / "IMAGES").mkdir()
    for index in range(8):
        picture = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "IMAGES" / f"picture{index}.png"), picture)
    assert len(COMMANDS) >= 3
    for line in COMMANDS:
        words = shlex.split(line)
        small = {
            "scripts/train_video.py": [
                *("--set", "training.max_steps=2"),
                *("--set", "training.tokens_per_batch=5120"),
                *("--set", "training.batch_multiple=1"),
            ],
            "scripts/bench_res.py": [
                "--models",
                "leanvae-c4",
                "--resolutions",
                "64",
                "--frames",
                "1",
                "--modes",
                "whole",
            ],
            "scripts/train_image.py": ["--set", "training.max_steps=1", "--set", "phases=[{resolution: 32, steps: 1}]"],
        }
        run([*words, *(flag for script, flags in small.items() if script in words for flag in flags)], tmp_path)
    assert (tmp_path / "runs/mine/recon/metrics.json").is_file()
    (tmp_path / "program.py").write_text("\n".join(PROGRAMS))
    run([sys.executable, "program.py"], tmp_path)
