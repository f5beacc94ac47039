"""Errors that a user can act on, and the message for a package that is not installed.

The command line shows a `LeanVAEError` in one line. Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

RAISED_ON_MAIN = "raised on the main rank"  # note of an error that other ranks raise again

_OURS = ("leanvae", "litevae")


class LeanVAEError(Exception):
    """Parent of all our errors; the message says what is wrong, where, and what is expected."""


class InvalidInput(LeanVAEError, ValueError):
    """An argument, a setting or a file does not follow a rule."""


class MissingFile(LeanVAEError, FileNotFoundError):
    """A file or folder does not exist."""


class MissingPackage(LeanVAEError, ImportError):
    """A package that this work needs is not installed; the message says how to install it."""


class NotFinite(LeanVAEError, ValueError):
    """Weights, or a model's results, are infinite or NaN."""


class TrainingDiverged(LeanVAEError, RuntimeError):
    """Training cannot continue: steps are still not finite after the allowed number of rollbacks."""


class WorkIncomplete(LeanVAEError):
    """Some of the work could not be done; the message lists what is missing. The rest is done."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of an optional dependency group: `with extra("video"): import av`.

    Args:
        name: a group of `[project.optional-dependencies]` in pyproject.toml.

    Raises:
        MissingPackage: one of the packages is not installed.
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, LeanVAEError) or (error.name or "").partition(".")[0] in _OURS:
            raise
        raise MissingPackage(f"{error.name or error} is not installed: pip install 'leanvae[{name}]'") from error
