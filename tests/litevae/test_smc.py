"""Self-modulated maps against Equation 3 written out in loops, and their intended properties."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from litevae.smc import SelfModulatedConv, SelfModulatedLinear, modulated_weight

KERNELS = [(), (3,), (1, 1), (3, 2), (3, 1, 2)]


def weight_by_loops(weight, scale, gain, eps):
    """Equation 3, one number at a time, then the gain."""
    num_out, num_in, *kernel = weight.shape
    taps = list(itertools.product(range(num_in), *map(range, kernel)))
    result = torch.empty_like(weight)
    for o in range(num_out):
        norm = (sum((scale[tap[0]] * weight[(o, *tap)]) ** 2 for tap in taps) + eps) ** 0.5
        for tap in taps:
            result[(o, *tap)] = gain * scale[tap[0]] * weight[(o, *tap)] / norm
    return result


def random_parameters(kernel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, *kernel, generator=generator, dtype=dtype)
    return weight, torch.randn(4, generator=generator, dtype=dtype), torch.tensor([0.7], dtype=dtype)


def make_map(kernel, **options):
    """A map whose parameters have left their initial values."""
    layer = SelfModulatedConv(4, 3, kernel, **options) if kernel else SelfModulatedLinear(4, 3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parity
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_modulated_weight_agrees_with_loops(kernel, eps):
    weight, scale, gain = random_parameters(kernel)
    expected = weight_by_loops(weight, scale, gain.item(), eps)
    torch.testing.assert_close(modulated_weight(weight, scale, gain, eps), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_modulated_weight_ignores_the_size_of_weight_and_scale(kernel):
    weight, scale, gain = random_parameters(kernel)
    expected = modulated_weight(weight, scale, gain)
    sizes = torch.tensor([0.1, 5.0, 300.0], dtype=weight.dtype).reshape(3, *[1] * (weight.ndim - 1))
    torch.testing.assert_close(modulated_weight(weight * sizes, scale, gain), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(modulated_weight(weight, 20 * scale, gain), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_modulated_weight_has_the_gain_as_norm(kernel):
    norms = modulated_weight(*random_parameters(kernel)).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.7))


@pytest.mark.parametrize("kernel", [(), (3, 2), (2, 1, 2)])
def test_modulated_weight_gradients_are_right(kernel):
    parameters = [p.requires_grad_() for p in random_parameters(kernel)]
    assert torch.autograd.gradcheck(modulated_weight, parameters)


def test_modulated_weight_of_zeros_is_zero_with_finite_gradients():
    weight = torch.zeros(2, 3, requires_grad=True)
    result = modulated_weight(weight, torch.ones(3), torch.ones(1))
    result.sum().backward()
    assert result.abs().sum() == 0
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_modulated_weight_is_computed_in_float32_for_bfloat16():
    parameters = random_parameters((3, 3), torch.bfloat16)
    exact = modulated_weight(*(p.double() for p in parameters))
    rounded = modulated_weight(*parameters)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0.008, atol=1e-6)  # half a step of bfloat16


@pytest.mark.parity
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
def test_maps_agree_with_torch_on_the_weight_of_loops(kernel, bias):
    layer = make_map(kernel, bias=bias).double()
    weight = weight_by_loops(layer.weight.detach(), layer.scale.detach(), layer.gain.item(), 1e-8)
    if kernel:
        x = torch.randn(2, 4, *[7 - axis for axis in range(len(kernel))], dtype=torch.float64)
        expected = [F.conv1d, F.conv2d, F.conv3d][len(kernel) - 1](x, weight, layer.bias)
    else:
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
        expected = torch.einsum("bthi,oi->btho", x, weight) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fold_gives_a_plain_weight_with_the_same_output(kernel):
    layer = make_map(kernel)
    folded = layer.fold()
    assert not folded.requires_grad
    assert folded.shape == layer.weight.shape
    x = torch.randn(2, 4, *[6] * len(kernel)) if kernel else torch.randn(2, 5, 4)
    plain = [F.linear, F.conv1d, F.conv2d, F.conv3d][len(kernel)](x, folded, layer.bias)
    torch.testing.assert_close(layer(x), plain)


def test_conv_honours_stride_and_padding():
    layer = make_map((3, 3), stride=2, padding=1)
    x = torch.randn(1, 4, 9, 6)
    assert layer(x).shape == (1, 3, 5, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.fold(), layer.bias, stride=2, padding=1))
    uneven = make_map((1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1))
    assert uneven(torch.randn(1, 4, 3, 8, 8)).shape == (1, 3, 3, 4, 8)


def test_pointwise_kernels_agree():
    linear, conv = make_map(()), SelfModulatedConv(4, 3, (1, 1))
    state = linear.state_dict()
    conv.load_state_dict(state | {"weight": state["weight"][..., None, None]})
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_initial_map_keeps_variance_times_the_gain(kernel):
    torch.manual_seed(0)
    layer = SelfModulatedConv(64, 64, kernel, gain_init=0.1) if kernel else SelfModulatedLinear(64, 64, gain_init=0.1)
    x = torch.randn(4, 64, 16, 16) if kernel else torch.randn(1024, 64)
    assert layer(x).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_all_parameters_learn(kernel):
    layer = make_map(kernel)
    layer(torch.randn(2, 4, *[6] * len(kernel)) if kernel else torch.randn(9, 4)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        "weight",
        "scale",
        "gain",
        "bias",
    }


@pytest.mark.parametrize("kernel", [(), (3, 3, 3, 3)])
def test_conv_refuses_other_numbers_of_axes(kernel):
    with pytest.raises(ValueError, match="expected 1, 2 or 3"):
        SelfModulatedConv(4, 3, kernel)
