"""All discriminators: their common shapes, independence and errors; then PatchGAN's and StyleGAN's properties."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from litevae.discriminators import (
    DiscriminatorConfig,
    PatchDiscriminator,
    StyleDiscriminator,
    UNetDiscriminator,
    build_discriminator,
)

KINDS = {"patch": PatchDiscriminator, "unet": UNetDiscriminator, "stylegan": StyleDiscriminator}
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(kind, base_channels=8, num_layers=3, in_channels=3):
    config = DiscriminatorConfig(kind=kind, base_channels=base_channels, num_layers=num_layers)
    return build_discriminator(config, in_channels)


def without_norm(discriminator):
    """Limit a logit's view to the convolutions, because a group norm reads the whole image."""
    for module in list(discriminator.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return discriminator


def test_build_discriminator_makes_the_kind_and_size_of_the_config(kind):
    discriminator = build(kind, base_channels=4, num_layers=2, in_channels=5)
    assert type(discriminator) is KINDS[kind]
    same = KINDS[kind](in_channels=5, base_channels=4, num_layers=2)
    shapes = {name: tensor.shape for name, tensor in same.state_dict().items()}
    assert {name: tensor.shape for name, tensor in discriminator.state_dict().items()} == shapes
    assert discriminator(torch.randn(1, 5, 16, 16))[0].shape == (1, 1, *([2, 2] if kind == "patch" else [1, 1]))


def test_config_is_strict_and_patch_is_the_default():
    assert DiscriminatorConfig().kind == "patch"
    assert isinstance(build_discriminator(DiscriminatorConfig(base_channels=8)), PatchDiscriminator)
    for wrong in ({"num_layers": 0}, {"layers": 3}, {"kind": "vit"}):
        with pytest.raises(ValidationError):
            DiscriminatorConfig.model_validate(wrong)


def test_logits_come_in_a_tuple_of_the_documented_shapes(kind):
    logits = build(kind)(torch.randn(2, 3, 64, 96))
    assert isinstance(logits, tuple)
    expected = {"patch": [(2, 1, 6, 10)], "unet": [(2, 1, 1, 1), (2, 1, 64, 96)], "stylegan": [(2, 1, 1, 1)]}
    assert [tuple(output.shape) for output in logits] == expected[kind]


def test_logits_of_an_image_do_not_depend_on_its_batch(kind):
    discriminator = build(kind).train()
    images = torch.randn(3, 3, 32, 40)
    together = discriminator(images)
    images[1:] = 100 * torch.randn(2, 3, 32, 40)
    for replaced, alone, expected in zip(discriminator(images), discriminator(images[:1]), together, strict=True):
        torch.testing.assert_close(replaced[0], expected[0])
        torch.testing.assert_close(alone[0], expected[0])


def test_discriminator_holds_no_buffers_and_is_the_same_in_evaluation(kind):
    discriminator = build(kind)
    assert list(discriminator.buffers()) == []
    images = torch.randn(2, 3, 32, 32)
    for training, evaluation in zip(discriminator.train()(images), discriminator.eval()(images), strict=True):
        assert torch.equal(training, evaluation)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_smallest_image_gives_finite_logits_and_a_smaller_one_an_error(kind, num_layers):
    discriminator = build(kind, base_channels=4, num_layers=num_layers)
    size = discriminator.min_size
    assert size == {"patch": 3, "unet": 2, "stylegan": 1}[kind] * 2**num_layers
    logits = discriminator(torch.randn(1, 3, size, size))
    assert logits[0].shape == (1, 1, 1, 1)
    assert all(torch.isfinite(output).all() for output in logits)
    with pytest.raises(ValueError, match=rf"images are {size}x{size - 1} pixels.* at least {size}x{size}"):
        discriminator(torch.randn(1, 3, size, size - 1))


def test_all_parameters_and_pixels_get_a_gradient(kind):
    discriminator = build(kind).to(DOUBLE)
    images = torch.randn(2, 3, 40, 40, dtype=DOUBLE, requires_grad=True)
    sum(output.square().sum() for output in discriminator(images)).backward()
    assert images.grad is not None
    assert (images.grad != 0).all()
    for parameter in discriminator.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_discriminators_run_in_bfloat16_and_on_the_meta_device(kind):
    assert all(
        output.dtype == torch.bfloat16 for output in build(kind).bfloat16()(torch.randn(1, 3, 32, 32).bfloat16())
    )
    with torch.device("meta"):
        assert all(output.is_meta for output in build(kind, base_channels=64)(torch.randn(1, 3, 32, 32)))


def test_first_logits_are_small_and_differ_between_images(kind):
    for output in build(kind, base_channels=32)(torch.rand(4, 3, 64, 64) * 2 - 1):
        assert output.abs().mean() < 3
        assert output.mean((1, 2, 3)).std() > 0


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 16), (2, 34), (3, 70)])
def test_patch_receptive_field_is_that_of_the_paper(num_layers, expected):
    discriminator = without_norm(PatchDiscriminator(base_channels=4, num_layers=num_layers)).to(DOUBLE)
    images = torch.randn(1, 3, 160, 160, dtype=DOUBLE, requires_grad=True)
    (logits,) = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == expected


def test_patch_layout_has_the_widths_and_initial_weights_of_the_paper():
    discriminator = PatchDiscriminator()
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert {layer.kernel_size for layer in convolutions} == {(4, 4)}
    assert convolutions[2].weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_patch_widens_at_most_eight_times():
    discriminator = PatchDiscriminator(base_channels=4, num_layers=5)
    widths = [layer.out_channels for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (19, 40), (31, 16)])
def test_unet_takes_any_size_and_sees_every_pixel(size):
    discriminator = UNetDiscriminator(base_channels=4).to(DOUBLE)
    for index in range(2):
        images = torch.randn(1, 3, *size, dtype=DOUBLE, requires_grad=True)
        output = discriminator(images)[index]
        assert output.shape[2:] == (size if index else (1, 1))
        output.square().sum().backward()
        assert images.grad is not None
        assert (images.grad != 0).all()


def test_unet_pixel_logits_move_with_the_image():
    # Without norms, and away from the borders, by a multiple of the step of the bottleneck.
    discriminator = without_norm(UNetDiscriminator(base_channels=4, num_layers=2)).to(DOUBLE)
    image = torch.zeros(1, 3, 96, 96, dtype=DOUBLE)
    image[..., 40:48, 40:48] = torch.randn(3, 8, 8, dtype=DOUBLE)
    moved = discriminator(image.roll((4, 8), (2, 3)))[1]
    expected = discriminator(image)[1].roll((4, 8), (2, 3))
    torch.testing.assert_close(moved[..., 32:-32, 32:-32], expected[..., 32:-32, 32:-32])


def test_unet_pixel_logits_are_centred_on_their_pixels():
    discriminator = without_norm(UNetDiscriminator(base_channels=4, num_layers=2)).to(DOUBLE)
    images = torch.randn(1, 3, 93, 93, dtype=DOUBLE, requires_grad=True)
    discriminator(images)[1][0, 0, 45, 47].backward()
    assert images.grad is not None
    influence = images.grad.abs().sum((0, 1))
    influence = influence / influence.sum()
    positions = torch.arange(93, dtype=DOUBLE)
    assert (influence.sum(1) @ positions).item() == pytest.approx(45, abs=2)
    assert (influence.sum(0) @ positions).item() == pytest.approx(47, abs=2)


def test_unet_logits_of_the_bottleneck_do_not_read_the_decoder():
    discriminator = UNetDiscriminator(base_channels=4)
    discriminator(torch.randn(1, 3, 16, 16))[0].sum().backward()
    assert all(parameter.grad is None for parameter in discriminator.up_blocks.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.down_blocks.parameters())


def halving_convolution(image, weight, bias):
    """Loops: blur by [1, 3, 3, 1] around the middle of each 2x2 pixels, then the kernel around it; zeros outside."""
    channels, height, width = image.shape
    taps = torch.tensor([1, 3, 3, 1], dtype=image.dtype)
    kernel_size = weight.shape[-1]

    def blurred(y, x):
        """Low-passed image between the rows y and y + 1 and the columns x and x + 1."""
        value = torch.zeros(channels, dtype=image.dtype)
        for i in range(4):
            for j in range(4):
                if 0 <= y - 1 + i < height and 0 <= x - 1 + j < width:
                    value += taps[i] * taps[j] / 64 * image[:, y - 1 + i, x - 1 + j]
        return value

    out = torch.zeros(weight.shape[0], height // 2, width // 2, dtype=image.dtype)
    for y in range(height // 2):
        for x in range(width // 2):
            for i in range(kernel_size):
                for j in range(kernel_size):
                    window = blurred(2 * y + i - kernel_size // 2, 2 * x + j - kernel_size // 2)
                    out[:, y, x] += weight[:, :, i, j] @ window
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parity
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (2, 3)])
def test_stylegan_block_agrees_with_loops(size):
    block = StyleDiscriminator(base_channels=3, num_layers=1).blocks[0].to(DOUBLE)
    for bias in (block.first.bias, block.second.bias):
        nn.init.normal_(bias)
    x = torch.randn(1, 3, *size, dtype=DOUBLE)

    def activate(x):
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    inner = activate(F.conv2d(x, block.first.weight / math.sqrt(27), block.first.bias, padding=1))
    residual = activate(halving_convolution(inner[0], block.second.weight / math.sqrt(27), block.second.bias))
    shortcut = halving_convolution(x[0], block.shortcut.weight / math.sqrt(3), None)
    torch.testing.assert_close(block(x)[0], (residual + shortcut) / 2**0.5)


def test_stylegan_weights_are_stored_with_unit_variance_and_activations_keep_theirs():
    discriminator = StyleDiscriminator(base_channels=32)
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(1, abs=0.05)
    x = torch.randn(2, 32, 32, 32)
    assert discriminator.blocks[0].first(x).std().item() == pytest.approx(1, abs=0.15)


def test_stylegan_blur_keeps_a_constant_and_removes_a_checkerboard():
    shortcut = StyleDiscriminator(base_channels=1, num_layers=1).blocks[0].shortcut
    nn.init.ones_(shortcut.weight)
    flat = shortcut(torch.ones(1, 1, 12, 12))[..., 1:-1, 1:-1]
    torch.testing.assert_close(flat, torch.ones_like(flat))
    board = (torch.arange(12)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    assert shortcut(board[None, None])[..., 1:-1, 1:-1].abs().max() < 1e-6


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (20, 33)])
def test_stylegan_gives_one_logit_for_any_size(size):
    discriminator = StyleDiscriminator(base_channels=4)
    assert discriminator(torch.randn(2, 3, *size))[0].shape == (2, 1, 1, 1)
