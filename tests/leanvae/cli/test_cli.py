"""The command line: flags, exit status and what is printed for wrong input."""

import argparse
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanvae.cli import main as cli
from leanvae.config import ConfigError
from litevae.errors import (
    RAISED_ON_MAIN,
    InvalidInput,
    MissingFile,
    MissingPackage,
    NotFinite,
    TrainingDiverged,
    WorkIncomplete,
    extra,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """Remove the handler that the command line adds to the package's logger."""
    logger = logging.getLogger("leanvae")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of a stand-in for training."""
    calls: list[dict[str, Any]] = []

    def train(config_class: type, *arguments: Any) -> int:
        names = ("config", "overrides", "output", "resume")
        calls.append({"class": config_class.__name__, **dict(zip(names, arguments, strict=True))})
        return 0

    loop = types.ModuleType("leanvae.training.loop")
    loop.train = train  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "leanvae.training.loop", loop)
    return calls


def _use(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Add a subcommand `fail` that raises."""

    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("fails", lambda _: None, run))


@pytest.mark.parametrize(
    ("name", "config_class"),
    [("train_video", "TrainVideoConfig"), ("train-video", "TrainVideoConfig"), ("train_image", "TrainImageConfig")],
)
def test_main_passes_the_flags_of_training_on(trained: list[dict[str, Any]], name: str, config_class: str) -> None:
    flags = ["--config", "a.yaml", "--set", "data.sources=[x]", "--set=training.seed=1", "--output", "out"]
    assert cli.main([name, *flags, "--resume", "none"]) == 0
    assert trained == [
        {
            "class": config_class,
            "config": "a.yaml",
            "overrides": ["data.sources=[x]", "training.seed=1"],
            "output": "out",
            "resume": "none",
        }
    ]


@pytest.mark.parametrize("flags", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], []])
def test_main_accepts_what_launchers_add(trained: list[dict[str, Any]], flags: list[str]) -> None:
    assert cli.main([*flags, "--config", "a.yaml"], command="train_video") == 0
    (call,) = trained
    assert (call["config"], call["overrides"], call["output"], call["resume"]) == ("a.yaml", [], None, "auto")


def test_main_prints_expected_errors_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.mp4"
    flags = ["reconstruct", "--checkpoint", str(tmp_path), "--input", str(missing), "--output", str(tmp_path / "out")]
    assert cli.main(flags) == 2
    assert capsys.readouterr().err == f"error: no file or folder at {missing}\n"


def test_main_keeps_the_traceback_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in (RuntimeError("fault"), ValueError("not ours"), ModuleNotFoundError("gone"), OSError("no file named")):
        _use(monkeypatch, fault)
        with pytest.raises(type(fault)):
            cli.main(["fail"])


def test_main_keeps_the_traceback_of_a_value_error_raised_in_our_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule broken by our own code is a bug, not the user's input."""

    def run(_: argparse.Namespace) -> int:
        from leanvae.data.order import phase_at

        phase_at([], -1)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("fails", lambda _: None, run))
    with pytest.raises(ValueError, match="steps count from 0"):
        cli.main(["fail"])


def test_main_prints_declared_errors_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> int:
        from leanvae.config import apply_override

        apply_override({}, "novalue")
        return 0

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("fails", lambda _: None, run))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err.startswith("error: --set 'novalue'")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((kind("of our own kind"), 2) for kind in (ConfigError, MissingFile, MissingPackage, NotFinite)),
        (TrainingDiverged("of our own kind"), 2),
        (WorkIncomplete("of our own kind"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_main_gives_each_declared_error_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    _use(monkeypatch, error)
    assert cli.main(["fail"]) == status
    assert capsys.readouterr().err == "error: of our own kind\n"


def test_a_file_that_cannot_be_opened_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _use(monkeypatch, PermissionError(13, "Permission denied", "a.mp4"))
    assert cli.main(["fail"]) == 2
    assert "a.mp4" in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    with (
        pytest.raises(MissingPackage, match=r"no_such_package is not installed: pip install 'leanvae\[video\]'"),
        extra("video"),
    ):
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


def test_a_module_of_ours_that_is_missing_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"leanvae\.no_such_module"), extra("video"):
        import leanvae.no_such_module  # noqa: F401  # pyright: ignore[reportMissingImports]


def test_main_ends_an_interrupted_run_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, KeyboardInterrupt())
    assert cli.main(["fail"]) == 130


PROGRAM_THAT_FAILS_AT_SHUTDOWN = """
import atexit, os
from leanvae.cli import main as cli

class AbortsWhenFreed:
    def __del__(self, abort=os.abort):
        abort()

aborts = AbortsWhenFreed()

def run(arguments):
    atexit.register(print, "cleaned up")
    return 3

cli.COMMANDS[COMMAND] = cli.Command("fails", lambda parser: None, run)
cli.run_program(COMMAND)
"""


@pytest.mark.parametrize(("flags", "status", "output"), [([], 3, "cleaned up\n"), (["--unknown"], 2, "")])
def test_only_training_ranks_end_with_their_status_before_the_interpreter_shuts_down(
    flags: list[str], status: int, output: str
) -> None:
    for name, expected in (("train_video", status), ("encode_clips", -signal.SIGABRT)):
        program = f"COMMAND = {name!r}\n{PROGRAM_THAT_FAILS_AT_SHUTDOWN}"
        command = [sys.executable, "-c", program, *flags]
        done = subprocess.run(command, env={**os.environ, "RANK": "0"}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (expected, output), done.stderr


def test_main_refuses_unknown_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["reconstruct", "--check", "x", "--input", "y", "--output", "z"])
    assert "--checkpoint" in capsys.readouterr().err


def test_cli_imports_nothing_heavy() -> None:
    program = "import sys, leanvae.cli.main; print(sorted({'torch', 'numpy', 'av', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("reconstruct.py", "--strict"),
        ("evaluate.py", "--strict"),
        ("train_video.py", "--resume"),
        ("train_image.py", "--set"),
        ("analyse.py", "--strict"),
    ],
)
def test_scripts_show_their_flags(script: str, flag: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert flag in done.stdout
    assert script in done.stdout
    assert "local_rank" not in done.stdout


def test_reconstruct_command_prints_the_measures_and_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from leanvae import LeanVAE, LeanVAEConfig
    from leanvae.media.writer import write_png

    LeanVAE(LeanVAEConfig(low_channels=4, high_channels=4)).save_pretrained(tmp_path / "model")
    write_png(tmp_path / "a.png", np.full((16, 24, 3), 90, np.uint8))
    flags = ["--checkpoint", f"{tmp_path}/model", "--input", f"{tmp_path}/a.png", "--output", f"{tmp_path}/out"]
    assert cli.main(flags, command="reconstruct") == 0
    out, err = capsys.readouterr()
    assert "1 reconstructed, 0 skipped" in out
    assert f"{tmp_path}/out/metrics.json" in out
    assert "[1/1] a.png: " in err


@pytest.mark.parametrize(
    ("error", "ranks"),
    [
        (InvalidInput("a"), [0, 1]),  # may be of one rank alone
        (ConfigError("a"), [0]),
        (WorkIncomplete("a"), [0]),
        (NotFinite("a"), [0, 1]),
    ],
)
def test_ranks_do_not_repeat_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, ranks: list[int]
) -> None:
    _use(monkeypatch, error)
    printed = {}
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert cli.main(["fail"]) in (2, 3)
        printed[rank] = capsys.readouterr().err
    assert printed == {rank: "error: a\n" if rank in ranks else "" for rank in (0, 1)}
    error.add_note(RAISED_ON_MAIN)
    assert cli.main(["fail"]) in (2, 3)
    assert capsys.readouterr().err == ""
