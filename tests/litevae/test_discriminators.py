"""The patch discriminator: its grid, its field of view and its independence of the batch."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from litevae.discriminators import DiscriminatorConfig, PatchDiscriminator


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def without_norm(discriminator):
    """Keeps what a logit sees to its convolutions: a norm by groups reads the whole image."""
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):
            discriminator.layers[index] = nn.Identity()
    return discriminator


def test_logits_form_the_grid_of_the_docstring():
    discriminator = PatchDiscriminator(base_channels=8)
    assert discriminator(torch.randn(2, 3, 64, 96)).shape == (2, 1, 6, 10)


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_is_that_of_the_paper(num_layers, expected):
    discriminator = without_norm(PatchDiscriminator(base_channels=4, num_layers=num_layers)).double()
    images = torch.randn(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == expected


def test_logits_of_an_image_do_not_depend_on_its_batch():
    discriminator = PatchDiscriminator(base_channels=8).train()
    images = torch.randn(3, 3, 32, 40)
    together = discriminator(images)
    images[1:] = 100 * torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(discriminator(images)[0], together[0])
    torch.testing.assert_close(discriminator(images[:1])[0], together[0])


def test_discriminator_holds_no_running_statistics():
    assert list(PatchDiscriminator(base_channels=8).buffers()) == []


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_smallest_image_gives_one_logit_and_a_smaller_one_an_error(num_layers):
    discriminator = PatchDiscriminator(base_channels=4, num_layers=num_layers)
    size = discriminator.min_size
    assert discriminator(torch.randn(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"images are {size}x{size - 1} pixels.* at least {size}x{size}"):
        discriminator(torch.randn(1, 3, size, size - 1))


def test_published_layout_has_the_widths_and_initial_weights_of_the_paper():
    discriminator = PatchDiscriminator()
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert {layer.kernel_size for layer in convolutions} == {(4, 4)}
    assert convolutions[2].weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_deep_discriminators_widen_at_most_eight_times():
    discriminator = PatchDiscriminator(base_channels=4, num_layers=5)
    widths = [layer.out_channels for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_all_parameters_and_pixels_get_a_gradient():
    discriminator = PatchDiscriminator(base_channels=8)
    images = torch.randn(2, 3, 40, 40, requires_grad=True)
    discriminator(images).square().sum().backward()
    for tensor in (images, *discriminator.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_config_is_strict_and_builds_the_discriminator():
    config = DiscriminatorConfig(base_channels=8, num_layers=2)
    assert PatchDiscriminator(**config.model_dump()).min_size == 12
    with pytest.raises(ValidationError):
        DiscriminatorConfig(num_layers=0)
    with pytest.raises(ValidationError):
        DiscriminatorConfig.model_validate({"layers": 3})
