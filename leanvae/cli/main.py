"""The command line: the console script `leanvae` with its subcommands, which are also the files in scripts/.

Nothing heavy is imported before a subcommand runs: processes that a run starts import the main script again.
"""

import argparse
import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from leanvae.cli import analyse, bench, decode, encode, evaluate, reconstruct, store, train
from litevae.errors import RAISED_ON_MAIN, LeanVAEError, WorkIncomplete

WRONG_INPUT, WORK_INCOMPLETE = 2, 3  # exit status


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: one line for the help.
        add_arguments: adds its flags to a parser.
        run: does the work; returns the exit status.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def run_program(command: str | None = None) -> NoReturn:
    """Run `main` as this process, and end it with its status.

    A training rank ends before the interpreter shuts down. Threads of its process group may outlive the group, and
    abort the process ("terminate called without an active exception") if they release a tensor during the shutdown.
    """
    status = 1
    name = command or "".join(sys.argv[1:2])
    is_training = name.replace("-", "_") in ("train_video", "train_image")

    def end_rank() -> None:
        if is_training and "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(end_rank)  # registered first, so that it runs after those of a command's imports
    try:
        status = main(command=command)
    except SystemExit as exit_:  # from argparse
        status = int(exit_.code or 0)
    sys.exit(status)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Parse the command line and run a subcommand.

    Args:
        argv: the arguments; None means those of the process.
        command: the subcommand that gets them; None means that the first argument names it.

    Returns:
        Exit status: 0 if all the work was done, 2 for a wrong command line, configuration, file or checkpoint (a line
        on stderr says which), 3 if some of the work could not be done, 130 if interrupted. A bug raises an exception,
        which ends the process with a traceback and 1.
    """
    if command is None:
        parser = argparse.ArgumentParser(prog="leanvae", description="Image and video autoencoders.")
        subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, entry in COMMANDS.items():
            aliases = [name.replace("_", "-")] if "_" in name else []
            subparser = subparsers.add_parser(
                name, aliases=aliases, help=entry.summary, description=entry.summary, allow_abbrev=False
            )
            entry.add_arguments(subparser)
            subparser.set_defaults(run=entry.run)
    else:
        entry = COMMANDS[command]
        parser = argparse.ArgumentParser(description=entry.summary, allow_abbrev=False)
        entry.add_arguments(parser)
        parser.set_defaults(run=entry.run)
    args = parser.parse_args(argv)
    _log_to_stderr()
    try:
        return args.run(args)
    except LeanVAEError as error:
        _print_error(error)
        return WORK_INCOMPLETE if isinstance(error, WorkIncomplete) else WRONG_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(error)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_error(error: Exception) -> None:
    """Print an error in one line, unless another rank prints the same one."""
    if RAISED_ON_MAIN in getattr(error, "__notes__", ()):
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        from leanvae.config import ConfigError

        if isinstance(error, ConfigError | WorkIncomplete):  # the same on all ranks of a node
            return
    print(f"error: {error}", file=sys.stderr)


def _log_to_stderr() -> None:
    """Show the package's own log lines, without changing those of other packages."""
    logger = logging.getLogger("leanvae")
    if not logger.handlers:
        handler = _BarHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _BarHandler(logging.Handler):
    """A handler that prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record to stderr."""
        line = self.format(record)
        if (tqdm := sys.modules.get("tqdm")) is not None:
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "analyse": Command(analyse.SUMMARY, analyse.add_arguments, analyse.run),
    "bench_res": Command(bench.SUMMARY, bench.add_arguments, bench.run),
    "decode_latents": Command(decode.SUMMARY, decode.add_arguments, decode.run),
    "encode_clips": Command(encode.SUMMARY, encode.add_arguments, encode.run),
    "evaluate": Command(evaluate.SUMMARY, evaluate.add_arguments, evaluate.run),
    "reconstruct": Command(reconstruct.SUMMARY, reconstruct.add_arguments, reconstruct.run),
    "store": Command(store.SUMMARY, store.add_arguments, store.run),
    "train_video": Command(train.VIDEO_SUMMARY, train.add_arguments, train.run_video),
    "train_image": Command(train.IMAGE_SUMMARY, train.add_arguments, train.run_image),
}
