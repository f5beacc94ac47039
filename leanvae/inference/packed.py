"""Matrix products for inference: in blocks of tokens, and on CPUs with oneDNN's own layout of the weights.

They are custom operators, because `torch.compile` can trace neither the loop over blocks nor the packed layout. Weights
may be packed or plain.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvae.ops import BLOCK_TOKENS, geglu, in_blocks, layer_norm

_onednn = torch.ops.mkldnn


class LinearMap(NamedTuple):
    """A linear map of channels-last tokens.

    Attributes:
        weight: `(O, I)`.
        bias: `(O,)`, or `None`.
    """

    weight: Tensor
    bias: Tensor | None


def can_pack(weight: Tensor) -> bool:
    """Tell whether oneDNN supports the device and dtype of a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return _onednn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Return the weight `(O, I)` in oneDNN's layout for a block of tokens; unchanged without oneDNN."""
    weight = weight.detach().contiguous()
    return _static(_onednn._reorder_linear_weight(weight, BLOCK_TOKENS["cpu"]) if can_pack(weight) else weight.clone())


def pack_linear(linear: LinearMap) -> LinearMap:
    """Pack a map that may have a bias."""
    return LinearMap(pack(linear.weight), None if linear.bias is None else _static(linear.bias.detach().clone()))


def _static(weight: Tensor) -> Tensor:
    """Tell `torch.compile` that a width is no size of the clip, even if both are equal."""
    torch._dynamo.mark_static(weight)
    return weight


@torch.library.custom_op("leanvae::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `x @ weight.T + bias` with a weight that may be packed; `(..., I)` to `(..., O)`."""
    if not x.numel():  # oneDNN refuses empty products
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return in_blocks(lambda tokens: _product(tokens, weight, bias), x)


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("leanvae::packed_feedforward", mutates_args=())
def packed_feedforward(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    contract_weight: Tensor,
    eps: float | None,
    residual: bool,
) -> Tensor:
    """Compute the feedforward of a NAF layer: norm, two linear maps, GEGLU, a linear map back, and the residual.

    Args:
        x: `(..., D)`.
        value_weight: `(I, D)`, packed or plain, like all weights here.
        value_bias: `(I,)`.
        gate_weight: `(I, D)`.
        gate_bias: `(I,)`.
        contract_weight: `(D, I)`.
        eps: of the LayerNorm, whose scale and shift are folded into the weights; `None` without a norm.
        residual: whether `x` is added.

    Returns:
        `(..., D)`.
    """

    def feedforward(tokens: Tensor) -> Tensor:
        normed = tokens if eps is None else layer_norm(tokens, None, None, eps)
        if not gate_weight.is_mkldnn:
            value, gate = F.linear(normed, value_weight, value_bias), F.linear(normed, gate_weight, gate_bias)
            y = F.linear(geglu(value, gate), contract_weight)
            return tokens + y if residual else y
        # oneDNN applies GELU, the gate and the residual while it writes a matrix product's result.
        gate = _onednn._linear_pointwise(normed, gate_weight, gate_bias, "gelu", [], "none")
        hidden = _onednn._linear_pointwise.binary(normed, gate, value_weight, value_bias, "mul")
        if residual:
            return _onednn._linear_pointwise.binary(hidden, tokens, contract_weight, None, "add")
        return _product(hidden, contract_weight, None)

    return in_blocks(feedforward, x)


@packed_feedforward.register_fake
def _(x: Tensor, *_rest: Tensor | float | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the model is prepared for inference and records no gradient: call train() on it first")


for _operator in (packed_linear, packed_feedforward):
    _operator.register_autograd(_refuse)


def _product(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        return _onednn._linear_pointwise(tokens, weight, bias, "none", [], "")
    return F.linear(tokens, weight, bias)
