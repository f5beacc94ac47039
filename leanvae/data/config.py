"""What to train on: the ``data:`` block of a training configuration."""

import os
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from litevae.config import StrictConfig

BUILTIN = "builtin"


class SourceError(ValueError):
    """A data source is missing, empty, broken or wrongly written; the message names it and the place in it."""


class SourceConfig(StrictConfig):
    """One data source.

    Attributes:
        path: a folder, a glob, one file, a text list (``.txt``), a CSV with a ``path`` column, or ``builtin``; for
            images also ``.tar`` shards, several at once as in ``shard-{000000..000012}.tar``.
        weight: how many draws the source gets relative to the others; without one, each file is drawn once
            an epoch.
    """

    path: str = Field(min_length=1)
    weight: float | None = Field(default=None, gt=0)


class DataConfig(StrictConfig):
    """Where training files come from and how they are read: what clips and images share.

    Attributes:
        sources: paths, or paths with weights; ``builtin`` is made of photographs of installed packages.
        resolution: (height, width) in pixels, or one number for both; pictures are resized to cover it, then
            cropped.
        flip: mirror half of the training samples left to right.
        held_out: share of the files kept from training, chosen by a hash of the file name.
        max_bad_share: share of the training files that may turn out unusable before the run stops.
        timeout: seconds that decoding one file may take.
        num_workers: decoder processes of each rank.
        prefetch: training steps that decoding runs ahead.
        cache_dir: folder for the built-in clips; by default ``$XDG_CACHE_HOME/leanvae`` or
            ``~/.cache/leanvae``.
    """

    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig(path=BUILTIN),), min_length=1)
    resolution: tuple[int, int] = (256, 256)
    flip: bool = True
    held_out: float = Field(default=0.1, ge=0, lt=1)
    max_bad_share: float = Field(default=0.25, ge=0, le=1)
    timeout: float = Field(default=30.0, gt=0)
    num_workers: int = Field(default=2, ge=1)
    prefetch: int = Field(default=2, ge=1)
    cache_dir: str | None = None

    @field_validator("sources", mode="before")
    @classmethod
    def _accept_plain_paths(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            raise ValueError("expected a list of paths, as in [clips, more/*.mp4]")
        return [{"path": item} if isinstance(item, str) else item for item in value]

    @field_validator("resolution", mode="before")
    @classmethod
    def _accept_one_number(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("resolution")
    @classmethod
    def _check_resolution(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("height and width must be at least 1 pixel")
        return value

    @model_validator(mode="after")
    def _check_weights(self) -> "DataConfig":
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            missing = next(source.path for source in self.sources if source.weight is None)
            raise ValueError(f"sources: give every source a weight or none; {missing!r} has none")
        return self

    @property
    def cache_folder(self) -> Path:
        """The folder for what is made once and kept."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanvae"


class ClipDataConfig(DataConfig):
    """The ``data:`` block of a video autoencoder.

    Attributes:
        num_frames: frames of a clip.
        stride: every how many frames of the file one is taken.
    """

    num_frames: int = Field(default=17, ge=1)
    stride: int = Field(default=1, ge=1)

    @property
    def span(self) -> int:
        """Frames of the file from a clip's first to its last."""
        return (self.num_frames - 1) * self.stride + 1


class ImageDataConfig(DataConfig):
    """The ``data:`` block of an image autoencoder."""


def source_weights(config: DataConfig, sizes: list[int]) -> list[float]:
    """The sources' weights: as configured, or each source's number of files (or parts of files)."""
    weights = [source.weight for source in config.sources]
    return [float(size) if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
