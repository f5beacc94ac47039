"""Run by `test_ranks_parity.py`, in one process or in several ranks: trains small networks, and keeps what they did.

Arguments: a JSON file with the cases, and the file to write tensors to. Each case names a kind (`video` or `image`), a
number of steps and a configuration, and may name `bad` steps, with what is not finite in them on the last rank: `loss`,
`gradient` (of a loss that is finite) or `discriminator`. It may go on from a checkpoint (`load`) and write one to a
folder (`save`) after the step `save_after`, to which it goes back at the end, to take the steps from there `again`.
Written are the logs, the gradients of the first step, the
weights, the average, and how many tensors of weights and optimizer states a bad step has changed.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from leanvae.distributed import gather, rank, start_processes, stop_processes, world_size
from leanvae.training import step as step_module
from leanvae.training.build import build_networks, check_passes
from leanvae.training.config import TrainImageConfig, TrainVideoConfig
from leanvae.training.curriculum import ema_decay
from leanvae.training.engine import PlainEngine
from leanvae.training.faults import FaultRecord
from leanvae.training.state import restore, save_run
from leanvae.training.step import update_average

TERMS, PENALTY = step_module.reconstruction_terms, step_module.lecam_penalty
KINDS = {"video": TrainVideoConfig, "image": TrainImageConfig}


def keep_gradients(engine, kept):
    """Copies the gradients of the first update into `kept`, by the names of the weights."""
    plain = isinstance(engine, PlainEngine)
    owner = engine._optimizer if plain else engine._engine
    step = owner.step

    def keep_and_step(*args, **kwargs):
        if not kept and (plain or owner.is_gradient_accumulation_boundary()):
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradient = parameter.grad if plain else safe_get_full_grad(parameter)
                    kept[name] = gradient.detach().float().clone()
        return step(*args, **kwargs)

    owner.step = keep_and_step


def spoil(bad):
    """Makes the terms of the bad steps, on the last rank, not finite; returns what must be told each step's number."""
    now = {}

    def spoilt_terms(losses, step, prediction, *args):
        found = TERMS(losses, step, prediction, *args)
        kind = bad.get(str(step))
        if kind in ("loss", "gradient") and rank() == world_size() - 1:
            weight, value = found["l1"]
            extra = (0.0 * prediction).sum().sqrt() if kind == "gradient" else value * torch.nan
            found["l1"] = (weight, value + extra)
        return found

    def spoilt_penalty(real, fake, *averages):
        value = PENALTY(real, fake, *averages)
        spoilt = bad.get(str(now["step"])) == "discriminator" and rank() == world_size() - 1
        return value + (0.0 * real).sum().sqrt() if spoilt else value

    step_module.reconstruction_terms, step_module.lecam_penalty = spoilt_terms, spoilt_penalty
    return now


def everything(engines):
    """Copy everything that a step may change."""
    tensors = {}
    for kind, engine in engines.items():
        optimizer = engine._optimizer if isinstance(engine, PlainEngine) else engine._engine.basic_optimizer
        tensors |= {f"{kind}.{name}": value for name, value in engine.full_weights().items()}
        if not any(hasattr(parameter, "ds_id") for parameter in engine.module.parameters()):  # whole but under ZeRO-3
            tensors |= {f"{kind}.low.{name}": value for name, value in engine.module.named_parameters()}
        for number, state in enumerate(optimizer.state.values()):
            tensors |= {f"{kind}.{number}.{name}": value for name, value in state.items() if torch.is_tensor(value)}
    return {name: value.detach().clone() for name, value in tensors.items()}


def clips_of(config, step):
    """This rank's part of a step's samples, and their places in its batch."""
    phase = config.curriculum.phases[config.curriculum.number_at(step)]
    bucket, size = list(phase.batches.items())[step % len(phase.batches)]
    frames = () if bucket.is_image else (bucket.frames,)
    generator = torch.Generator().manual_seed(step)
    shape = (size, 3, *frames, bucket.height, bucket.width)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    share = size // world_size()
    indices = list(range(rank() * share, (rank() + 1) * share))
    return pixels[indices], indices


def run_case(case, device):
    config = KINDS[case["kind"]].model_validate(case["config"])
    check_passes(config, world_size())
    take_step, average = build_networks(config, device)
    engines = {"vae": take_step.vae, "discriminator": take_step.discriminator}
    bad = case.get("bad", {})
    now = spoil(bad)
    gradients = {name: {} for name, engine in engines.items() if engine}
    for name, kept in gradients.items():
        keep_gradients(engines[name], kept)
    tensors = {}

    def take(step, kind):
        now["step"] = step
        before = everything(engines) if str(step) in bad else {}
        logs = take_step(*clips_of(config, step), step)
        assert logs["skipped"] == (str(step) in bad)
        if before:
            after = everything(engines)
            assert set(after) == set(before)
            changed = sum(not torch.equal(value, before[name]) for name, value in after.items())
            tensors[f"changed.{step}"] = torch.tensor(gather(changed))
            return
        update_average(average, take_step.vae.full_weights(), ema_decay(step, config.training.ema_decay))
        tensors.update(
            {f"{kind}.{step}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in logs.items()}
        )

    first = restore(Path(case["load"]), take_step, average).step if "load" in case else 0
    for step in range(first, case["steps"]):
        take(step, "logs")
        if step + 1 == case.get("save_after"):
            save_run(Path(case["save"]), config, take_step, average, step + 1, "", FaultRecord(), {})
    for engine, kept in gradients.items():
        tensors |= {f"gradients.{engine}.{name}": value for name, value in kept.items()}
        tensors |= {f"weights.{engine}.{name}": value.clone() for name, value in engines[engine].full_weights().items()}
    tensors |= {f"average.{name}": value.clone() for name, value in average.items()}
    if "save" in case:
        back = restore(next(Path(case["save"]).glob("step_*")), take_step, average).step
        for step in range(back, case["steps"]):
            take(step, "again")
    return tensors


def main(cases_file, output):
    with open(cases_file, encoding="utf-8") as file:
        cases = json.load(file)
    torch.set_num_threads(1)
    engines = {case["config"]["training"]["engine"] for case in cases.values()}
    device = start_processes("deepspeed" if "deepspeed" in engines else "plain")
    tensors = {}
    for name, case in cases.items():
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in run_case(case, device).items()}
    if rank() == 0:
        save_file(tensors, output)
    stop_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # for the reason that `leanvae.cli.main.run_program` gives
