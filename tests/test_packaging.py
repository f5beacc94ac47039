"""The promised versions are the tested ones: pyproject.toml, constraints.txt, CI and README agree."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MINIMUM = PROJECT["project"]["requires-python"].removeprefix(">=")


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_normal(name): Version(version) for name, version in pinned}


def requirements() -> list[Requirement]:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    parsed = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in parsed if requirement.name != PROJECT["project"]["name"]]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_python_minimum_is_the_same_everywhere():
    stated = {
        "ruff": PROJECT["tool"]["ruff"]["target-version"],
        "pyright": PROJECT["tool"]["pyright"]["pythonVersion"],
    }
    assert stated == {"ruff": f"py{MINIMUM.replace('.', '')}", "pyright": MINIMUM}
    assert f"Python {MINIMUM} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert sys.version_info >= tuple(map(int, MINIMUM.split(".")))


def test_ci_runs_the_python_minimum():
    assert f"python{MINIMUM}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_constraints_are_for_one_python():
    assert "python_version" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pinned_version_satisfies_the_requirement(requirement):
    pinned = pins().get(_normal(requirement.name))
    if pinned is None:  # installed by nobody who runs the tests
        assert requirement.name in {"torchcodec"}
    else:
        assert pinned in SpecifierSet(str(requirement.specifier), prereleases=True)


def test_media_is_written_with_the_versions_that_are_promised():
    """The writer uses names that PyAV has since version 18."""
    (av,) = {requirement.specifier for requirement in requirements() if requirement.name == "av"}
    assert not av.contains("17.1.0")
    assert av.contains("18.0.0")


def test_files_that_are_not_code_are_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("leanvae", "litevae"):
        others = [path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
        names = [path.relative_to(ROOT / package) for path in others]
        assert [name for name in names if not any(name.match(pattern) for pattern in patterns[package])] == []
    assert Path("weights/lean-small-c16/model.safetensors").match("weights/*/*")
    assert "weights/*/*" in patterns["leanvae"]
