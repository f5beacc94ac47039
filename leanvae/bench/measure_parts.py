"""The cost of parts: time for each token of the latent, and peak memory beside the planner's estimate.

    python -m leanvae.bench.measure_parts 5x256x256 17x512x512:chunk=4 9x1080x1920:tile=272x1920 --dtype bfloat16
    python -m leanvae.bench.measure_parts 1025x256x256:stream=4 --dtype bfloat16

A case is a size TxHxW and the way to cut it: `chunk=FRAMES`, `tile=HxW` in pixels, `memory_limit=SIZE`, and
`stream=FRAMES`, which passes that many frames at a time through the streams. Each case runs in a separate process, with
the published architecture and random weights, after a small warm-up. Work under a second is repeated, and the fastest
counts. Time is divided by the latent's tokens, including padding: if the cost is linear, it is the same for every size.
On CPUs it is the process's own time divided by its threads, which other processes hardly affect. Memory is the peak
beyond what was resident before; on CUDA, that of the allocator.
"""

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from leanvae.bench.memory import PeakMemory
from leanvae.inference.plan import ClipPlan, Parts, decoding_load, encoding_load, make_plan
from leanvae.model import LeanVAE
from litevae.errors import InvalidInput

_SECONDS_TO_REPEAT = 1.0
_NUMBERS = {"chunk": 1, "tile": 2, "stream": 1}  # in an option's value


def parse_case(text: str) -> dict[str, Any]:
    """Parse `TxHxW[:name=value...]` into the arguments of `measure`.

    Raises:
        ValueError: it has another form.
    """
    size, *options = text.split(":")
    case: dict[str, Any] = {"size": _numbers(size, 3, text)}
    for option in options:
        name, _, value = option.partition("=")
        if name == "memory_limit":
            case[name] = value
        elif name in _NUMBERS:
            numbers = _numbers(value, _NUMBERS[name], text)
            case[name] = numbers if name == "tile" else numbers[0]
        else:
            raise InvalidInput(f"case {text!r}: {name!r} is not one of {', '.join(_NUMBERS)}, memory_limit")
    return case


def _numbers(text: str, count: int, case: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise InvalidInput(f"case {case!r}: {text!r} is not {count} numbers above zero with 'x' between them")
    return tuple(int(part) for part in parts)


def measure(vae: LeanVAE, size: Sequence[int], stream: int | None = None, **parts: Any) -> dict[str, dict[str, float]]:
    """Encode and decode a clip.

    Args:
        vae: the model, ready for inference.
        size: (T, H, W).
        stream: frames that the streams get at a time; `None` passes the clip whole.
        parts: tile, chunk and memory_limit, as `LeanVAE.encode` takes them.

    Returns:
        For `encode` and `decode` the `seconds`, `microseconds_per_token`, `peak_bytes` and `planned_bytes`.
    """
    weight, group = next(vae.parameters()), vae.config.patch_size[0]
    clip = weight.new_zeros(1, 3, size[0] if stream is None else 1, *size[1:])
    latent = torch.randn(1, *vae.latent_shape(size)).to(weight)

    def encode() -> None:
        if stream is None:
            vae.encode(clip, **parts)
            return
        rest = size[0] - 1
        chunks = (clip.expand(-1, -1, min(stream, rest - start), -1, -1) for start in range(0, rest, stream))
        for _ in vae.encode_stream(itertools.chain([clip], chunks), **parts):
            pass

    def decode() -> None:
        if stream is None:
            vae.decode(latent, size, **parts)
            return
        for _ in vae.decode_stream(latent.split(max(1, stream // group), dim=2), **parts):
            pass

    def run(work: Callable[[], None], plan: ClipPlan) -> dict[str, float]:
        times: list[float] = []

        def run_once() -> None:
            began = _seconds(weight.device)
            work()
            times.append(_seconds(weight.device) - began)

        with torch.inference_mode():
            with PeakMemory(weight.device) as memory:
                run_once()
            while sum(times) < _SECONDS_TO_REPEAT:
                run_once()
        return {
            "seconds": min(times),
            "microseconds_per_token": 1e6 * min(times) / latent[0, 0].numel(),
            "peak_bytes": memory.peak_bytes,
            "planned_bytes": plan.memory,
        }

    is_stream = stream is not None
    asked = Parts(**{"chunk": stream, **parts})
    return {
        "encode": run(encode, make_plan(encoding_load(vae.layers, clip, is_stream), asked)),
        "decode": run(decode, make_plan(decoding_load(vae.layers, latent, is_stream), asked)),
    }


def _seconds(device: torch.device) -> float:
    """Read a clock of the work on a device."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _measure_here(args: argparse.Namespace) -> None:
    """Measure a case in this process and print a line of the table."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    vae = LeanVAE().to(args.device, getattr(torch, args.dtype)).eval()
    if args.compile:
        vae.compile()
    measure(vae, (5, 64, 64))
    measure(vae, (5, 64, 64), tile=(32, 32), chunk=4)
    cells = [f"{args.cases[0]:36s}"]
    for name, result in measure(vae, **parse_case(args.cases[0])).items():
        peak, planned = result["peak_bytes"] / 2**20, result["planned_bytes"] / 2**20
        cells.append(
            f"{name} {result['seconds']:7.2f} s {result['microseconds_per_token']:6.1f} us/token "
            f"{peak:6.0f} MiB, planned {planned:6.0f} ({planned / peak - 1:+.0%})"
        )
    print(" | ".join(cells), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases of a command line, each in a separate process; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m leanvae.bench.measure_parts", description="Measures the cost of parts."
    )
    parser.add_argument("cases", nargs="+", metavar="TxHxW[:OPTION=VALUE...]", help="chunk, tile, memory_limit, stream")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="prepare the model for inference first")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        for case in args.cases:
            parse_case(case)
    except ValueError as error:
        parser.error(str(error))
    if args.here:
        _measure_here(args)
        return 0
    options = [f"--dtype={args.dtype}", f"--device={args.device}", f"--threads={args.threads}"]
    options += ["--compile"] * args.compile
    command = [sys.executable, "-m", "leanvae.bench.measure_parts", "--here", *options]
    return int(any(subprocess.run([*command, case], check=False).returncode for case in args.cases))


if __name__ == "__main__":
    sys.exit(main())
