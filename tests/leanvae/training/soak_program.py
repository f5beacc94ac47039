"""Run by `test_soak.py` instead of `scripts/train_video.py`: trains, records the samples of each step, spoils steps.

SPOILT_STEPS names the steps, counted from 1, in which the last rank's loss is not finite. Each rank appends what its
steps took to `samples.rank<R>.jsonl` in SAMPLES, whichever start of the run took them.
"""

import json
import os
from pathlib import Path

from leanvae.cli.main import run_program

SPOILT = {int(number) for number in os.environ["SPOILT_STEPS"].split()}
SAMPLES = Path(os.environ["SAMPLES"])


# Torch is imported inside: decoder processes import this file.
def spoil_terms():
    from leanvae.distributed import rank, world_size
    from leanvae.training import step as step_module

    original = step_module.reconstruction_terms

    def spoilt(losses, step, *args):
        terms = original(losses, step, *args)
        if step + 1 in SPOILT and rank() == world_size() - 1:
            weight, value = terms["l1"]
            terms["l1"] = (weight, value * float("nan"))
        return terms

    step_module.reconstruction_terms = spoilt


def keep_samples():
    from leanvae.distributed import rank
    from leanvae.training import loop

    original = loop.Run._report

    def report(self, logs, batch, *args):
        entry = {"step": self.step, "indices": batch.indices, "paths": batch.paths}
        entry["rejected"] = [[each.position, each.attempt, each.path] for each in batch.rejected]
        with (SAMPLES / f"samples.rank{rank()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        original(self, logs, batch, *args)

    loop.Run._report = report


if __name__ == "__main__":
    spoil_terms()
    keep_samples()
    run_program("train_video")
