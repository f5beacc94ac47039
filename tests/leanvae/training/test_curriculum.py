"""Rates, weights and seeds as functions of the step."""

import math

import pytest
import torch

from leanvae.training.curriculum import ema_decay, learning_rate, perceptual_frames, posterior_noise, ramp


def test_learning_rate_warms_up_then_follows_a_cosine():
    rates = [learning_rate(step, 1.0, 0.1, warmup_steps=10, max_steps=110) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 10 + 99 // 3
    assert rates[middle] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 3)))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (5, 2), (0, 2), (3, 4)])
def test_learning_rate_of_short_runs_is_finite_and_positive(warmup, steps):
    for step in range(steps):
        assert 0 < learning_rate(step, 1e-3, 1e-5, warmup, steps) <= 1e-3


def test_final_rate_is_never_above_the_highest():
    assert learning_rate(99, 1e-6, 1e-5, 0, 100) == 1e-6


def test_ramp_starts_at_its_step_and_ends_at_one():
    assert [ramp(step, 3, 4) for step in range(9)] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert ramp(0, 0, 0) == 1


def test_ema_decay_rises_to_its_value():
    values = [ema_decay(step, 0.99) for step in range(2000)]
    assert values == sorted(values)
    assert values[0] == 0.1
    assert values[-1] == 0.99


def test_noise_of_a_sample_depends_on_its_place_alone():
    whole = posterior_noise((4, 2, 3, 3), seed=1, step=5, indices=[0, 1, 2, 3])
    parts = [posterior_noise((4, 2, 3, 3), seed=1, step=5, indices=part) for part in ([0, 1], [2, 3])]
    torch.testing.assert_close(whole, torch.cat(parts), atol=0, rtol=0)
    others = [posterior_noise((4, 2, 3, 3), 1, 6, [0]), posterior_noise((4, 2, 3, 3), 2, 5, [0]), whole[1:2]]
    assert all((whole[0] - other[0]).abs().max() > 0.1 for other in others)
    many = posterior_noise((4, 5, 16, 16), 0, 0, list(range(16)))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_perceptual_frames_are_the_first_and_one_aligned_group():
    indices = list(range(200))
    frames = perceptual_frames(17, 4, seed=0, step=3, indices=indices)
    assert frames.shape == (200, 5)
    assert (frames[:, 0] == 0).all()
    assert set(frames[:, 1].tolist()) == {1, 5, 9, 13}
    assert (frames[:, 1:] - frames[:, 1:2] == torch.arange(4)).all()
    torch.testing.assert_close(perceptual_frames(17, 4, 0, 3, indices[7:9]), frames[7:9])


def test_perceptual_frames_of_an_image_are_the_image():
    assert perceptual_frames(1, 4, seed=0, step=0, indices=[0, 1]).tolist() == [[0], [0]]
