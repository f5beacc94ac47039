"""A joint run on two ranks under ZeRO-2 survives the faults of long runs: kills, broken files, dying workers, NaN."""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import yaml

from leanvae.config import load_config
from leanvae.data.schedule import list_training_items, split_held_out
from leanvae.training.build import make_schedule
from leanvae.training.config import TrainVideoConfig

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

takes_minutes = pytest.mark.skipif("LEANVAE_SOAK" not in os.environ, reason="takes minutes: set LEANVAE_SOAK=1")

PROGRAM = Path(__file__).with_name("soak_program.py")
SETTINGS = {
    "model": {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
    | {"decoder_norm": "smc"},
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "timeout": 5, "max_bad_share": 0.5},
    "losses": {"perceptual": "none"},
    "gan": {"discriminator": {"base_channels": 8, "num_layers": 2}, "start_step": 5},
    "optimizer": {"warmup_steps": 0, "learning_rate": 5e-4},
    "training": {"batch_size": 4, "validate_every": 1000, "keep_checkpoints": 4}
    | {"faults": {"max_bad_steps": 3, "max_rollbacks": 2}},
    "deepspeed": {"zero_optimization": {"stage": 2}},
}


class Soak:
    """A run of two ranks in one process group, and its faults."""

    def __init__(self, folder, steps, spoilt, checkpoint_every):
        self.folder, self.out, self.steps = folder, folder / "out", steps
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "sources": self._sources()}}
        settings["training"] = {**SETTINGS["training"], "max_steps": steps, "checkpoint_every": checkpoint_every}
        self.config_file = folder / "train.yaml"
        self.config_file.write_text(yaml.safe_dump(settings))
        self.environment = {**os.environ, "SPOILT_STEPS": " ".join(map(str, spoilt)), "SAMPLES": str(folder)}
        self.environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def _sources(self):
        kinds = (("clips", "clip*.mp4"), ("images", "image*.png"))
        return [{"path": str(self.folder / kind / name), "kind": kind, "weight": 1} for kind, name in kinds]

    def start(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        line = shlex.join([sys.executable, str(PROGRAM), "--config", str(self.config_file), "--output", str(self.out)])
        script = f"RANK=0 LOCAL_RANK=0 {line} & first=$!; RANK=1 LOCAL_RANK=1 {line} & wait $first && wait $!"
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                ["sh", "-c", script],
                env={**self.environment, "MASTER_PORT": port},
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def metrics(self):
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self):
        return (self.folder / "log").read_text()

    def samples(self):
        """What each rank took, in order of time."""
        files = (self.folder / f"samples.rank{rank}.jsonl" for rank in range(2))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def expected(self):
        """What the order names for each step, from 1: the position of its first sample, and the files."""
        config = load_config(TrainVideoConfig, self.config_file, [])
        items, _ = split_held_out(list_training_items(config.data), config.data.held_out)
        schedule = make_schedule(config, items)
        named = {}
        for step in range(1, self.steps + 1):
            draw = schedule.at(step - 1)
            places = [draw.row.item(schedule.seed, draw.place + index) for index in range(draw.batch_size)]
            named[step] = draw.position, [draw.row.items[source][number].name for source, number in places]
        return named


def decoders(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


def kill_a_decoder(process, generator):
    try:
        victim = generator.choice(decoders(process))
        victim.kill()
    except (psutil.Error, IndexError):
        pass


def run_until(soak, process, step, generator, every):
    """Waits for a step, killing a decoder process every so many steps."""
    next_victim = len(soak.metrics()) + every
    for _ in range(12000):
        done = len(soak.metrics())
        if done >= step or process.poll() is not None:
            return
        if done >= next_victim:
            kill_a_decoder(process, generator)
            next_victim = done + every
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after ten minutes:\n{soak.log()[-3000:]}")


@pytest.mark.parametrize(
    ("steps", "checkpoint_every", "kill_after", "spoilt"),
    [
        (40, 5, (8, 17, 31), (11, 22, 23, 24)),
        pytest.param(300, 20, (47, 133, 221), (31, 90, 170, 171, 172, 250), marks=takes_minutes),
    ],
    ids=["short", "full"],
)
def test_a_run_survives(tmp_path, write_clip, steps, checkpoint_every, kill_after, spoilt):
    generator = random.Random(steps)
    for kind in ("clips", "images"):
        (tmp_path / kind).mkdir()
    for index in range(12):
        write_clip(tmp_path / "clips" / f"clip{index}.mp4", seed=index)
        pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"image{index}.png"), pixels)
    soak = Soak(tmp_path, steps, spoilt, checkpoint_every)
    expected = soak.expected()
    used = [Path(path) for _, paths in expected.values() for path in paths]
    broken = [next(path for path in used if path.suffix == suffix) for suffix in (".mp4", ".png")]
    for number, after in enumerate(kill_after):
        process = soak.start()
        run_until(soak, process, after, generator, every=max(3, steps // 30))
        time.sleep(generator.uniform(0.0, 0.5))
        assert process.poll() is None, soak.log()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if number < len(broken):
            broken[number].write_bytes(b"broken " * 100)
    process = soak.start()
    run_until(soak, process, steps + 1, generator, every=max(3, steps // 30))
    assert process.wait() == 0, soak.log()[-3000:]

    metrics, latest = soak.metrics(), soak.out / "checkpoints" / "latest"
    state = json.loads((latest / "trainer.json").read_text())
    assert state["step"] == steps
    assert [entry["step"] for entry in metrics] == list(range(1, steps + 1))
    assert state["faults"]["skipped"] == list(spoilt)
    assert metrics[-1]["skipped_steps"] == len(spoilt)
    [[first, last]] = state["faults"]["lost"]
    in_a_row = [step for step in spoilt if {step - 1, step + 1} & set(spoilt)]
    assert first <= in_a_row[0]
    assert last == in_a_row[-1]
    assert state["faults"]["updates"] == steps - (last - first + 1) - sum(not first <= s <= last for s in spoilt)
    _check_order(soak, expected)
    recorded = " ".join(file.read_text() for file in soak.out.glob("quarantine.*"))
    assert all(str(path) in recorded for path in broken)


@takes_minutes
def test_the_smc_decoder_stays_finite_in_bfloat16_with_the_gan_on(tmp_path, write_clip):
    (tmp_path / "clips").mkdir()
    for index in range(12):
        write_clip(tmp_path / "clips" / f"clip{index}.mp4", seed=index)
    soak = Soak(tmp_path, 1000, (), 500)
    settings = yaml.safe_load(soak.config_file.read_text())
    settings["data"]["sources"] = [str(tmp_path / "clips")]
    settings["gan"]["start_step"] = 0
    settings["deepspeed"]["bf16"] = {"enabled": True}
    soak.config_file.write_text(yaml.safe_dump(settings))
    process = soak.start()
    assert process.wait() == 0, soak.log()[-3000:]
    metrics = soak.metrics()
    assert len(metrics) == 1000
    assert metrics[-1]["skipped_steps"] == 0
    assert sum(entry["l1"] for entry in metrics[-20:]) < 0.5 * sum(entry["l1"] for entry in metrics[:20])


def _check_order(soak, expected):
    """Each start of each rank took what the order names, and together they took every step."""
    taken = []
    for rank, entries in enumerate(soak.samples()):
        for entry in entries:
            position, names = expected[entry["step"]]
            share = len(names) // 2
            assert entry["indices"] == list(range(rank * share, (rank + 1) * share))
            firsts = {place: path for place, attempt, path in entry["rejected"] if attempt == 0}
            named = [
                firsts.get(position + index, path) for index, path in zip(entry["indices"], entry["paths"], strict=True)
            ]
            assert named == [names[index] for index in entry["indices"]], entry
        steps = [entry["step"] for entry in entries]
        # Only a start goes back: to the step after a checkpoint, and on from there without a gap.
        assert all(b == a + 1 or b <= a for a, b in pairwise(steps))
        assert sum(b <= a for a, b in pairwise(steps)) <= 3
        taken.append(set(steps))
    assert taken == [set(expected)] * 2
