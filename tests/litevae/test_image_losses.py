"""Losses of images and the adaptive weight against slow definitions in float64."""

import math

import pytest
import pywt
import torch

from litevae import losses

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_images(*shape, count=2):
    return [torch.rand(*shape, dtype=DOUBLE) * 2 - 1 for _ in range(count)]


def test_charbonnier_by_hand():
    prediction, target = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 3.0, 2.0])
    expected = (4 + math.sqrt(9 + 16) + math.sqrt(16 + 16)) / 3
    assert losses.charbonnier(prediction, target, eps=4).item() == pytest.approx(expected)


def test_charbonnier_of_equal_tensors_is_eps_without_a_gradient():
    prediction = torch.ones(2, 3, requires_grad=True)
    loss = losses.charbonnier(prediction, torch.ones(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1e-3)
    assert prediction.grad is not None
    assert not prediction.grad.any()
    with pytest.raises(ValueError, match="eps is 0: it must be positive"):
        losses.charbonnier(prediction, torch.ones(2, 3), eps=0)


@pytest.mark.parity
def test_wavelet_charbonnier_agrees_with_pywt():
    prediction, target = random_images(2, 3, 8, 12)
    total, count = 0.0, 0
    for p, t in zip(prediction.flatten(0, 1), target.flatten(0, 1), strict=True):
        for a, b in zip(pywt.dwt2(p.numpy(), "haar")[1], pywt.dwt2(t.numpy(), "haar")[1], strict=True):
            for x, y in zip(a.flatten() / 2, b.flatten() / 2, strict=True):
                total, count = total + math.sqrt((x - y) ** 2 + 1e-6), count + 1
    assert losses.wavelet_charbonnier(prediction, target).item() == pytest.approx(total / count, rel=1e-12)


def test_wavelet_charbonnier_ignores_the_low_band():
    (image,) = random_images(1, 3, 8, 8, count=1)
    blocks = torch.randn(1, 3, 4, 4, dtype=DOUBLE).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert losses.wavelet_charbonnier(image + blocks, image).item() == pytest.approx(1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 8, 7)])
def test_wavelet_charbonnier_refuses_odd_sizes(shape):
    with pytest.raises(ValueError, match="has odd length 7"):
        losses.wavelet_charbonnier(torch.zeros(shape), torch.zeros(shape))


def gaussian_high_frequencies(image, kernel_size, sigma):
    """`image - h(image)` of one plane by loops; pixels outside are the nearest ones inside."""
    radius, (height, width) = kernel_size // 2, image.shape
    out = image.clone()
    offsets = range(-radius, radius + 1)
    total = sum(math.exp(-(i**2 + j**2) / (2 * sigma**2)) for i in offsets for j in offsets)
    for y in range(height):
        for x in range(width):
            for i in offsets:
                for j in offsets:
                    pixel = image[min(max(y + i, 0), height - 1), min(max(x + j, 0), width - 1)]
                    out[y, x] -= math.exp(-(i**2 + j**2) / (2 * sigma**2)) / total * pixel
    return out


@pytest.mark.parity
@pytest.mark.parametrize(("size", "kernel_size", "sigma"), [((6, 9), 5, 1.0), ((1, 1), 5, 1.0), ((2, 5), 7, 0.6)])
def test_gaussian_loss_agrees_with_loops(size, kernel_size, sigma):
    prediction, target = random_images(1, 2, *size)
    pairs = zip(prediction[0], target[0], strict=True)
    expected = torch.stack(
        [
            (gaussian_high_frequencies(p, kernel_size, sigma) - gaussian_high_frequencies(t, kernel_size, sigma)).abs()
            for p, t in pairs
        ]
    ).mean()
    loss = losses.gaussian_high_frequency_l1(prediction, target, kernel_size, sigma)
    torch.testing.assert_close(loss, expected)


def test_gaussian_loss_ignores_brightness_and_grows_with_frequency():
    (image,) = random_images(1, 3, 16, 16, count=1)
    assert losses.gaussian_high_frequency_l1(image + 0.3, image).item() == pytest.approx(0, abs=1e-12)
    columns = torch.arange(16, dtype=DOUBLE)
    waves = [torch.cos(frequency * columns).expand_as(image) for frequency in (0.2, 0.8, 3.1)]
    slow, middle, fast = (losses.gaussian_high_frequency_l1(image + wave, image).item() for wave in waves)
    assert slow < middle < fast


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size is 4: it must be odd and positive"),
        ({"kernel_size": -1}, "kernel_size is -1"),
        ({"sigma": 0.0}, "sigma is 0.0: it must be positive"),
    ],
)
def test_gaussian_loss_refuses_impossible_filters(options, message):
    with pytest.raises(ValueError, match=message):
        losses.gaussian_high_frequency_l1(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), **options)


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def reflected(index, length):
    return -index if index < 0 else 2 * (length - 1) - index if index >= length else index


def ldl_of_one_image(prediction, average_prediction, target, kernel_size):
    """The definition by loops over pixels of `(C, H, W)` float64: the mean over channels and pixels."""
    channels, height, width = prediction.shape
    radius = kernel_size // 2
    residual, average_residual = (
        [[sum(abs((target - x)[c, i, j].item()) for c in range(channels)) for j in range(width)] for i in range(height)]
        for x in (prediction, average_prediction)
    )
    scale = variance([value for row in residual for value in row]) ** (1 / 5)
    total = 0.0
    for i in range(height):
        for j in range(width):
            if residual[i][j] < average_residual[i][j]:
                continue
            window = [
                residual[reflected(i + di, height)][reflected(j + dj, width)]
                for di in range(-radius, radius + 1)
                for dj in range(-radius, radius + 1)
            ]
            for c in range(channels):
                total += abs(variance(window) * scale * (prediction - target)[c, i, j].item())
    return total / (channels * height * width)


@pytest.mark.parity
@pytest.mark.parametrize(("size", "kernel_size"), [((9, 8), 7), ((4, 5), 7), ((6, 5), 3)])
def test_ldl_agrees_with_loops(size, kernel_size):
    images = random_images(2, 3, *size, count=3)
    expected = [ldl_of_one_image(*(x[n] for x in images), kernel_size) for n in range(2)]
    assert losses.ldl(*images, kernel_size).item() == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_ldl_is_zero_where_the_average_model_is_worse_or_nothing_differs():
    prediction, target = random_images(1, 3, 12, 12)
    worse = target + 1.1 * (prediction - target)
    assert losses.ldl(prediction, worse, target).item() == 0
    assert losses.ldl(prediction, target, target).item() > 0
    assert losses.ldl(target, prediction, target).item() == 0


def test_ldl_map_carries_no_gradient():
    prediction, average, target = random_images(1, 3, 8, 8, count=3)
    prediction.requires_grad_()
    average.requires_grad_()
    losses.ldl(prediction, average, target).backward()
    assert average.grad is None
    assert prediction.grad is not None
    # With a constant map M, the gradient is M / (C H W) times the difference's sign, and so gives back the loss.
    value = (prediction.grad * (prediction - target)).sum()
    torch.testing.assert_close(value, losses.ldl(prediction, average, target))


def test_ldl_in_float32_keeps_the_digits_of_the_variance():
    # A large constant residual with a small ripple, where a mean of squares alone would cancel.
    ripple, target = 1e-3 * torch.randn(1, 3, 16, 16, dtype=DOUBLE), torch.full((1, 3, 16, 16), -1.0, dtype=DOUBLE)
    prediction = 0.9 + ripple
    exact = losses.ldl(prediction, target, target)
    single = losses.ldl(prediction.float(), target.float(), target.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("shapes", "kernel_size", "message"),
    [
        ([(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)], 6, "kernel_size is 6: it must be odd"),
        ([(1, 3, 8, 3), (1, 3, 8, 3), (1, 3, 8, 3)], 7, "a window of 7 needs H and W of at least 4"),
        ([(1, 3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 8)], 7, r"shape \(1, 1, 8, 8\): expected the target's"),
        ([(1, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8)], 7, r"shape \(1, 3, 8, 8\): expected the target's"),
    ],
)
def test_ldl_refuses_what_it_cannot_compare(shapes, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        losses.ldl(*(torch.zeros(shape) for shape in shapes), kernel_size)


@pytest.mark.parametrize("loss", [losses.wavelet_charbonnier, losses.gaussian_high_frequency_l1])
def test_image_losses_refuse_clips(loss):
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 8, 8\): expected images"):
        loss(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3, 4, 8, 8))


def test_gradient_norm_is_that_of_all_tensors_in_one():
    tensors = [torch.randn(3, 4), torch.randn(5).bfloat16(), torch.randn(2, 2, 2)]
    expected = torch.cat([tensor.float().flatten() for tensor in tensors]).norm()
    torch.testing.assert_close(losses.gradient_norm(tensors), expected)
    with pytest.raises(ValueError, match="tensors is empty"):
        losses.gradient_norm([])


def test_gradient_norm_of_half_precision_does_not_overflow():
    assert losses.gradient_norm([torch.full((100,), 6e4, dtype=torch.float16)]).item() == pytest.approx(6e5, rel=1e-3)


def test_adaptive_weight_by_hand_and_bounded():
    reconstruction = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    adversarial = [torch.tensor([0.0, 1.0]), torch.tensor([[0.0]])]
    assert losses.adaptive_weight(reconstruction, adversarial, delta=0.25).item() == pytest.approx(0.5 * 5 / 1.25)
    zeros = [torch.zeros(2)]
    assert losses.adaptive_weight(reconstruction, zeros).item() == 1e4
    assert losses.adaptive_weight(zeros, zeros).item() == 0


def test_adaptive_weight_halves_the_relative_gradient_and_carries_none():
    weight = torch.randn(4, 4, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(8, 4, dtype=DOUBLE)
    first, second = ((x @ weight).square().mean(), torch.tanh(x @ weight).mean())
    gradients = [torch.autograd.grad(loss, weight, create_graph=True) for loss in (first, second)]
    adaptive = losses.adaptive_weight(*gradients, delta=0)
    assert not adaptive.requires_grad
    ratio = losses.gradient_norm([adaptive * gradients[1][0]]) / losses.gradient_norm(gradients[0])
    assert ratio.item() == pytest.approx(0.5)
