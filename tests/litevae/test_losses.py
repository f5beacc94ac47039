"""Losses against hand-made numbers, definitions and limits."""

import math

import pytest
import torch
from torch.nn import functional as F

from litevae import losses
from litevae.posterior import DiagonalGaussian

LOGITS = torch.tensor([-3.0, -0.5, 0.25, 2.0])
OTHER_LOGITS = torch.tensor([[-2.0, 1.0], [0.0, 0.5]])
IMAGE_LOSSES = [losses.l1, losses.charbonnier, losses.wavelet_charbonnier, losses.gaussian_high_frequency_l1]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_l2_is_the_mean_squared_difference():
    assert losses.l2(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 1.0]])).item() == 2.125


def test_l1_is_the_mean_absolute_difference():
    assert losses.l1(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 1.0]])).item() == 1.25


@pytest.mark.parametrize("loss", IMAGE_LOSSES)
def test_image_losses_refuse_shapes_that_would_broadcast(loss):
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 1, 4, 4\): expected the target's, \(2, 3, 4, 4\)"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))


def test_kl_sums_over_the_latent_and_averages_over_the_batch():
    mean = torch.zeros(2, 4, 3)
    mean[0] = 2.0
    posterior = DiagonalGaussian(mean, torch.zeros(2, 4, 3))
    # Each of the first sample's twelve elements is worth half of its squared mean; the second one's nothing.
    assert losses.kl(posterior).item() == pytest.approx((12 * 2.0 + 0) / 2)


def test_hinge_losses_by_hand():
    real = (4 + 1.5 + 0.75 + 0) / 4
    fake = (0 + 2 + 1 + 1.5) / 4
    assert losses.hinge_d_loss(LOGITS, OTHER_LOGITS).item() == pytest.approx((real + fake) / 2)
    assert losses.hinge_g_loss(LOGITS).item() == pytest.approx(1.25 / 4)


def test_hinge_d_loss_is_zero_beyond_the_margin_and_one_for_the_blind():
    assert losses.hinge_d_loss(torch.full((3,), 1.0), torch.full((2,), -1.0)).item() == 0
    assert losses.hinge_d_loss(torch.zeros(3), torch.zeros(2)).item() == 1


@pytest.mark.parity
def test_logistic_losses_are_cross_entropies():
    def entropy(logits, label):
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    expected = (entropy(LOGITS, 1.0) + entropy(OTHER_LOGITS, 0.0)) / 2
    torch.testing.assert_close(losses.logistic_d_loss(LOGITS, OTHER_LOGITS), expected)
    torch.testing.assert_close(losses.logistic_g_loss(OTHER_LOGITS), entropy(OTHER_LOGITS, 1.0))
    assert losses.logistic_d_loss(torch.zeros(3), torch.zeros(2)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", [losses.hinge_g_loss, losses.logistic_g_loss])
def test_generator_losses_push_logits_up(loss):
    # A saturating loss would have no gradient where the discriminator is sure.
    logits = torch.tensor([-50.0, 0.0], requires_grad=True)
    loss(logits).backward()
    assert logits.grad is not None
    assert logits.grad[0].item() == pytest.approx(-0.5)
    assert logits.grad[1].item() < -0.2


def test_lecam_penalty_by_hand():
    average_real, average_fake = torch.tensor(0.5), torch.tensor(-1.0)
    real = ((-0.5 + 1) ** 2 + (0.25 + 1) ** 2 + (2 + 1) ** 2) / 4
    fake = ((0.5 + 2) ** 2 + 0 + 0.5**2 + 0) / 4
    penalty = losses.lecam_penalty(LOGITS, OTHER_LOGITS, average_real, average_fake)
    assert penalty.item() == pytest.approx(real + fake)


def test_lecam_penalty_is_zero_where_both_kinds_look_alike():
    zeros = torch.zeros(4)
    assert losses.lecam_penalty(zeros, zeros, torch.tensor(0.0), torch.tensor(0.0)).item() == 0


@pytest.mark.parametrize("name", ["hinge_d_loss", "logistic_d_loss"])
def test_discriminator_losses_do_not_depend_on_how_logits_are_laid_out(name):
    loss = getattr(losses, name)
    real, fake = torch.randn(4, 1, 3, 5), torch.randn(2, 1, 3, 5)
    torch.testing.assert_close(loss(real, fake), loss(real.flatten(), fake.flatten()))


def test_gradients_are_right():
    real, fake = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    averages = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.hinge_d_loss, (real, fake))
    assert torch.autograd.gradcheck(losses.logistic_d_loss, (real, fake))
    assert torch.autograd.gradcheck(lambda r, f: losses.lecam_penalty(r, f, *averages), (real, fake))
    images = [torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for loss in IMAGE_LOSSES:
        assert torch.autograd.gradcheck(loss, images)


def test_losses_of_bfloat16_are_computed_in_float32():
    real, fake = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    average = torch.tensor(0.1)
    images = [torch.randn(2, 3, 8, 8).bfloat16() for _ in range(2)]
    results = [
        losses.l1(real, fake),
        *(loss(*images) for loss in IMAGE_LOSSES),
        losses.adaptive_weight([real], [fake]),
        losses.hinge_d_loss(real, fake),
        losses.hinge_g_loss(fake),
        losses.logistic_d_loss(real, fake),
        losses.logistic_g_loss(fake),
        losses.lecam_penalty(real, fake, average, average),
    ]
    assert {result.dtype for result in results} == {torch.float32}
    torch.testing.assert_close(results[0], (real.float() - fake.float()).abs().mean())
