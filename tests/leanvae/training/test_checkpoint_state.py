"""What is read of a checkpoint: nothing that runs code."""

import os
import pickle

import pytest
import torch

from leanvae.training.deepspeed import refusing_code


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
