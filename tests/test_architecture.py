"""What the layout promises: who imports whom, what an import costs, and that nothing unsafe is unpickled."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("leanvae", "litevae", "scripts") for path in (ROOT / folder).rglob("*.py"))
LITEVAE = [path for path in SOURCES if path.is_relative_to(ROOT / "litevae")]
SCRIPTS = [path for path in SOURCES if path.is_relative_to(ROOT / "scripts")]

# litevae knows nothing of time, files or processes.
FORBIDDEN_IN_LITEVAE = {"leanvae", "deepspeed", "decord", "decord2", "av", "cv2", "torchcodec"}
HEAVY = ["torch", "numpy", "deepspeed", "av", "cv2", "decord", "torchvision", "lpips", "pydantic", "matplotlib"]
MAX_SCRIPT_LINES = 40
UNSAFE_CALLS = {
    *(f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle") for name in ("load", "loads", "Unpickler")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all")),
    "torch.jit.load",
    "joblib.load",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level names of absolute imports, those inside functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` gives t: torch."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unsafe_reads(tree: ast.AST) -> list[str]:
    """Calls that would unpickle or construct arbitrary objects, each with its line."""
    aliases = full_names(tree)
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, dot, rest = ast.unparse(call.func).partition(".")
        name = aliases.get(first, first) + dot + rest
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            name in UNSAFE_CALLS
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (name in {"numpy.load", "np.load"} and options.get("allow_pickle", "False") != "False")
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("path", LITEVAE, ids=relative)
def test_litevae_imports_no_video_files_or_processes(path):
    assert imported_packages(parse(path)).isdisjoint(FORBIDDEN_IN_LITEVAE)


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_SCRIPT_LINES


def test_no_file_is_a_drawer_for_leftovers():
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [relative(path) for path in SOURCES if path.stem in drawers] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_read_unsafely(path):
    assert unsafe_reads(parse(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "import torch as t\nt.load(f)",
        "from torch import load\nload(f)",
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "from pickle import loads\nloads(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
    ],
)
def test_unsafe_reads_are_recognised(code):
    assert len(unsafe_reads(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code", ["torch.load(f, weights_only=True)", "yaml.safe_load(f)", "import json\njson.load(f)", "vae.load(f)"]
)
def test_safe_reads_are_left_alone(code):
    assert unsafe_reads(ast.parse(code)) == []


@pytest.mark.parametrize("package", ["leanvae", "litevae"])
def test_import_of_a_package_is_light(package):
    code = f"import sys, {package}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


def test_public_names_are_importable():
    import leanvae

    assert all(hasattr(leanvae, name) for name in leanvae.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leanvae.nothing
