"""Run by `test_training_ranks.py` as `scripts/train_video.py`: the main rank takes long to read held-out files.

DeepSpeed's group gives up after some seconds, in place of ten minutes.
"""

import time
from datetime import timedelta

from leanvae.cli.main import run_program

PATIENCE = 10.0  # seconds


# Torch is imported inside: decoder processes import this file.
def read_slowly():
    import torch.distributed as dist

    from leanvae.training import loop

    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    original = loop.read_validation_samples

    def read(*args):
        time.sleep(1.5 * PATIENCE)
        return original(*args)

    loop.read_validation_samples = read


if __name__ == "__main__":
    read_slowly()
    run_program("train_video")
