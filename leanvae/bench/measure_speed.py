"""The cost of inference beyond its matrix products, and of each operation.

    python -m leanvae.bench.measure_speed whole --size 17x256x256 --rounds 15
    python -m leanvae.bench.measure_speed operations --rounds 30

`whole` times encoding and decoding with the published architecture and random weights: `leanvae.bench.reference` in
float32, the model as it is and prepared by `compile()`, and only the matrix products of the same shapes, through oneDNN
with packed weights. All take turns in one process, and the best round counts, because other work on a machine only adds
time. On a busy machine, `--threads 1` counts processor time instead of wall-clock time. Memory is the peak beyond what
was resident before, each in a separate process. `operations` times the single steps at the width of the fused tokens.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvae.bench import reference
from leanvae.bench.memory import PeakMemory
from leanvae.config import LeanVAEConfig
from leanvae.inference.packed import can_pack, pack, packed_linear
from leanvae.model import LeanVAE
from leanvae.naf import CausalDepthwiseConv
from leanvae.ops import BLOCK_TOKENS, gradient_step, soft_threshold, tokenwise
from leanvae.patchify import from_bands, image_and_video_patches, stream_widths, to_bands

Work = Callable[[], object]
Key = TypeVar("Key")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARRANGEMENTS = ("reference", "eager", "prepared")
EXPAND = "expand and GEGLU"
H200_RATE, H200_BANDWIDTH = 989e12, 4.8e12  # dense bf16 FLOP/s and bytes/s of its data sheet


def fastest(works: Mapping[Key, Work], rounds: int) -> dict[Key, float]:
    """Return the seconds of each work's fastest run; they take turns, after a run that does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {key: float("inf") for key in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if index:
                best[name] = min(best[name], clock() - start)
    return best


def product_shapes(config: LeanVAEConfig, size: Sequence[int]) -> dict[str, list[tuple[int, int, int]]]:
    """Return (tokens, inputs, outputs) of all matrix products, to encode and to decode a clip of a size."""
    group, patch_height, patch_width = config.patch_size
    area = (size[1] // patch_height) * (size[2] // patch_width)
    tokens = area * (1 + (size[0] - 1) // group)
    image, video = image_and_video_patches(config)
    width, channels = config.hidden_channels, config.latent_channels

    def layers(num: int, dim: int) -> Iterator[tuple[int, int, int]]:
        inner = int(4 * 2 / 3 * dim)
        for _ in range(num):
            yield from ((tokens, dim, 2 * inner), (tokens, inner, dim))

    def stacks() -> Iterator[tuple[int, int, int]]:
        for dim in stream_widths(config).values():
            yield from layers(config.num_stream_layers, dim)
        yield from layers(config.num_fusion_layers, width)

    patches = [
        (num, patch.vector_size(name), dim)
        for num, patch in ((area, image), (tokens - area, video))
        for name, dim in stream_widths(config).items()
    ]
    iteration = [(tokens, width, channels), (tokens, channels, width), *layers(2 * config.ista_layers, width)]
    return {
        "encode": [*patches, *stacks(), (tokens, width, channels), (tokens, width, channels)],
        "decode": [
            (tokens, channels, width),
            *config.ista_iterations * iteration,
            *stacks(),
            *((num, outputs, inputs) for num, inputs, outputs in patches),
        ],
    }


def bare_products(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Work:
    """Return only the matrix products, in blocks of tokens, through oneDNN with packed weights."""
    weights = [pack(torch.randn(outputs, inputs).mul_(0.02).to(dtype)) for _, inputs, outputs in shapes]
    tokens = {(num, inputs): torch.randn(num, inputs).to(dtype) for num, inputs, _ in shapes}

    def run() -> None:
        for (num, inputs, _), weight in zip(shapes, weights, strict=True):
            for block in tokens[num, inputs].split(BLOCK_TOKENS["cpu"]):
                torch.ops.mkldnn._linear_pointwise(block, weight, None, "none", [], "")

    return run


def with_packed_products(what: str) -> list[str]:
    """Return the types in which oneDNN multiplies packed weights on this processor; print those left out."""
    found = [name for name, dtype in DTYPES.items() if can_pack(torch.empty(0, dtype=dtype))]
    for name in DTYPES.keys() - set(found):
        print(f"{what} in {name}: left out, because oneDNN has no packed products for it on this processor\n")
    return found


def make_works(arrangement: str, dtype: torch.dtype, size: Sequence[int]) -> dict[str, Work]:
    """Return the encoding and decoding of random pixels in one arrangement."""
    torch.manual_seed(0)
    vae = LeanVAE().eval().to(dtype)
    clip = (torch.rand(1, 3, *size) * 2 - 1).to(dtype)
    latent = torch.randn(1, *vae.latent_shape(size)).to(dtype)
    if arrangement == "reference":
        return {"encode": partial(reference.encode, vae, clip), "decode": partial(reference.decode, vae, latent)}
    if arrangement == "prepared":
        vae.compile()
    return {"encode": partial(vae.encode, clip), "decode": partial(vae.decode, latent)}


def measure_whole(size: Sequence[int], rounds: int) -> None:
    """Print times and memory, and both relative to their references."""
    cases = [("reference", "float32"), *((how, dtype) for dtype in DTYPES for how in ARRANGEMENTS[1:])]
    made = {case: make_works(case[0], DTYPES[case[1]], size) for case in cases}
    shapes = product_shapes(LeanVAEConfig(), size)
    works = {(*case, name): work for case, of_case in made.items() for name, work in of_case.items()}
    for dtype in with_packed_products("bare products"):
        works |= {("products", dtype, name): bare_products(shapes[name], DTYPES[dtype]) for name in shapes}
    seconds = fastest(works, rounds)
    memory = {(*case, name): peak_memory(*case, name, size) for case in cases for name in shapes}
    print("| | | ms | speed over the reference | time over the products | memory, MiB | over the reference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for how, dtype, name in works:
        mine, base = seconds[how, dtype, name], seconds["reference", "float32", name]
        products = seconds.get(("products", dtype, name))
        row = [
            name,
            f"{how}, {dtype}",
            f"{1e3 * mine:.0f}",
            f"{base / mine:.2f}",
            "-" if products is None else f"{mine / products:.2f}",
        ]
        if how != "products":
            peak = memory[how, dtype, name]
            row += [f"{peak / 2**20:.0f}", f"{peak / memory['reference', 'float32', name]:.2f}"]
        print("| " + " | ".join(row) + " |")


def peak_memory(arrangement: str, dtype: str, name: str, size: Sequence[int]) -> int:
    """Return the bytes at the peak beyond what was resident, in a separate process."""
    command = [sys.executable, "-m", "leanvae.bench.measure_speed", "memory", "--case", arrangement, dtype, name]
    command += ["--size", "x".join(map(str, size))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_memory(arrangement: str, dtype: str, name: str, size: Sequence[int]) -> int:
    """Measure for `peak_memory`, in its process: first a small run, then the one that counts."""
    make_works(arrangement, DTYPES[dtype], (5, 32, 32))[name]()
    work = make_works(arrangement, DTYPES[dtype], size)[name]
    with PeakMemory(torch.device("cpu")) as peak:
        work()
    return peak.peak_bytes


def make_operations(dtype: torch.dtype, size: Sequence[int]) -> dict[str, tuple[Work, float, float]]:
    """Return the steps of prepared inference: name to (work, floating-point operations, bytes read and written)."""
    torch.manual_seed(0)
    vae: Any = LeanVAE().eval().to(dtype)
    layers = vae.compile().layers
    embedding, projection = layers.encoder.embedding, layers.decoder.projection
    clip = (torch.rand(1, 3, *size) * 2 - 1).to(dtype)
    x = layers.encoder(clip)
    z = vae.bottleneck.compress(x)
    streams = list(x.split(vae.decoder.widths, dim=-1))
    bands = to_bands(clip)
    conv, feedforward = CausalDepthwiseConv(x.shape[-1]).to(dtype), layers.encoder.fusion.feedforwards[0]
    value, gate, contract = feedforward.value, feedforward.gate, feedforward.contract
    hidden = packed_linear(x, *value)
    num, dim = x.numel() // x.shape[-1], x.shape[-1]
    inner, channels, pixels = int(4 * 2 / 3 * dim), z.shape[-1], clip.numel()
    item = x.element_size()
    patch_weights = 2 * dim * 3 * (64 + 256)  # image and video; unlike the bands' product, the folded one is dense
    tokens, phi, step = item * num * dim, vae.bottleneck.phi, vae.bottleneck.steps[0]

    def expand(block: Tensor) -> Tensor:
        gated = torch.ops.mkldnn._linear_pointwise(block, gate.weight, gate.bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(block, gated, value.weight, value.bias, "mul")

    operations: dict[str, tuple[Work, float, float]] = {
        "Haar transform by itself": (lambda: to_bands(clip), 7 * pixels, 2 * item * pixels),
        "patch embedding, transform folded in": (
            lambda: embedding(clip),
            2 * dim * (clip[:, :, 1:].numel() + clip[:, :, :1].numel()),
            item * (pixels + patch_weights) + tokens,
        ),
        "depthwise convolution and sum": (lambda: conv(x, None, True), 55 * num * dim, 2 * tokens),
        "LayerNorm": (lambda: tokenwise(lambda t: F.layer_norm(t, (dim,)), x), 8 * num * dim, 2 * tokens),
        EXPAND: (
            lambda: tokenwise(expand, x),
            2 * num * dim * 2 * inner,
            tokens + item * (num * inner + 2 * dim * inner),
        ),
        "contract": (
            lambda: packed_linear(hidden, contract, None),
            2 * num * inner * dim,
            tokens + item * (num * inner + dim * inner),
        ),
        "feedforward as one": (
            lambda: feedforward(x, True),
            6 * num * inner * dim,
            2 * tokens + item * 3 * dim * inner,
        ),
        "gradient step of the bottleneck": (
            lambda: tokenwise(partial(gradient_step, phi=phi, step=step), x, z),
            4 * num * dim * channels,
            2 * tokens,
        ),
        "soft threshold": (
            lambda: tokenwise(partial(soft_threshold, threshold=vae.bottleneck.thresholds[0]), x),
            3 * num * dim,
            2 * tokens,
        ),
        "projection, inverse transform folded in": (
            lambda: projection(streams),
            2 * dim * pixels,
            tokens + item * (pixels + patch_weights),
        ),
        "inverse Haar transform by itself": (lambda: from_bands(bands), 7 * pixels, 2 * item * pixels),
    }
    if not can_pack(x):
        del operations[EXPAND]  # it calls oneDNN itself
    return operations


def measure_operations(size: Sequence[int], rounds: int) -> None:
    """Print each step's cost, its floor on this machine, and its floor on an H200 by the data sheet."""
    with_packed_products(EXPAND)
    print("| | | GFLOP | MB | floor, ms | measured, ms | over the floor | H200 floor, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, dtype in DTYPES.items():
        operations = make_operations(dtype, size)
        x, weight = torch.randn(4096, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        yardsticks = {
            "product": partial(packed_linear, x, pack(weight), None),
            "copy": partial(_copy, x.new_empty(5120, 512)),
        }
        seconds = fastest(yardsticks | {key: work for key, (work, _, _) in operations.items()}, rounds)
        rate = 2 * 4096 * 1024**2 / seconds["product"]
        bandwidth = 2 * 5120 * 512 * x.element_size() / seconds["copy"]
        print(f"| *{name}: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s* | | | | | | | |")
        for key, (_, flops, num_bytes) in operations.items():
            floor = max(flops / rate, num_bytes / bandwidth)
            bound = "arithmetic" if flops / rate > num_bytes / bandwidth else "memory"
            on_h200 = max(flops / H200_RATE, num_bytes * 2 / x.element_size() / H200_BANDWIDTH)
            print(
                f"| {key} | {bound} | {flops / 1e9:.2f} | {num_bytes / 1e6:.0f} | {1e3 * floor:.2f} "
                f"| {1e3 * seconds[key]:.2f} | {seconds[key] / floor:.2f} | {1e3 * on_h200:.4f} |"
            )


def _copy(source: Tensor) -> Tensor:
    return torch.empty_like(source).copy_(source)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m leanvae.bench.measure_speed", description="Times inference on a CPU."
    )
    parser.add_argument("what", choices=["whole", "operations", "memory"])
    parser.add_argument("--size", default="17x256x256", help="frames x height x width that the patches divide")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each work; the fastest counts")
    parser.add_argument("--case", nargs=3, metavar=("ARRANGEMENT", "DTYPE", "WORK"), help="whose memory is measured")
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    size = [int(part) for part in options.size.split("x")]
    with torch.inference_mode():
        if options.what == "memory":
            arrangement, dtype, name = options.case
            print(measure_memory(arrangement, dtype, name, size))
        elif options.what == "operations":
            measure_operations(size, options.rounds)
        else:
            measure_whole(size, options.rounds)


if __name__ == "__main__":
    main()
