"""ISTA-Net+ arithmetic against its definitions."""

import torch

from leanvae.bottleneck import ISTABottleneck, gradient_step, soft_threshold
from leanvae.naf import causal_depthwise_conv


def test_soft_threshold_is_the_proximal_map_of_the_l1_norm():
    x = torch.randn(50, dtype=torch.float64)
    threshold = torch.tensor([0.3], dtype=torch.float64)
    candidates = torch.linspace(-4, 4, 80_001, dtype=torch.float64)[:, None]
    cost = 0.5 * (candidates - x) ** 2 + threshold * candidates.abs()
    minimum = candidates[cost.argmin(dim=0), 0]
    torch.testing.assert_close(soft_threshold(x, threshold), minimum, atol=1e-4, rtol=0)


def test_gradient_step_descends_the_measurement_error():
    phi = torch.randn(4, 12, dtype=torch.float64)
    z = torch.randn(7, 4, dtype=torch.float64)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(0.5 * (x @ phi.T - z).square().sum(), x)
    step = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(gradient_step(x, z, phi, step), x - step * gradient)


def test_initial_bottleneck_recovers_from_the_transposed_measurement():
    bottleneck = ISTABottleneck(16, 4, num_iterations=2, num_layers=1)
    torch.testing.assert_close(bottleneck.initial, bottleneck.phi.T)
    assert [step.item() for step in bottleneck.steps] == [1.0, 1.0]
    torch.testing.assert_close(torch.cat(list(bottleneck.thresholds)), torch.full((2,), 0.01))


def test_causal_depthwise_conv_agrees_with_explicit_loops():
    x = torch.randn(1, 3, 4, 5, 2, dtype=torch.float64)
    weight = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64)
    expected = bias.expand_as(x).clone()
    for t in range(3):
        for h in range(4):
            for w in range(5):
                for dt in range(3):
                    for dh in range(3):
                        for dw in range(3):
                            source = (t + dt - 2, h + dh - 1, w + dw - 1)
                            if all(0 <= i < n for i, n in zip(source, (3, 4, 5), strict=True)):
                                expected[0, t, h, w] += weight[:, 0, dt, dh, dw] * x[0][source]
    torch.testing.assert_close(causal_depthwise_conv(x, weight, bias, None), expected)
