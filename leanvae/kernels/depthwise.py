"""The causal depthwise 3x3x3 convolution of channels-last tokens, with bias and residual."""

# Triton comes only with torch for GPUs, and pyright does not know its launches, kernel[grid](...).
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TAPS = 27
_PAST_FRAMES = 2
_BLOCK_WIDTH = 4  # positions along a row
_BLOCK_CHANNELS = 128
_PROGRAMS = 64  # partial sums of the weights' gradients, for each block of channels and every three taps


@triton.jit
def _positions(part, row, T, H, frames, first, BLOCK: tl.constexpr):
    """Return the columns of a part of a row, and the row's h, t and b, with t counted from `first`."""
    w = part * BLOCK + tl.arange(0, BLOCK)
    return w, row % H, (row // H) % frames + first, (row // H // frames).to(tl.int64)


@triton.jit
def _load(source, past, b, t, h, w, d, T, H, W, D, HAS_PAST: tl.constexpr):
    """Load a row's tokens `(w, d)` in float32: zeros outside, and the past before the first frame."""
    in_row = ((h >= 0) & (h < H)) & (w >= 0) & (w < W)
    tokens = in_row[:, None] & (d < D)[None, :]
    where = w[:, None] * D + d[None, :]
    line = source + ((b * T + t) * H + h) * W * D
    x = tl.load(line + where, mask=tokens & (t >= 0) & (t < T), other=0.0).to(tl.float32)
    if HAS_PAST:
        line = past + ((b * 2 + t + 2) * H + h) * W * D
        x += tl.load(line + where, mask=tokens & (t < 0) & (t >= -2), other=0.0).to(tl.float32)
    return x


@triton.jit
def _convolve(
    source, past, weight, bias, out, T, H, W, D, frames, first,
    HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute `frames` frames from `first` on.

    SIGN 1 is the convolution, -1 its transpose, which looks ahead in time.
    """
    parts = tl.cdiv(W, BLOCK_W)
    row = tl.program_id(0) // parts
    w, h, t, b = _positions(tl.program_id(0) % parts, row, T, H, frames, first, BLOCK_W)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    for tap in tl.static_range(27):
        back, down, right = tap // 9 - 2, tap // 3 % 3 - 1, tap % 3 - 1
        x = _load(source, past, b, t + SIGN * back, h + SIGN * down, w + SIGN * right, d, T, H, W, D, HAS_PAST)
        total += x * tl.load(weight + tap * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        total += _load(source, past, b, t, h, w, d, T, H, W, D, False)
    line = out + row.to(tl.int64) * W * D
    tl.store(
        line + w[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=(w < W)[:, None] & (d < D)[None, :]
    )


@triton.jit
def _weight_gradient(
    grad, source, past, partial, T, H, W, D, num_rows, rows_each,
    HAS_PAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of three taps at one time and height over a program's rows."""
    back, down = tl.program_id(2) // 3 - 2, tl.program_id(2) % 3 - 1
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    left = tl.zeros([BLOCK_D], tl.float32)
    middle = tl.zeros([BLOCK_D], tl.float32)
    right = tl.zeros([BLOCK_D], tl.float32)
    parts = tl.cdiv(W, BLOCK_W)
    index = tl.program_id(0) * rows_each * parts
    last = tl.minimum(index + rows_each * parts, num_rows * parts)
    while index < last:  # Triton's interpreter has no range over a bound known only at run time
        w, h, t, b = _positions(index % parts, index // parts, T, H, T, 0, BLOCK_W)
        g = _load(grad, past, b, t, h, w, d, T, H, W, D, False)
        left += tl.sum(g * _load(source, past, b, t + back, h + down, w - 1, d, T, H, W, D, HAS_PAST), axis=0)
        middle += tl.sum(g * _load(source, past, b, t + back, h + down, w, d, T, H, W, D, HAS_PAST), axis=0)
        right += tl.sum(g * _load(source, past, b, t + back, h + down, w + 1, d, T, H, W, D, HAS_PAST), axis=0)
        index += 1
    line = partial + (tl.program_id(0) * 27 + tl.program_id(2) * 3) * D + d
    tl.store(line, left, mask=d < D)
    tl.store(line + D, middle, mask=d < D)
    tl.store(line + 2 * D, right, mask=d < D)


def _plain_past(past: Tensor | None, x: Tensor) -> Tensor:
    """Return the past in the kernels' layout; without a past, a pointer that is not read."""
    return x if past is None else past.contiguous()


def _taps(weight: Tensor) -> Tensor:
    """Rearrange `(D, 1, 3, 3, 3)` to `(27, D)`."""
    return weight.reshape(-1, _TAPS).T.contiguous()


@torch.library.custom_op("leanvae::causal_depthwise_conv", mutates_args=())
def causal_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: bool
) -> Tensor:
    """Compute `leanvae.naf.causal_depthwise_conv` for any strides; the result is contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    batch, frames, height, width, channels = x.shape
    grid = (batch * frames * height * triton.cdiv(width, _BLOCK_WIDTH), triton.cdiv(channels, _BLOCK_CHANNELS))
    _convolve[grid](
        x, _plain_past(past, x), _taps(weight), x if bias is None else bias, out,
        frames, height, width, channels, frames, 0,
        HAS_PAST=past is not None, HAS_BIAS=bias is not None, RESIDUAL=residual, SIGN=1,
        BLOCK_W=_BLOCK_WIDTH, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    return out


@causal_depthwise_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, residual: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("leanvae::causal_depthwise_conv_backward", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, past: Tensor | None, residual: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of the frames, after those of the past, and in float32 of the weight."""
    grad, x = grad.contiguous(), x.contiguous()
    batch, frames, height, width, channels = x.shape
    num_past = 0 if past is None else _PAST_FRAMES
    grad_x = x.new_empty(batch, num_past + frames, height, width, channels)
    blocks = triton.cdiv(channels, _BLOCK_CHANNELS)
    rows = batch * (num_past + frames) * height
    _convolve[(rows * triton.cdiv(width, _BLOCK_WIDTH), blocks)](
        grad, grad, _taps(weight), grad, grad_x, frames, height, width, channels, num_past + frames, -num_past,
        HAS_PAST=False, HAS_BIAS=False, RESIDUAL=residual, SIGN=-1,
        BLOCK_W=_BLOCK_WIDTH, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    rows = batch * frames * height
    rows_each = triton.cdiv(rows, _PROGRAMS)
    num_programs = triton.cdiv(rows, rows_each)
    partial = x.new_empty(num_programs, _TAPS, channels, dtype=torch.float32)
    _weight_gradient[(num_programs, blocks, _TAPS // 3)](
        grad, x, _plain_past(past, x), partial, frames, height, width, channels, rows, rows_each,
        HAS_PAST=past is not None, BLOCK_W=_BLOCK_WIDTH, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    return grad_x, partial.sum(0).T.reshape(weight.shape).contiguous()


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, past: Tensor | None, residual: bool) -> tuple[Tensor, Tensor]:
    batch, frames, *area = x.shape
    num_past = 0 if past is None else _PAST_FRAMES
    return x.new_empty(batch, num_past + frames, *area), weight.new_empty(weight.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, past, ctx.residual = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, past)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, past = ctx.saved_tensors
    of_frames, of_weight = _gradients(grad, x, weight, past, ctx.residual)
    of_bias = None if ctx.bias_dtype is None else grad.sum((0, 1, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    of_past = None if past is None else of_frames[:, :_PAST_FRAMES]
    of_x = of_frames if past is None else of_frames[:, _PAST_FRAMES:]
    return of_x, of_weight.to(weight.dtype), of_bias, of_past, None


causal_depthwise_conv.register_autograd(_backward, setup_context=_keep)
