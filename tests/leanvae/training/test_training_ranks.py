"""Training as users start it: ranks, ZeRO stages and sudden death, each against one plain process.

All stages, with gradients and averages, are compared in `test_ranks_parity.py`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "train_video.py"
PATIENCE = Path(__file__).with_name("patience_program.py")
SETTINGS = {
    "model": {
        "low_channels": 8,
        "high_channels": 16,
        "num_stream_layers": 1,
        "num_fusion_layers": 1,
        "ista_layers": 1,
        "decoder_norm": "smc",
    },
    "data": {"num_frames": 5, "resolution": [32, 32], "num_workers": 1, "held_out": 0.2, "max_bad_share": 0.5},
    "losses": {"perceptual": "none"},
    "gan": {"discriminator": {"base_channels": 8, "num_layers": 2}, "start_step": 0},
    "optimizer": {"warmup_steps": 0, "learning_rate": 5e-4},
    "training": {"max_steps": 5, "batch_size": 4, "checkpoint_every": 1000, "validate_every": 1000, "start_samples": 8},
}
SAME = ("loss", "l1", "low_bands", "high_bands", "kl", "adversarial", "discriminator", "lecam")
TIMINGS = (
    "seconds_per_step",
    "step_seconds",
    "data_wait_share",
    "samples_per_second",
    "frames_per_second",
    "memory_mib",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, write_clip):
    """A folder of small clips, one of them broken."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(8):
        write_clip(folder / f"clip{index}.mp4", seed=index)
    (folder / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory, clips):
    """A function that gives the command line of a run into a folder."""
    config = tmp_path_factory.mktemp("config") / "train.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))

    def build(output, ranks=0, *overrides):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program = [sys.executable]
        if ranks:
            launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
            program += launcher
        settings = [f"data.sources=[{clips}]", *overrides]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        return [*program, str(SCRIPT), "--config", str(config), "--output", str(output), *flags]

    return build


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def train(command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(actual, expected, tolerance):
    assert [entry["step"] for entry in actual] == [entry["step"] for entry in expected]
    for a, b in zip(actual, expected, strict=True):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (a["step"], name)


@pytest.fixture(scope="module")
def plain_losses(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train(command(folder, 0, "training.engine=plain"))
    return metrics(folder)


def long_settings(stage):
    # Small weights stay whole on every rank under ZeRO-3 unless the threshold says otherwise.
    zero = f"deepspeed.zero_optimization={{stage: {stage}, stage3_param_persistence_threshold: 0}}"
    return [zero, "training.max_steps=26", "training.checkpoint_every=10"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A function that returns the folder of an undisturbed run, for a number of ranks and a ZeRO stage."""

    @cache
    def make(ranks, stage):
        folder = tmp_path_factory.mktemp(f"stage{stage}_ranks{ranks}")
        train(command(folder, ranks, *long_settings(stage)))
        return folder

    return make


def copy_without_end(folder, target):
    """Copies a run as a kill would have left it after its last but one checkpoint."""
    shutil.copytree(folder, target, symlinks=True)
    shutil.rmtree(target / "checkpoints" / "step_00000026")
    return target


@pytest.mark.parity
def test_runs_started_by_deepspeed_equal_one_plain_process(command, whole, tmp_path):
    train(command(tmp_path / "plain", 0, "training.engine=plain", "training.max_steps=26"))
    expected = metrics(tmp_path / "plain")[:5]
    assert len(expected) == 5
    for ranks, stage in ((1, 0), (2, 1), (2, 3)):
        assert_same_losses(metrics(whole(ranks, stage))[:5], expected, 1e-4)


@pytest.mark.parity
def test_accumulated_passes_equal_one_plain_process(command, plain_losses, tmp_path):
    train(command(tmp_path, 2, "deepspeed.zero_optimization.stage=2", "training.micro_batch_size=1"))
    assert_same_losses(metrics(tmp_path), plain_losses, 1e-4)


def test_bfloat16_trains(command, plain_losses, tmp_path):
    """All stages are compared in `test_ranks_parity.py`."""
    train(command(tmp_path, 2, "deepspeed={zero_optimization: {stage: 2}, bf16: {enabled: true}}"))
    for a, b in zip(metrics(tmp_path), plain_losses, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_killed_run_goes_on_as_if_undisturbed(command, whole, tmp_path, ranks, stage):
    expected = metrics(whole(ranks, stage))
    line = command(tmp_path / "killed", ranks, *long_settings(stage))
    for kill_after in (12, 23):
        process = subprocess.Popen(
            line, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_step(tmp_path / "killed", kill_after, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
    train(line)
    actual = metrics(tmp_path / "killed")
    for entry in (*actual, *expected):
        for name in TIMINGS:
            del entry[name]
        del entry["bad_clips"]  # known ones count from the first step after a resume
    assert actual == expected


def test_a_run_goes_on_with_another_number_of_ranks(command, whole, tmp_path):
    """All stages, both ways, are compared in `test_ranks_parity.py`; here the data go on, too, bad files included."""
    fewer = copy_without_end(whole(2, 2), tmp_path / "fewer")
    done = train(command(fewer, 0, *long_settings(2)))
    assert "number of ranks: 2 -> 1" in done.stderr
    assert_same_losses(metrics(fewer), metrics(whole(2, 2)), 1e-5)
    assert not list((fewer / "checkpoints").glob(".*"))


def wait_for_step(folder, step, process):
    """Returns once the run has written the figures of `step`."""
    for _ in range(3000):
        assert process.poll() is None, "the run ended by itself"
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} after a minute")


def test_ranks_end_with_their_launcher(command, tmp_path):
    """If only the launcher is killed, its ranks must save and end, because the next run waits for them."""
    line = command(tmp_path / "orphans", 2, "training.max_steps=100000")
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "orphans", 3, process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert len(gone) == 2
    state = json.loads((tmp_path / "orphans" / "checkpoints" / "latest" / "trainer.json").read_text())
    assert state["step"] == len(metrics(tmp_path / "orphans"))


def test_ranks_wait_for_held_out_files_that_the_main_one_decodes(command, whole, tmp_path):
    """At a resume DeepSpeed's own collectives follow, which give up after ten minutes."""
    slow = copy_without_end(whole(2, 3), tmp_path / "slow")
    train([str(PATIENCE) if word == str(SCRIPT) else word for word in command(slow, 2, *long_settings(3))])
    assert len(metrics(slow)) == 26


def is_rank(process):
    return str(SCRIPT) in process.cmdline() and any("local_rank" in word for word in process.cmdline())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("to_group", [False, True])
def test_signals_save_and_exit(command, tmp_path, number, status, to_group):
    # Long steps: the decoders are idle when the signal comes.
    wide = ["model.low_channels=64", "model.high_channels=192", "data.resolution=[64,64]"]
    line = command(tmp_path / "stopped", 0, "training.max_steps=100000", *wide)
    process = subprocess.Popen(
        line, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(tmp_path / "stopped", 3, process)
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == status
    state = json.loads((tmp_path / "stopped" / "checkpoints" / "latest" / "trainer.json").read_text())
    assert state["step"] == len(metrics(tmp_path / "stopped"))


def test_torchrun_starts_it_too(command, plain_losses, tmp_path):
    line = command(tmp_path, 0)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    train([line[0], *torchrun, *line[1:]])
    assert_same_losses(metrics(tmp_path), plain_losses, 1e-4)
