"""Triton kernels against plain torch in float64: in Triton's interpreter on CPUs, compiled if there is a GPU."""

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from leanvae import kernels
from leanvae.naf import NAFLayers, causal_depthwise_conv
from leanvae.ops import geglu, gradient_step, layer_norm, soft_threshold

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is that process")
def test_kernels_agree_in_the_interpreter():
    """Triton reads the variable when it is imported, which another test may have done before."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return request.param


def check(device, kernel, plain, *inputs):
    """Compares output and gradients of a float32 kernel with those of a plain function in float64.

    Args:
        device: where the kernel runs.
        kernel: the operator.
        plain: the same in plain torch.
        inputs: float64 tensors on the CPU, or `None`.
    """
    exact = [None if x is None else x.clone().requires_grad_() for x in inputs]
    rounded = [None if x is None else x.float().to(device).requires_grad_() for x in inputs]
    expected, actual = plain(*exact), kernel(*rounded)
    assert actual.dtype == torch.float32
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)
    close(actual.double().cpu(), expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad.float().to(device))
    for x, reference in zip(rounded, exact, strict=True):
        if x is not None:
            close(x.grad.double().cpu(), reference.grad, rtol=1e-4, atol=1e-4)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "has_past", "residual"),
    [((2, 1, 2, 5, 6), False, True), ((1, 3, 1, 3, 6), True, False), ((1, 1, 1, 1, 3), True, True)],
)
def test_depthwise_conv_kernel(device, shape, has_past, residual):
    from leanvae.kernels.depthwise import causal_depthwise_conv as kernel

    batch, _, height, width, dim = shape
    past = random(batch, 2, height, width, dim) if has_past else None
    inputs = random(*shape), random(dim, 1, 3, 3, 3), random(dim), past
    check(device, partial(kernel, residual=residual), partial(causal_depthwise_conv, residual=residual), *inputs)


@needs_triton
def test_depthwise_conv_kernel_takes_any_strides_and_no_bias(device):
    from leanvae.kernels.depthwise import causal_depthwise_conv as kernel

    def transposed(function, x, weight):
        return function(x.transpose(2, 3), weight, None, None, False)

    inputs = random(1, 2, 2, 3, 4), random(4, 1, 3, 3, 3)
    check(device, partial(transposed, kernel), partial(transposed, causal_depthwise_conv), *inputs)


@needs_triton
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 16)])
def test_layer_norm_kernel(device, shape, affine):
    from leanvae.kernels.feedforward import layer_norm as kernel

    scale_and_shift = (random(shape[-1]), random(shape[-1])) if affine else (None, None)
    check(device, partial(kernel, eps=1e-5), partial(layer_norm, eps=1e-5), random(*shape) + 2, *scale_and_shift)


@needs_triton
def test_geglu_kernel_on_halves_of_one_tensor(device):
    from leanvae.kernels.feedforward import geglu as kernel

    def of_halves(function, x):
        return function(*x.chunk(2, dim=-1))

    check(device, partial(of_halves, kernel), partial(of_halves, geglu), 2 * random(2, 5, 26))
    check(device, kernel, geglu, random(3, 8), random(3, 8))


@needs_triton
@pytest.mark.parametrize("threshold", [0.5, -0.3, 0.0])
def test_soft_threshold_kernel(device, threshold):
    from leanvae.kernels.ista import soft_threshold as kernel

    check(device, kernel, soft_threshold, random(3, 700), torch.tensor([threshold], dtype=torch.float64))


@needs_triton
def test_gradient_step_kernel(device):
    from leanvae.kernels.ista import gradient_step as kernel

    check(device, kernel, gradient_step, random(2, 3, 20), random(2, 3, 4), random(4, 20), random(1))


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
def test_layers_run_on_the_kernels(monkeypatch):
    torch.manual_seed(0)
    layers, x = NAFLayers(8, 1), torch.randn(1, 2, 2, 3, 8)
    expected = layers(x)
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    actual = layers(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def kernels_and_constants():
    """Every kernel with what is known when it is compiled."""
    if find_spec("triton") is None:
        return []
    conv = {"HAS_BIAS": True, "RESIDUAL": True, "BLOCK_W": 4, "BLOCK_D": 128}
    rows = {"ROWS": 4, "BLOCK": 512}
    return [
        ("depthwise", "_convolve", conv | {"HAS_PAST": True, "SIGN": 1}),
        ("depthwise", "_convolve", conv | {"HAS_PAST": False, "SIGN": -1}),
        ("depthwise", "_weight_gradient", {"HAS_PAST": True, "BLOCK_W": 4, "BLOCK_D": 128}),
        ("feedforward", "_norm_forward", rows | {"AFFINE": True}),
        ("feedforward", "_norm_backward", rows | {"AFFINE": True}),
        ("feedforward", "_geglu_forward", {"BLOCK": 1024}),
        ("feedforward", "_geglu_backward", {"BLOCK": 1024}),
        ("ista", "_threshold_forward", {"BLOCK": 1024}),
        ("ista", "_threshold_backward", {"BLOCK": 1024}),
        ("ista", "_step_forward", rows | {"CHANNELS": 4, "HAS_Z": True}),
    ]


INTEGERS = set("T H W D frames first num_rows rows_each num width value_stride gate_stride blocks_each".split())
IN_FLOAT32 = set("weight bias partial scale shift mean rstd grad_scale grad_shift threshold phi step".split())


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("module", "name", "constants"), kernels_and_constants())
def test_kernel_compiles_for_a_gpu_without_one(module, name, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"leanvae.kernels.{module}"), name)

    def type_of(argument):
        if argument in constants:
            return "constexpr"
        if argument == "eps":
            return "fp32"
        return "i32" if argument in INTEGERS else "*fp32" if argument in IN_FLOAT32 else "*bf16"

    source = ASTSource(
        fn=kernel,
        signature={argument: type_of(argument) for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constants.items()},
    )
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_a_gpu_agree_with_the_cpu(dtype):
    layers, x = NAFLayers(128, 2).double(), torch.randn(2, 5, 16, 24, 128, dtype=torch.float64)
    expected = layers(x)
    actual = layers.to("cuda", dtype)(x.to("cuda", dtype))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert (actual.cpu().double() - expected).abs().max() < tolerance * expected.abs().max()


def test_kernels_are_for_gpus():
    assert not kernels.usable(torch.zeros(1))


@needs_triton
@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True")])
def test_an_environment_variable_switches_the_kernels_off(value, expected):
    code = "from types import SimpleNamespace as Tensor; import torch; from leanvae import kernels; "
    code += "print(kernels.usable(Tensor(is_cuda=True, dtype=torch.float32, numel=lambda: 1)))"
    env = {**os.environ, "LEANVAE_KERNELS": value}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
