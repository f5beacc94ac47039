"""Run by `test_ranks_parity.py`, in one process or in several ranks: trains small networks, and keeps what they did.

Arguments: a JSON file with the cases, and the file to write tensors to. Each case names a kind (`video` or `image`), a
number of steps and a configuration. Written are the logs, the gradients of the first step, the weights and the average.
"""

import json
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from leanvae.training.build import build_networks, check_passes
from leanvae.training.config import TrainImageConfig, TrainVideoConfig
from leanvae.training.engine import PlainEngine, start_processes
from leanvae.training.ranks import rank, world_size
from leanvae.training.schedule import ema_decay
from leanvae.training.step import update_average

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
                gradient = parameter.grad if plain else safe_get_full_grad(parameter)
                kept[name] = gradient.detach().float().clone()
        return step(*args, **kwargs)

    owner.step = keep_and_step


def run_case(case, device):
    config = KINDS[case["kind"]].model_validate(case["config"])
    check_passes(config, world_size())
    take_step, average = build_networks(config, device)
    engines = {"vae": take_step.vae, "discriminator": take_step.discriminator}
    gradients = {name: {} for name, engine in engines.items() if engine}
    for name, kept in gradients.items():
        keep_gradients(engines[name], kept)
    frames = (config.data.num_frames,) if case["kind"] == "video" else ()
    tensors = {}
    for step in range(case["steps"]):
        phase = config.curriculum.phases[config.curriculum.number_at(step)]
        generator = torch.Generator().manual_seed(step)
        shape = (phase.batch_size, 3, *frames, *phase.resolution)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        share = phase.batch_size // world_size()
        indices = list(range(rank() * share, (rank() + 1) * share))
        logs = take_step(pixels[indices], indices, step)
        update_average(average, take_step.vae.full_weights(), ema_decay(step, config.training.ema_decay))
        tensors |= {f"logs.{step}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in logs.items()}
    for engine, kept in gradients.items():
        tensors |= {f"gradients.{engine}.{name}": value for name, value in kept.items()}
        tensors |= {f"weights.{engine}.{name}": value.clone() for name, value in engines[engine].full_weights().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
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
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
