"""A run's reaction to steps whose loss or gradient is not finite: pure functions of the past steps.

The step number never goes back, because data, rates and noise depend on it. A bad step updates nothing. After several
in a row the networks go back to an older checkpoint while the numbers continue, so only the updates in between are
lost. The GAN, the most frequent cause, counts less from then on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from leanvae.training.config import FaultConfig
from litevae.errors import TrainingDiverged

T = TypeVar("T")


@dataclass(frozen=True)
class FaultRecord:
    """The faults of a run, kept in its checkpoints.

    Attributes:
        updates: number of updates of the weights.
        bad_in_a_row: bad steps since the last good one or the last rollback.
        skipped: numbers, from 1, of all bad steps.
        lost: first and last step of each stretch whose updates a rollback undid.
        gan_factor: factor applied to the weight of the adversarial loss.
    """

    updates: int = 0
    bad_in_a_row: int = 0
    skipped: tuple[int, ...] = ()
    lost: tuple[tuple[int, int], ...] = ()
    gan_factor: float = 1.0

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "FaultRecord":
        """Read the output of `to_json`."""
        return cls(**{**tree, "skipped": tuple(tree["skipped"]), "lost": tuple(map(tuple, tree["lost"]))})

    def to_json(self) -> dict[str, Any]:
        """Return plain containers."""
        return asdict(self)

    @property
    def roll_backs(self) -> int:
        """Number of times that the run has gone back."""
        return len(self.lost)

    def after(self, step: int, bad: bool) -> "FaultRecord":
        """Return the record after a step, whose number counts from 1."""
        if bad:
            return replace(self, bad_in_a_row=self.bad_in_a_row + 1, skipped=(*self.skipped, step))
        return replace(self, bad_in_a_row=0, updates=self.updates + 1)

    def rolled_back(self, restored: "FaultRecord", restored_step: int, step: int, gan_factor: float) -> "FaultRecord":
        """Return the record after a rollback.

        Args:
            restored: the record in the checkpoint that the networks went back to.
            restored_step: number of that checkpoint's step.
            step: number of the last step taken, which stays.
            gan_factor: factor applied to the GAN's weight from now on, in addition to earlier ones.
        """
        return replace(
            self,
            updates=restored.updates,
            bad_in_a_row=0,
            lost=(*self.lost, (restored_step + 1, step)),
            gan_factor=self.gan_factor * gan_factor,
        )


def bad_values(logs: Mapping[str, float]) -> str:
    """Describe what is wrong with a bad step."""
    values = [f"{name} is {value}" for name, value in logs.items() if not math.isfinite(value)]
    return ", ".join(values) or "a gradient is not finite"


def reason_to_go_back(
    config: FaultConfig, record: FaultRecord, step: int, files: Mapping[int, Sequence[str]]
) -> str | None:
    """Return why the networks should go back to an older checkpoint; None if they should not.

    Args:
        config: how many bad steps in a row are too many.
        record: the record after the step.
        step: its number, from 1.
        files: files of the bad steps in a row.
    """
    if record.bad_in_a_row < config.max_bad_steps:
        return None
    listed = ", ".join(sorted({file for part in files.values() for file in part}))
    return f"steps {step - record.bad_in_a_row + 1} to {step} are not finite; their files: {listed}"


def check_roll_back(config: FaultConfig, record: FaultRecord, reason: str) -> None:
    """Raise `TrainingDiverged`, with the reason for going back, if no rollback is left."""
    if record.roll_backs >= config.max_rollbacks:
        raise TrainingDiverged(
            f"{reason}; the run stops, because it has gone back {record.roll_backs} times already, the limit in "
            "training.faults.max_rollbacks. Its checkpoints are older than these steps: look at the files, lower "
            "optimizer.learning_rate or gan.weight, and continue with --resume auto"
        )


def checkpoint_to_restore(newest_first: Iterable[tuple[T, int]], updates: int) -> T | None:
    """Return the newest checkpoint whose weights are older than the present ones; else the newest of the same age.

    Args:
        newest_first: checkpoints and the number of updates of their weights.
        updates: updates of the present weights, which bad steps do not change.
    """
    as_old = None
    for checkpoint, its_updates in newest_first:
        if its_updates < updates:
            return checkpoint
        if its_updates == updates and as_old is None:
            as_old = checkpoint
    return as_old
