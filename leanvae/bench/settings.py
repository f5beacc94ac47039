"""The settings of a run, and its jobs, the most important first."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from leanvae.bench.jobs import BenchRow
from leanvae.bench.modes import MODES
from leanvae.peers.models import Model, Size

DEFAULT_RESOLUTIONS = ((64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (1080, 1920), (2160, 3840))
DEFAULT_FRAMES = 17
FRAMES_SWEEP = (1, 5, 9, 33)  # at one resolution, for time against frames
SWEEP_RESOLUTION = (128, 128)
MODES_RESOLUTION = (256, 256)
COMMON_SIDES = (256, 192, 160, 128, 96, 64)  # all video models are measured at the largest that all have time for
COMMON_SHARE = 0.35  # of the budget
TABLE3_MODELS = ("sd-vae-nchw", "litevae-s", "litevae-b")
TABLE3_BATCH = 8
TABLE3_SIDE = 256
HEADLINE = "leanvae-c4"
_MODES_OF_OURS = ("whole", "compiled")


def table3_models(full: bool) -> tuple[str, ...]:
    """Return the encoders of Table 3 of the LiteVAE paper; M and L, which are slow, only in full runs."""
    return (*TABLE3_MODELS, "sd-vae", *(("litevae-m", "litevae-l") if full else ()))


@dataclass(frozen=True)
class BenchSettings:
    """A selection of measurements; None takes the default.

    Attributes:
        models: names.
        resolutions: heights and widths.
        frames: numbers of frames, for video models.
        modes, dtypes: ways to run, and types to run in.
        device: device to run on.
        output: folder of the results.
        budget: seconds for the whole run; None measures everything.
        table3: whether only Table 3 of the LiteVAE paper is measured.
    """

    models: tuple[str, ...]
    resolutions: tuple[tuple[int, int], ...] | None
    frames: tuple[int, ...] | None
    modes: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    device: str
    output: Path
    budget: float | None
    table3: bool = False

    @property
    def is_selection(self) -> bool:
        """Whether the user chose sizes or modes, which are then measured without additions."""
        return any(choice is not None for choice in (self.resolutions, self.frames, self.modes))

    @property
    def counted_resolutions(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths whose FLOPs are counted."""
        return self.resolutions or DEFAULT_RESOLUTIONS

    def counted_sizes(self, model: Model) -> list[Size]:
        """Return the sizes whose FLOPs are counted for a model, measured or not."""
        frames = (1,) if model.kind == "image" else self.frames or (DEFAULT_FRAMES,)
        return [Size(count, *area) for count in frames for area in self.counted_resolutions]

    def _sizes(self, model: Model) -> list[Size]:
        sizes = self.counted_sizes(model)
        if model.kind == "video" and not self.is_selection:
            sizes += [Size(count, *SWEEP_RESOLUTION) for count in FRAMES_SWEEP]
        return sizes

    def _modes(self, model: Model) -> tuple[str, ...]:
        if self.modes is not None:
            return self.modes
        if self.is_selection:
            return ("whole",)
        if self.budget is None:
            return MODES
        return _MODES_OF_OURS if model.is_ours else ("whole",)

    def jobs(self, models: Iterable[Model], common_side: int | None) -> dict[BenchRow, int]:
        """Return the jobs of a run, each with its rank: lower ranks come first.

        Args:
            models: the models of the run.
            common_side: side in pixels of the clips that every video model is measured on; None for no such clips.
        """
        ranked: dict[BenchRow, int] = {}

        def add(rank: int, *jobs: BenchRow) -> None:
            for job in jobs:
                ranked.setdefault(job, rank)

        if self.table3:
            add(1, *self.table3_jobs())
            return ranked
        models = list(models)
        for model in () if self.is_selection else models:
            if model.name == HEADLINE:
                size = Size(DEFAULT_FRAMES, *MODES_RESOLUTION)
                add(0, *(self._job(model, Size(DEFAULT_FRAMES, side, side)) for side in (64, 128, 256)))
                add(2, *(self._job(model, size, mode) for mode in ("compiled", "chunked", "tiled")))
                add(2, *(self._job(model, Size(count, *SWEEP_RESOLUTION)) for count in FRAMES_SWEEP))
            if model.kind == "image":
                add(0, self._job(model, Size(1, TABLE3_SIDE, TABLE3_SIDE)))
            elif common_side is not None and not model.tiled_only:
                add(0, self._job(model, Size(DEFAULT_FRAMES, common_side, common_side)))
        if not self.is_selection and set(TABLE3_MODELS) <= set(self.models):
            add(1, *self.table3_jobs())
        for model in models:
            for size in self._sizes(model):
                for mode in self._modes(model):
                    for dtype in self.dtypes:
                        add(3, replace(self._job(model, size, mode), dtype=dtype))
        return ranked

    def table3_jobs(self) -> list[BenchRow]:
        """Return encoders on batches of images: Table 3 of the LiteVAE paper."""
        names = table3_models(self.budget is None) if self.table3 or self.budget is None else TABLE3_MODELS
        side, device = TABLE3_SIDE, self.device
        return [BenchRow(name, 1, side, side, device=device, batch=TABLE3_BATCH, encode_only=True) for name in names]

    def _job(self, model: Model, size: Size, mode: str = "whole") -> BenchRow:
        frames = 1 if model.kind == "image" else size.frames
        return BenchRow(model.name, frames, size.height, size.width, mode, self.dtypes[0], self.device)
