"""The subcommands `train_video` and `train_image`."""

import argparse
from typing import TYPE_CHECKING

from leanvae.cli.flags import add_local_rank, keep_threads_from_spinning

if TYPE_CHECKING:
    from leanvae.training.config import TrainImageConfig, TrainVideoConfig

VIDEO_SUMMARY = "Train a video autoencoder; start it with deepspeed, torchrun or plain python."
IMAGE_SUMMARY = "Train an image autoencoder; start it with deepspeed, torchrun or plain python."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both subcommands."""
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
        "--resume", default="auto", metavar="auto|none|DIR", help="checkpoint to resume from; default: %(default)s"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole configuration, the first steps, and an estimate of parameters and memory; train nothing",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks to plan a dry run for; default: those that are started"
    )
    add_local_rank(parser)


def run_video(args: argparse.Namespace) -> int:
    """Train a video autoencoder; return the exit status."""
    keep_threads_from_spinning()

    from leanvae.training.config import TrainVideoConfig

    return _train(TrainVideoConfig, args)


def run_image(args: argparse.Namespace) -> int:
    """Train an image autoencoder; return the exit status."""
    keep_threads_from_spinning()

    from leanvae.training.config import TrainImageConfig

    return _train(TrainImageConfig, args)


def _train(config_class: "type[TrainVideoConfig] | type[TrainImageConfig]", args: argparse.Namespace) -> int:
    if args.dry_run:
        from leanvae.config import load_config
        from leanvae.distributed import rank, world_size
        from leanvae.training.dry_run import run_summary

        if rank() == 0:
            ranks = args.ranks or world_size()
            print(run_summary(load_config(config_class, args.config, args.set), ranks))
        return 0

    from leanvae.training.loop import train

    return train(config_class, args.config, args.set, args.output, args.resume)
