"""The work-around for a torchvision without its operators."""

import importlib

import pytest

from litevae.torchvision_compat import prepare_torchvision


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_prepare_torchvision_makes_what_needs_it_importable() -> None:
    if prepare_torchvision():
        assert hasattr(importlib.import_module("torchvision"), "models")
    assert prepare_torchvision() == prepare_torchvision()
    assert importlib.import_module("torchmetrics.functional.image")


def test_prepare_torchvision_tells_that_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, ModuleNotFoundError("No module named 'torchvision'", name="torchvision"))
    assert not prepare_torchvision()


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'PIL'", name="PIL"), RuntimeError("other")])
def test_prepare_torchvision_hides_no_other_fault(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _fail_with(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        prepare_torchvision()
