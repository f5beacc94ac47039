"""The promises of the layout: imports between packages, the cost of an import, and safe unpickling."""

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


# Who may import whom: a package only what stands in a group to its left. Members of one group do not import each other,
# except that modules in a tuple may import those before them in it.
LAYERS: list[list[str | tuple[str, ...]]] = [
    ["litevae"],
    ["media", ("distributed", "progress")],
    [("kernels", "config", "ops", "surroundings", "naf", "patchify", "bottleneck", "network")],
    ["inference"],
    [("model", "named", "checkpoint", "diffusers")],
    ["data", "metrics", "coder"],
    ["peers"],
    ["latents"],
    ["training"],
    ["evaluation"],
    ["bench", "reconstruct"],
    ["cli"],
]
TORCH_FREE = ["media"]
TORCH_MODULES = {"leanvae.media.nvdec"}  # torchcodec is torch's


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree: ast.AST) -> set[str]:
    """Top-level names of absolute imports, including those inside functions."""
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


def unit_of(module: str) -> str:
    """The package or top-level module of leanvae to which a module belongs; `litevae` for all of litevae."""
    parts = module.split(".")
    return parts[0] if parts[0] == "litevae" or len(parts) == 1 else parts[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Our modules that a file imports, including inside functions and under TYPE_CHECKING."""
    modules = {module_of(other) for other in SOURCES}
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in modules} - {"leanvae", "litevae"}


def may_import(importer: str, imported: str) -> bool:
    """Tell whether the layers allow an import."""
    if importer == imported:
        return True
    places = {}
    for depth, group in enumerate(LAYERS):
        for member in group:
            names = member if isinstance(member, tuple) else (member,)
            places |= {name: (depth, member, number) for number, name in enumerate(names)}
    if importer not in places or imported not in places:
        return False
    (depth, member, number), (other_depth, other_member, other_number) = places[importer], places[imported]
    return other_depth < depth or (member is other_member and other_number < number)


def wrong_imports() -> set[str]:
    return {
        f"{module_of(path)} imports {imported}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "leanvae") and path.parent.name + path.stem != "leanvae__init__"
        for imported in imported_modules(path)
        if not may_import(unit_of(module_of(path)), unit_of(imported))
    }


def test_packages_import_only_from_their_left():
    assert sorted(wrong_imports()) == []


def test_no_circle_of_imports():
    graph = {module_of(path): imported_modules(path) for path in SOURCES}
    for package in ("leanvae", "litevae"):
        graph[package] = set()  # they import their public names when these are asked for
    done: set[str] = set()
    circles = []

    def visit(trail: list[str]) -> None:
        for other in sorted(graph.get(trail[-1], ())):
            if other in trail:
                circles.append(" -> ".join([*trail[trail.index(other) :], other]))
            elif other not in done:
                visit([*trail, other])
        done.add(trail[-1])

    for module in sorted(graph):
        if module not in done:
            visit([module])
    assert circles == []


def test_top_level_of_leanvae_is_short():
    assert len(list((ROOT / "leanvae").glob("*.py"))) <= 16


@pytest.mark.parametrize("package", TORCH_FREE)
def test_package_imports_no_torch(package):
    code = f"""
import importlib, pkgutil, sys
import leanvae.{package} as package
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    if module.name not in {TORCH_MODULES}:
        importlib.import_module(module.name)
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


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
def test_unsafe_reads_are_recognized(code):
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
