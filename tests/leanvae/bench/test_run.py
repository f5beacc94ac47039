"""Benchmark runs: order, budgets, interruptions, and processes that fail."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leanvae.bench import run as run_module
from leanvae.bench.child import _result_of, run_child
from leanvae.bench.floor import matrix_rate
from leanvae.bench.jobs import BenchRow, Results
from leanvae.bench.measure import failure_result, repeat
from leanvae.bench.plan import Estimator, common_side, plan
from leanvae.bench.run import Benchmark
from leanvae.bench.settings import BenchSettings

CPU = torch.device("cpu")
TIMING = {"median": 0.5, "quartiles": [0.4, 0.6], "repeats": 3, "warm_up": True, "peak_bytes": 1000}
RESULT = {"status": "ok", "encode": TIMING, "decode": TIMING, "parameters": 10, "wall_seconds": 1.0}
FACTORIES = """
import os, signal
from torch import nn

class Halver(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
    def encode(self, x):
        return self.down(x)
    def decode(self, latent):
        return self.up(latent)

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def settings(output: Path, **fields: Any) -> BenchSettings:
    chosen: dict[str, Any] = {
        "models": ("leanvae-c4", "leanvae-c4-smc"),
        "resolutions": ((16, 16), (32, 32)),
        "frames": (5,),
        "modes": ("whole",),
        "dtypes": ("float32",),
        "device": "cpu",
        "output": output,
        "budget": 600.0,
    }
    return BenchSettings(**{**chosen, **fields})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[BenchRow]:
    """The jobs that a run starts, none of which really runs; the machine's floors are invented."""
    jobs: list[BenchRow] = []

    def run(job: BenchRow, seconds: float, timeout: float | None) -> dict[str, Any]:
        jobs.append(job)
        return dict(RESULT)

    monkeypatch.setattr(run_module, "run_child", run)
    monkeypatch.setattr(run_module, "matrix_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(run_module, "memory_bandwidth", lambda device: 1e10)
    return jobs


def test_a_run_measures_every_job_once(tmp_path: Path, measured: list[BenchRow]) -> None:
    bench = Benchmark(settings(tmp_path))
    bench.run()
    assert len(measured) == len(set(measured)) == 4
    assert not bench.waiting()
    assert not bench.left_out
    Benchmark(settings(tmp_path)).run()
    assert len(measured) == 4


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, measured: list[BenchRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_module.run_child

    def interrupted(job: BenchRow, seconds: float, timeout: float | None) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return run(job, seconds, timeout)

    monkeypatch.setattr(run_module, "run_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Benchmark(settings(tmp_path)).run()
    monkeypatch.setattr(run_module, "run_child", run)
    with (tmp_path / "measurements.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"job": {"model": "cut sho')  # as a kill in the middle of writing leaves it
    bench = Benchmark(settings(tmp_path))
    bench.run()
    assert len(measured) == len(set(measured)) == 4
    assert list(Results(tmp_path / "measurements.jsonl").by_job) == measured


def test_what_has_no_time_is_left_out_and_time_already_spent_counts(tmp_path: Path, measured: list[BenchRow]) -> None:
    bench = Benchmark(settings(tmp_path, budget=20.0))
    bench.run()
    assert len(measured) == 0  # no job may take more than a quarter of the budget, and each starts a process
    assert len(bench.waiting()) == 4
    results = Results(tmp_path / "measurements.jsonl")
    results.add(next(iter(bench.ranks)), {**RESULT, "wall_seconds": 1000.0})
    Benchmark(settings(tmp_path)).run()
    assert len(measured) == 0


def test_another_machine_or_software_is_refused(tmp_path: Path, measured: list[BenchRow]) -> None:
    Benchmark(settings(tmp_path))
    path = tmp_path / "machine.json"
    machine = json.loads(path.read_text(encoding="utf-8"))
    machine["software"]["torch"] = "1.0"
    path.write_text(json.dumps(machine), encoding="utf-8")
    with pytest.raises(ValueError, match=r"torch was 1\.0.*choose another --output"):
        Benchmark(settings(tmp_path))


def test_modes_that_a_model_lacks_are_left_out_with_the_reason(tmp_path: Path, measured: list[BenchRow]) -> None:
    bench = Benchmark(settings(tmp_path, models=("litevae-s",), modes=("whole", "chunked"), resolutions=((16, 16),)))
    bench.run()
    assert [job.mode for job in measured] == ["whole"]
    assert bench.left_out == [{"what": "litevae-s, chunked", "reason": "it takes no chunks of frames"}]


def test_the_default_measures_every_model_first_then_table_3(tmp_path: Path) -> None:
    from leanvae.peers.registry import REGISTRY

    chosen = settings(tmp_path, models=tuple(REGISTRY), resolutions=None, frames=None, modes=None)
    ranks = chosen.jobs(REGISTRY.values(), common_side=96)
    second = [job for job, rank in ranks.items() if rank == 1]
    assert [(job.model, job.batch) for job in second] == [("sd-vae-nchw", 8), ("litevae-s", 8), ("litevae-b", 8)]
    every = {job.model for job, rank in ranks.items() if rank == 0}
    assert every == set(REGISTRY) - {"allegro"}  # it works at no size that small
    resolutions = {(job.height, job.width) for job in ranks if job.model == "leanvae-c4"}
    assert {(256, 256), (768, 768), (1080, 1920), (2160, 3840)} < resolutions


def job(side: int, model: str = "a", **fields: Any) -> BenchRow:
    return BenchRow(model, 1, side, side, **fields)


def estimator(rate: float = 1.0) -> Estimator:
    return Estimator(lambda job: (job.height, job.height), {"float32": rate / 0.3}, lambda job: 4.0)


def test_estimates_learn_from_what_was_measured() -> None:
    known = estimator()
    before = known.estimate(job(100))
    fast = {"median": 0.01}
    known.learn(job(10), {"status": "ok", "encode": fast, "decode": fast})
    assert known.estimate(job(100)) < before
    assert known.estimate(job(100, "b")) == known.estimate(job(100))  # for want of its own, that of others
    known.learn(job(10), {"status": "failed"})


def test_plan_keeps_to_rank_time_and_share() -> None:
    ranks = {job(3): 1, job(1): 1, job(2): 0, job(90): 0}
    assert plan(ranks, lambda job: job.height, None, None) == [job(2), job(90), job(1), job(3)]
    assert plan(ranks, lambda job: job.height, 100.0, 100.0) == [job(2), job(1), job(3)]
    assert plan(ranks, lambda job: job.height, 3.5, 100.0) == [job(2), job(1)]


def test_common_side_is_the_largest_that_all_have_time_for() -> None:
    def both(side: int) -> list[BenchRow]:
        return [job(side), job(side, "b")]

    def choose(seconds: float | None) -> int:
        return common_side(both, (256, 128, 64), lambda job: job.height, seconds)

    assert [choose(seconds) for seconds in (600, 300, 10, None)] == [256, 128, 64, 256]


def test_repeats_end_when_the_spread_is_small_and_a_slow_call_stands_alone() -> None:
    calls: list[int] = []

    def count() -> torch.Tensor:
        calls.append(1)
        return torch.zeros(1)

    summary, _ = repeat(count, CPU, seconds=0.5)
    assert summary["repeats"] == len(calls) - 1 >= 3
    assert summary["warm_up"]
    summary, result = repeat(count, CPU, seconds=0.0)
    assert (summary["repeats"], summary["warm_up"]) == (1, False)
    assert torch.equal(result, torch.zeros(1))


def test_matrix_rate_is_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvae.bench.floor._LONG_ENOUGH", 0.0)
    assert matrix_rate(torch.float32, CPU) > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (ValueError("wrong\nsize"), "failed"),
    ],
)
def test_failures_are_told_from_running_out_of_memory(error: BaseException, status: str) -> None:
    described = failure_result(error)
    assert described["status"] == status
    assert "\n" not in described["reason"]


def test_processes_that_end_without_a_result_are_rows() -> None:
    assert _result_of('noise\nRESULT {"status": "ok"}\n', "", 0) == {"status": "ok"}
    assert _result_of("", "", -signal.SIGKILL)["status"] == "out of memory"
    assert _result_of("", "a\nb", 3) == {"status": "crashed", "reason": "ended with status 3: a b"}


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "bench_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "bench_factories:{}".format


@pytest.mark.integration
def test_a_process_measures_time_and_memory(factories: Callable[[str], str]) -> None:
    result = run_child(job(512, factories("Halver")), seconds=0.2, timeout=120)
    assert result["status"] == "ok", result
    assert 0 < result["encode"]["median"] < 60
    # Of a 3 MiB image the encoder makes a latent of 1 MiB, which the decoder makes 3 MiB of.
    assert result["decode"]["peak_bytes"] > 2 * 2**20
    assert result["latent_elements"] == 4 * 256 * 256


@pytest.mark.integration
def test_a_crash_is_a_row(factories: Callable[[str], str]) -> None:
    result = run_child(job(64, factories("crash")), seconds=0.2, timeout=120)
    assert result["status"] == "crashed"
    assert "SIGSEGV" in result["reason"]
