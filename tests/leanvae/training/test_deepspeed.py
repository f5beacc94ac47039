"""Requirements on DeepSpeed: it runs no code from checkpoints, and has the attributes in use."""

import os
import pickle
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from leanvae.training.deepspeed import _TESTED, check_attributes, refusing_code
from litevae.errors import MissingPackage


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_deepspeed_cannot_be_made_to_run_code(tmp_path, monkeypatch):
    """It asks torch.load for everything."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    torch.save({"x": torch.zeros(1), "code": Evil(str(tmp_path / "made"))}, tmp_path / "state.pt")
    with refusing_code(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"
    assert not (tmp_path / "made").exists()


class FakeEngine:
    """The checked part of a DeepSpeed engine; `without` names what is missing."""

    def __init__(self, stage, half, without):
        names = "gradient_accumulation_steps single_partition_of_fp32_groups fp32_partitioned_groups_flat"
        names += " grad_partitions_flat_buffer fp16_groups fp32_groups"
        self.basic_optimizer = self.micro_steps = 0
        self.optimizer = SimpleNamespace(**dict.fromkeys(names.split()))
        self._config = SimpleNamespace(load_universal_checkpoint=False)
        self.zero_optimization_stage, self.bfloat16_enabled = lambda: stage, lambda: half
        for owner in (self, self.optimizer, self._config):
            vars(owner).pop(without, None)


@pytest.mark.parametrize(
    ("stage", "half", "name"),
    [
        (0, False, "micro_steps"),
        (0, False, "load_universal_checkpoint"),
        (0, True, "fp32_groups"),
        (1, False, "gradient_accumulation_steps"),
        (2, True, "single_partition_of_fp32_groups"),
        (3, False, "fp32_partitioned_groups_flat"),
        (3, True, "grad_partitions_flat_buffer"),
    ],
)
def test_a_private_attribute_that_a_stage_needs_and_deepspeed_lacks_is_named(stage, half, name):
    """The parity tests show that the tested version has all of them."""
    check_attributes(FakeEngine(stage, half, None))
    version = re.escape(deepspeed.__version__)
    with pytest.raises(MissingPackage, match=rf"DeepSpeed {version} has no \w+\.{name}, .* stage {stage} .*<0\.20"):
        check_attributes(FakeEngine(stage, half, name))


def test_the_version_of_the_message_is_the_one_that_is_required():
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())
    assert _TESTED in project["project"]["optional-dependencies"]["train"]
