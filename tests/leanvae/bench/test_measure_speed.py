"""measure_speed leaves out what a processor cannot do, and says so."""

import os
import subprocess
import sys

import pytest
import torch

from leanvae.bench import measure_speed

# They make a processor with AVX-512 bfloat16 behave like one without.
WITHOUT_BFLOAT16 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def test_products_that_a_processor_has_not_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_speed, "can_pack", lambda weight: weight.dtype == torch.float32)
    monkeypatch.setattr(measure_speed, "make_works", lambda *_: {"encode": int, "decode": int})
    monkeypatch.setattr(measure_speed, "peak_memory", lambda *_: 2**20)
    measure_speed.measure_whole((5, 16, 16), rounds=1)
    out = capsys.readouterr().out
    assert "bare products in bfloat16: left out, because oneDNN has no packed products for it" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| encode")]
    over_products = {row[1]: row[4].strip(" |") for row in rows}
    assert over_products["prepared, bfloat16"] == "-"
    assert float(over_products["prepared, float32"]) >= 0
    assert "products, bfloat16" not in over_products


@pytest.mark.slow
def test_operations_are_measured_without_bfloat16_instructions() -> None:
    command = [sys.executable, "-m", "leanvae.bench.measure_speed", "operations", "--size", "5x16x16", "--rounds", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **WITHOUT_BFLOAT16}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "expand and GEGLU in bfloat16: left out" in done.stdout
    assert done.stdout.count("| expand and GEGLU |") == 1
    assert done.stdout.count("| contract |") == 2
