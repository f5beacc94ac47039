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
from typing import TYPE_CHECKING, NoReturn

from leanvae.analysis_cli import add_analyse_arguments, run_analyse
from leanvae.bench import command as bench
from leanvae.evaluation import command as evaluation
from leanvae.latents import command as latents
from litevae.errors import LeanVAEError, WorkIncomplete

if TYPE_CHECKING:
    from leanvae.training.config import TrainImageConfig, TrainVideoConfig

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
    """Runs `main` as this process, and ends it with the status of that.

    A rank ends before the interpreter shuts down: threads of its process group may outlive the group, and abort the
    process ("terminate called without an active exception") if they let go of a tensor while Python is shutting down.
    """
    status = 1

    def end_rank() -> None:
        if "RANK" in os.environ:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(end_rank)  # called after those of all that a command imports
    try:
        status = main(command=command)
    except SystemExit as exit_:  # of argparse
        status = int(exit_.code or 0)
    sys.exit(status)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Parses the command line and runs a subcommand.

    Args:
        argv: the arguments; those of the process if None.
        command: the subcommand whose arguments they are; if None, the first argument names it.

    Returns:
        Exit status: 0 when all the work was done, 2 for a wrong command line, configuration, file or checkpoint
        (one line on stderr says which), 3 when some of the work could not be done, 130 when interrupted. A fault of
        the code raises, which ends the process with its traceback and 1.
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
        print(f"error: {error}", file=sys.stderr)
        return WORK_INCOMPLETE if isinstance(error, WorkIncomplete) else WRONG_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _log_to_stderr() -> None:
    """Shows the package's own log lines, and leaves the logs of other packages as they are."""
    logger = logging.getLogger("leanvae")
    if not logger.handlers:
        handler = _BarHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _BarHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record to stderr."""
        line = self.format(record)
        if (tqdm := sys.modules.get("tqdm")) is not None:
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _add_reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or published .ckpt file")
    parser.add_argument("--input", required=True, metavar="FILE_OR_DIR", help="clip, image, or folder of both")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights; default: as stored"
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="such as 6GiB, for the model's work besides its weights; default: what a device has free",
    )
    parser.add_argument("--strict", action="store_true", help="a file that has to be skipped is an error")


def _run_reconstruct(args: argparse.Namespace) -> int:
    import torch

    from leanvae.devices import find_device
    from leanvae.reconstruct import METRICS_FILE, reconstruct

    dtype = getattr(torch, args.dtype) if args.dtype else None
    report = reconstruct(
        args.checkpoint,
        args.input,
        args.output,
        find_device(args.device),
        dtype,
        memory_limit=args.memory_limit,
        strict=args.strict,
    )
    total = report["total"]
    measures = [
        "" if total["psnr"] is None else f", PSNR {total['psnr']:.2f} dB",
        "" if total["ssim"] is None else f", SSIM {total['ssim']:.4f}",
    ]
    print(
        f"{total['files']} reconstructed, {total['skipped']} skipped, {total['frames']} frames{''.join(measures)}:"
        f" {args.output}/{METRICS_FILE}"
    )
    return 0


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override of a setting; may be repeated",
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run; default: training.output of the config")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|none|DIR", help="where to go on from; default: %(default)s"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole configuration, the first steps, and an estimate of parameters and memory; train nothing",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="of a dry run: ranks to plan for; default: those that are started"
    )
    # The launchers of DeepSpeed and torch pass it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _run_train_video(args: argparse.Namespace) -> int:
    _keep_threads_from_spinning()

    from leanvae.training.config import TrainVideoConfig

    return _train(TrainVideoConfig, args)


def _run_train_image(args: argparse.Namespace) -> int:
    _keep_threads_from_spinning()

    from leanvae.training.config import TrainImageConfig

    return _train(TrainImageConfig, args)


def _train(config_class: "type[TrainVideoConfig] | type[TrainImageConfig]", args: argparse.Namespace) -> int:
    if args.dry_run:
        from leanvae.config import load_config
        from leanvae.training.dry_run import describe_run

        if int(os.environ.get("RANK", "0")) == 0:
            ranks = args.ranks or int(os.environ.get("WORLD_SIZE", "1"))
            print(describe_run(load_config(config_class, args.config, args.set), ranks))
        return 0

    from leanvae.training.loop import train

    return train(config_class, args.config, args.set, args.output, args.resume)


def _keep_threads_from_spinning() -> None:
    """Decoder processes share a CPU's cores with torch, whose threads would spin through their share while waiting
    for each other; it reads this when it is first imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


COMMANDS = {
    "analyse": Command(
        "Compare image autoencoders: latent space, feature maps, and quality against resolution.",
        add_analyse_arguments,
        run_analyse,
    ),
    "bench_res": Command(bench.SUMMARY, bench.add_arguments, bench.run),
    "decode_latents": Command(latents.DECODE_SUMMARY, latents.add_decode_arguments, latents.run_decode),
    "encode_clips": Command(latents.ENCODE_SUMMARY, latents.add_encode_arguments, latents.run_encode),
    "evaluate": Command(evaluation.SUMMARY, evaluation.add_arguments, evaluation.run),
    "reconstruct": Command(
        "Encode and decode a clip, an image, or a folder of both, and measure PSNR and SSIM.",
        _add_reconstruct_arguments,
        _run_reconstruct,
    ),
    "store": Command(latents.STORE_SUMMARY, latents.add_store_arguments, latents.run_store),
    "train_video": Command(
        "Train a video autoencoder; start it with deepspeed, torchrun or plain python.",
        _add_train_arguments,
        _run_train_video,
    ),
    "train_image": Command(
        "Train an image autoencoder; start it with deepspeed, torchrun or plain python.",
        _add_train_arguments,
        _run_train_image,
    ),
}
