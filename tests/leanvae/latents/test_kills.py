"""Runs as users start them, killed again and again: each good clip is in the store once, each bad one is listed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leanvae.latents.clips import ClipRule
from leanvae.latents.encode import encode_clips
from leanvae.latents.store import Store
from leanvae.latents.verify import verify_store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
KILLS = 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_clips, write_clip):
    """Folders of good and bad files: the shared ones where they are there."""
    if SHARED.exists():
        return [str(SHARED / "dev" / "videos"), str(SHARED / "bad")]
    folder = make_clips(tmp_path_factory.mktemp("clips"))
    for number in range(20):
        write_clip(folder / f"{number}.mp4", num_frames=60, seed=number, height=120, width=160)
    return [str(folder)]


@pytest.fixture(scope="module")
def expected(sources, make_job, tmp_path_factory):
    """Keys and reasons of an undisturbed run."""
    rule = ClipRule(frames=17, every=40, resolutions=("64x64",))
    store = tmp_path_factory.mktemp("undisturbed")
    encode_clips(sources, store, make_job(rule, num_workers=2))
    return contents(store)


def contents(folder):
    store = Store(folder)
    reasons = {record.source: record.reason for record in store.sources().values() if record.reason}
    return sorted(store.index()["key"].to_pylist()), reasons


def launcher(name):
    script = str(ROOT / "scripts" / "encode_clips.py")
    if name == "ranks":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    return [script, "--engine", "ray"] if name == "ray" else [script]


@pytest.mark.parametrize("engine", ["local", pytest.param("ranks", marks=pytest.mark.distributed), "ray"])
def test_killed_runs_leave_each_clip_once(engine, sources, expected, checkpoint, tmp_path):
    store = tmp_path / "store"
    flags = ["--checkpoint", str(checkpoint), "--input", *sources, "--output", str(store), "--shard-size", "32KiB"]
    flags += ["--frames", "17", "--every", "40", "--resolution", "64x64", "--device", "cpu"]
    command = [sys.executable, *launcher(engine), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    moments = random.Random(engine)
    completed = []
    for _ in range(KILLS):
        shards = count_shards(store)
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Most kills shall fall into the encoding, and some into what comes before it.
        deadline = time.monotonic() + 60
        while count_shards(store) == shards and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if moments.random() < 0.002:
                break
        time.sleep(moments.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        completed.append(count_shards(store))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(store) == expected, completed
    report = verify_store(store, checkpoint, num_samples=3)
    assert report["problems"] == []
    summary = json.loads((store / "summary.json").read_text())
    assert {entry["source"]: entry["reason"] for entry in summary["skipped"]} == expected[1]


def count_shards(store):
    return len(list((store / "shards").glob("*.tar"))) if store.exists() else 0
