"""What to train on: the ``data:`` block of a training configuration."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from leanvae.data.buckets import Bucket, Shape
from leanvae.media.item import BUILTIN, Hdr, cache_folder
from litevae.config import StrictConfig


class SourceConfig(StrictConfig):
    """One data source.

    Attributes:
        path: a folder, a glob, one file, a text list (``.txt``), a CSV with a ``path`` column, or ``builtin``; for
            images also ``.tar`` shards, several at once as in ``shard-{000000..000012}.tar``.
        kind: `clips`, or `images`; those of the other samples by default. A video model takes both: images are
            clips of one frame for it.
        weight: how many draws the source gets relative to the others; without one, each file is drawn once
            an epoch.
    """

    path: str = Field(min_length=1)
    kind: Literal["clips", "images"] | None = None
    weight: float | None = Field(default=None, gt=0)


class DataConfig(StrictConfig):
    """Where training files come from and how they are read: what clips and images share.

    Attributes:
        sources: paths, or paths with weights; ``builtin`` is made of photographs of installed packages.
        resolution: (height, width) in pixels, or one number for both; pictures are resized to cover it, then
            cropped.
        buckets: shapes in place of the resolution, as in ``[17x256x256, 17x192x320, 1x512x512]``; each file goes
            to one by its own shape, which is read before training where there is a choice. Those with one frame are
            for images.
        short_side: pictures are resized to at least this many pixels on their short side before they are cropped, so
            that small crops show them at the scale at which the model will be used; by default only as many as the
            crop needs.
        flip: mirror half of the training samples left to right.
        held_out: share of the files kept from training, chosen by a hash of the file name.
        max_bad_share: share of the training files that may turn out unusable before the run stops.
        timeout: seconds that a decoder process may be silent: each frame that it decodes counts as a sign of life.
        num_workers: decoder processes of each rank.
        prefetch: training steps that decoding runs ahead.
        cache_dir: folder for the built-in clips; by default ``$XDG_CACHE_HOME/leanvae`` or
            ``~/.cache/leanvae``.
    """

    sources: tuple[SourceConfig, ...] = Field(default=(SourceConfig(path=BUILTIN),), min_length=1)
    resolution: tuple[int, int] = (256, 256)
    buckets: tuple[Bucket, ...] = ()
    short_side: int | None = Field(default=None, ge=1)
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

    default_kind: ClassVar[Literal["clips", "images"]] = "clips"

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, value: tuple[Shape, ...]) -> tuple[Shape, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each bucket may be given once")
        return value

    @property
    def kinds(self) -> tuple[Literal["clips", "images"], ...]:
        """What each source gives."""
        return tuple(source.kind or self.default_kind for source in self.sources)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The buckets, or those that the resolution stands for."""
        return self.buckets or self.shapes_at(self.resolution)

    def shapes_at(self, resolution: tuple[int, int]) -> tuple[Shape, ...]:
        """List the buckets of one resolution, for each kind of source."""
        raise NotImplementedError

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
        return cache_folder() if self.cache_dir is None else Path(self.cache_dir).expanduser()


class ClipDataConfig(DataConfig):
    """The ``data:`` block of a video autoencoder.

    Attributes:
        num_frames: frames of a clip, unless the buckets say so.
        stride: every how many frames of the file one is taken, or a range ``[1, 4]`` of which each sample draws as
            far as its file's length allows.
        fps: frames a second instead, or a range of them, taken by the file's own timestamps: the nearest to each
            point of time.
        hdr: `tonemap` brings PQ and HLG to SDR, as docs/data.md states; `refuse` takes no such file.
        decoder: `pyav`, or `decord` for the files on which it is known to agree with PyAV.
    """

    num_frames: int = Field(default=17, ge=2)
    stride: tuple[int, int] = (1, 1)
    fps: tuple[float, float] | None = None
    hdr: Hdr = "tonemap"
    decoder: Literal["pyav", "decord"] = "pyav"

    @field_validator("stride", "fps", mode="before")
    @classmethod
    def _one_number_is_a_range(cls, value: object) -> object:
        return (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @field_validator("stride", "fps")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"expected a positive number, or [lowest, highest], got {list(value)}")
        return value

    @model_validator(mode="after")
    def _stride_or_fps(self) -> "ClipDataConfig":
        if self.fps is not None and self.stride != (1, 1):
            raise ValueError("stride and fps: both say which frames are taken, give one of them")
        return self

    def shapes_at(self, resolution: tuple[int, int]) -> tuple[Shape, ...]:
        """List one bucket for clips, and one for images if a source has them."""
        frames = {"clips": self.num_frames, "images": 1}
        return tuple(Shape(frames[kind], *resolution) for kind in sorted(set(self.kinds)))


class ImageDataConfig(DataConfig):
    """The ``data:`` block of an image autoencoder."""

    default_kind: ClassVar[Literal["clips", "images"]] = "images"

    @model_validator(mode="after")
    def _images_alone(self) -> "ImageDataConfig":
        if "clips" in self.kinds:
            raise ValueError("sources: an image model is trained on images, not on clips")
        for bucket in self.buckets:
            if not bucket.is_image:
                raise ValueError(f"buckets: {bucket} is for clips; images have one frame, as in 1x256x256")
        return self

    def shapes_at(self, resolution: tuple[int, int]) -> tuple[Shape, ...]:
        """List the one bucket, for images."""
        return (Shape(1, *resolution),)


def source_weights(config: DataConfig, sizes: list[int]) -> list[float]:
    """Weigh the sources: as configured, or by each source's number of files (or parts of files)."""
    weights = [source.weight for source in config.sources]
    return [float(size) if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
