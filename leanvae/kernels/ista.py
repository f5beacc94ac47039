"""The pointwise steps of an ISTA-Net+ iteration: soft threshold, and the gradient step with its two narrow products."""

# Triton comes only with torch for GPUs, and pyright does not know its launches, kernel[grid](...).
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_PROGRAMS = 512  # partial sums of the threshold's gradient
_ROWS = 4  # tokens that a program steps at a time


@triton.jit
def _threshold_forward(x, threshold, out, num, BLOCK: tl.constexpr):
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + where, mask=where < num, other=0.0).to(tl.float32)
    rest = tl.maximum(tl.abs(values) - tl.load(threshold).to(tl.float32), 0.0)
    y = tl.where(values > 0, rest, tl.where(values < 0, -rest, 0.0))
    tl.store(out + where, y.to(out.dtype.element_ty), mask=where < num)


@triton.jit
def _threshold_backward(grad, x, threshold, grad_x, partial, num, blocks_each, BLOCK: tl.constexpr):
    limit = tl.load(threshold).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * blocks_each * BLOCK
    last = first + blocks_each * BLOCK
    while first < last:  # Triton's interpreter has no range over a bound known only at run time
        where = first + tl.arange(0, BLOCK)
        values = tl.load(x + where, mask=where < num, other=0.0).to(tl.float32)
        g = tl.load(grad + where, mask=where < num, other=0.0).to(tl.float32)
        g = tl.where((tl.abs(values) > limit) & (values != 0), g, 0.0)
        tl.store(grad_x + where, g.to(grad_x.dtype.element_ty), mask=where < num)
        total += tl.where(values > 0, -g, g)
        first += BLOCK
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@torch.library.custom_op("leanvae::soft_threshold", mutates_args=())
def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Compute `leanvae.ops.soft_threshold`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _threshold_forward[(triton.cdiv(x.numel(), _BLOCK),)](x, threshold, out, x.numel(), BLOCK=_BLOCK)
    return out


@soft_threshold.register_fake
def _(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanvae::soft_threshold_backward", mutates_args=())
def _threshold_gradients(grad: Tensor, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and, in float32, of the threshold."""
    grad, x = grad.contiguous(), x.contiguous()
    blocks_each = triton.cdiv(x.numel(), _BLOCK * _PROGRAMS)
    num_programs = triton.cdiv(x.numel(), _BLOCK * blocks_each)
    grad_x = torch.empty_like(x)
    partial = x.new_empty(num_programs, dtype=torch.float32)
    _threshold_backward[(num_programs,)](grad, x, threshold, grad_x, partial, x.numel(), blocks_each, BLOCK=_BLOCK)
    return grad_x, partial.sum().expand(threshold.shape).clone()


@_threshold_gradients.register_fake
def _(grad: Tensor, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, threshold.new_empty(threshold.shape, dtype=torch.float32)


def _threshold_backward_pass(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, threshold = ctx.saved_tensors
    of_x, of_threshold = _threshold_gradients(grad, x, threshold)
    return of_x, of_threshold.to(threshold.dtype)


soft_threshold.register_autograd(
    _threshold_backward_pass, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@triton.jit
def _step_forward(
    x, z, phi, step, out, num, width,
    CHANNELS: tl.constexpr, HAS_Z: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num)[:, None] & (columns < width)[None, :]
    where = rows[:, None] * width + columns[None, :]
    values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    change = tl.zeros([ROWS, BLOCK], tl.float32)
    for channel in range(CHANNELS):
        line = tl.load(phi + channel * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        error = tl.sum(values * line[None, :], axis=1)
        if HAS_Z:
            error -= tl.load(z + rows * CHANNELS + channel, mask=rows < num, other=0.0).to(tl.float32)
        change += error[:, None] * line[None, :]
    result = values - tl.load(step).to(tl.float32) * change
    tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("leanvae::gradient_step", mutates_args=())
def _gradient_step(x: Tensor, z: Tensor | None, phi: Tensor, step: Tensor) -> Tensor:
    """Compute `x - step * (x phi^T - z) phi`; without `z`, for zeros."""
    x, phi = x.contiguous(), phi.contiguous()
    out = torch.empty_like(x)
    channels, width = phi.shape
    num = x.numel() // width
    _step_forward[(triton.cdiv(num, _ROWS),)](
        x, x if z is None else z.contiguous(), phi, step, out, num, width,
        CHANNELS=channels, HAS_Z=z is not None, ROWS=_ROWS, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out


@_gradient_step.register_fake
def _(x: Tensor, z: Tensor | None, phi: Tensor, step: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_for_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _step_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, z, phi, step = ctx.saved_tensors
    of_x = _gradient_step(grad, None, phi, step)  # the step is linear in x, and symmetric
    of_error = (grad @ phi.to(grad.dtype).T).flatten(0, -2)
    error = (x @ phi.to(x.dtype).T - z).flatten(0, -2)
    of_phi = error.T @ grad.flatten(0, -2) + of_error.T @ x.flatten(0, -2)
    of_step = -(error.float() * of_error.float()).sum().expand(step.shape)
    of_z = (step.to(grad.dtype) * of_error).view(z.shape)
    return of_x, of_z, (-step * of_phi).to(phi.dtype), of_step.to(step.dtype)


_gradient_step.register_autograd(_step_gradients, setup_context=_keep_for_step)


def gradient_step(x: Tensor, z: Tensor, phi: Tensor, step: Tensor) -> Tensor:
    """Compute `leanvae.ops.gradient_step`."""
    return _gradient_step(x, z, phi, step)
