"""LayerNorm and GEGLU, the steps around a feedforward's matrix products."""

# Triton comes only with torch for GPUs, and pyright does not know its launches, kernel[grid](...).
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4  # tokens that a program normalizes at a time
_PROGRAMS = 512  # partial sums of the scale's and shift's gradients
_BLOCK = 1024


@triton.jit
def _norm_forward(
    x, scale, shift, out, mean, rstd, num, width, eps,
    AFFINE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num)[:, None] & (columns < width)[None, :]
    where = rows[:, None] * width + columns[None, :]
    values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(values, axis=1) / width
    centred = tl.where(inside, values - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    y = centred * inverse[:, None]
    if AFFINE:
        y = y * tl.load(scale + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        y = y + tl.load(shift + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + rows, centre, mask=rows < num)
    tl.store(rstd + rows, inverse, mask=rows < num)


@triton.jit
def _norm_backward(
    grad, x, scale, mean, rstd, grad_x, grad_scale, grad_shift, num, width, rows_each,
    AFFINE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    of_scale = tl.zeros([BLOCK], tl.float32)
    of_shift = tl.zeros([BLOCK], tl.float32)
    gamma = tl.load(scale + columns, mask=columns < width, other=0.0).to(tl.float32) if AFFINE else of_scale + 1.0
    first = program.to(tl.int64) * rows_each
    last = first + rows_each
    while first < last:  # Triton's interpreter has no range over a bound known only at run time
        rows = first + tl.arange(0, ROWS)
        inside = (rows < num)[:, None] & (columns < width)[None, :]
        where = rows[:, None] * width + columns[None, :]
        g = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(mean + rows, mask=rows < num, other=0.0)
        inverse = tl.load(rstd + rows, mask=rows < num, other=0.0)
        normed = tl.where(inside, (values - centre[:, None]) * inverse[:, None], 0.0)
        of_scale += tl.sum(g * normed, axis=0)
        of_shift += tl.sum(g, axis=0)
        g = tl.where(inside, g * gamma[None, :], 0.0)
        along = tl.sum(g * normed, axis=1) / width
        average = tl.sum(g, axis=1) / width
        result = (g - average[:, None] - normed * along[:, None]) * inverse[:, None]
        tl.store(grad_x + where, result.to(grad_x.dtype.element_ty), mask=inside)
        first += ROWS
    if AFFINE:
        tl.store(grad_scale + program * width + columns, of_scale, mask=columns < width)
        tl.store(grad_shift + program * width + columns, of_shift, mask=columns < width)


@torch.library.custom_op("leanvae::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized tokens, and each token's mean and inverse deviation in float32."""
    x = x.contiguous()
    num, width = x.numel() // x.shape[-1], x.shape[-1]
    out, mean, rstd = torch.empty_like(x), _statistic(x), _statistic(x)
    absent = x  # a pointer that is not read
    _norm_forward[(triton.cdiv(num, _ROWS),)](
        x, absent if scale is None else scale, absent if shift is None else shift, out, mean, rstd, num, width, eps,
        AFFINE=scale is not None, ROWS=_ROWS, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return out, mean, rstd


@_layer_norm.register_fake
def _(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _statistic(x), _statistic(x)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("leanvae::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the tokens and, in float32, of scale and shift (meaningless without them)."""
    grad, x = grad.contiguous(), x.contiguous()
    num, width = x.numel() // x.shape[-1], x.shape[-1]
    rows_each = _ROWS * triton.cdiv(num, _ROWS * _PROGRAMS)
    num_programs = triton.cdiv(num, rows_each)
    grad_x = torch.empty_like(x)
    of_scale = x.new_zeros(num_programs, width, dtype=torch.float32)
    of_shift = torch.zeros_like(of_scale)
    _norm_backward[(num_programs,)](
        grad, x, x if scale is None else scale, mean, rstd, grad_x, of_scale, of_shift, num, width, rows_each,
        AFFINE=scale is not None, ROWS=_ROWS, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return grad_x, of_scale.sum(0), of_shift.sum(0)


@_layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = x.new_empty(x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), width, torch.empty_like(width)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, shift, _eps = inputs
    _out, mean, rstd = output
    ctx.save_for_backward(x, scale, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _norm_gradients(ctx: Any, grad: Tensor, *_of_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, mean, rstd = ctx.saved_tensors
    grad_x, of_scale, of_shift = _layer_norm_backward(grad, x, scale, mean, rstd)
    if scale is None:
        return grad_x, None, None, None
    return grad_x, of_scale.to(scale.dtype), of_shift.to(shift.dtype), None


_layer_norm.register_autograd(_norm_gradients, setup_context=_keep_for_norm)


def layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    """Compute `leanvae.ops.layer_norm`; scale and shift are either both given or both `None`."""
    return _layer_norm(x, scale, shift, eps)[0]


@triton.jit
def _gelu_parts(gate):
    """Return the normal distribution's cumulative and density at `gate`."""
    cumulative = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return cumulative, density


@triton.jit
def _geglu_forward(value, gate, out, width, value_stride, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(value + row * value_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    cumulative, _density = _gelu_parts(g)
    tl.store(out + row * width + columns, (v * g * cumulative).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_backward(grad, value, gate, grad_value, grad_gate, width, value_stride, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    cumulative, density = _gelu_parts(g)
    where = row * width + columns
    tl.store(grad_value + where, (y * g * cumulative).to(grad_value.dtype.element_ty), mask=inside)
    tl.store(grad_gate + where, (y * v * (cumulative + g * density)).to(grad_gate.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """Return `(N, width)` with adjacent columns; a view if the rows are evenly spaced, like those of half a tensor."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("leanvae::geglu", mutates_args=())
def geglu(value: Tensor, gate: Tensor) -> Tensor:
    """Compute `leanvae.ops.geglu`; both may be halves of one tensor."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    v, g = _rows(value), _rows(gate)
    num, width = g.shape
    _geglu_forward[(num, triton.cdiv(width, _BLOCK))](v, g, out, width, v.stride(0), g.stride(0), BLOCK=_BLOCK)
    return out


@geglu.register_fake
def _(value: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanvae::geglu_backward", mutates_args=())
def _geglu_gradients(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    of_value = torch.empty_like(gate, memory_format=torch.contiguous_format)
    of_gate = torch.empty_like(of_value)
    v, g = _rows(value), _rows(gate)
    num, width = g.shape
    _geglu_backward[(num, triton.cdiv(width, _BLOCK))](
        grad.contiguous(), v, g, of_value, of_gate, width, v.stride(0), g.stride(0), BLOCK=_BLOCK
    )
    return of_value, of_gate


@_geglu_gradients.register_fake
def _(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    of_value = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return of_value, torch.empty_like(of_value)


geglu.register_autograd(
    lambda ctx, grad: _geglu_gradients(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
