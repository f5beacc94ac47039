"""Phases of a run: a curriculum of resolutions and batch sizes, as a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveInt, field_validator

from leanvae.config import ConfigError
from leanvae.data.order import Phase, phase_at, phases_of
from litevae.config import StrictConfig


class PhaseConfig(StrictConfig):
    """A stretch of a run; what is left out is as `data` and `training` say.

    Attributes:
        steps: optimizer steps.
        resolution: (height, width) in pixels, or one number for both.
        batch: clips or images a step, over all ranks and passes.
        micro_batch: of them, how many a rank takes in one pass.
    """

    steps: PositiveInt
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None

    @field_validator("resolution", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value


def passes(batch: int, micro_batch: int | None, world_size: int) -> int:
    """Passes a step on each of `world_size` ranks.

    Raises:
        ConfigError: the batch does not divide among the ranks, or a rank's share into its passes.
    """
    share, rest = divmod(batch, world_size)
    if rest:
        raise ConfigError(f"training.batch_size is {batch}: it must be divisible by the number of ranks, {world_size}")
    number, rest = divmod(share, min(share, micro_batch or share))
    if rest:
        raise ConfigError(
            f"training.micro_batch_size is {micro_batch}: it must divide each rank's share of the batch, {share}"
        )
    return number


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run, laid out.

    Attributes:
        phases: what the data loader needs of them.
        micro_batches: samples that a rank takes in one pass, by phase; `None` for its whole share.
        max_steps: steps in all.
    """

    phases: tuple[Phase, ...]
    micro_batches: tuple[int | None, ...]
    max_steps: int

    def number_at(self, step: int) -> int:
        """Number of the phase that a step belongs to, from 0."""
        return self.phases.index(phase_at(self.phases, step))

    def passes(self, number: int, world_size: int) -> int:
        """Passes a step on each of `world_size` ranks, in a phase.

        Raises:
            ConfigError: the batch does not divide among the ranks, or a rank's share into its passes.
        """
        return passes(self.phases[number].batch_size, self.micro_batches[number], world_size)

    def check(self, world_size: int) -> None:
        """Raises `ConfigError` unless every phase's batch divides among the ranks and passes."""
        for number in range(len(self.phases)):
            self.passes(number, world_size)


def lay_out(stretches: Sequence[PhaseConfig], max_steps: int | None) -> Curriculum:
    """Lays phases with nothing left out one behind the other, up to `max_steps`."""
    phases = phases_of((s.steps, s.batch, s.resolution) for s in stretches if s.batch and s.resolution)
    steps = sum(stretch.steps for stretch in stretches)
    micro_batches = tuple(stretch.micro_batch for stretch in stretches)
    return Curriculum(phases, micro_batches, min(steps, max_steps or steps))
