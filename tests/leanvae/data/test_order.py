"""The order of clips is a pure function of seed, epoch and position."""

import numpy as np
import pytest

from leanvae.data.buckets import Shape
from leanvae.data.order import epoch_order, phase_at, phases_of, source_counts, substitute

SIZES = (7, 5, 20)


def stream(sizes, weights, seed, num_epochs):
    return np.concatenate([epoch_order(sizes, weights, seed, epoch) for epoch in range(num_epochs)])


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_epoch_order_without_weights_takes_each_clip_once(epoch):
    order = epoch_order(SIZES, SIZES, seed=3, epoch=epoch)
    every = [(source, index) for source, size in enumerate(SIZES) for index in range(size)]
    assert sorted(map(tuple, order.tolist())) == every


def test_epoch_order_depends_on_seed_and_epoch_only():
    first = epoch_order(SIZES, SIZES, 3, 1)
    epoch_order(SIZES, SIZES, 4, 0)
    assert np.array_equal(first, epoch_order(SIZES, SIZES, 3, 1))
    assert not np.array_equal(first, epoch_order(SIZES, SIZES, 3, 2))
    assert not np.array_equal(first, epoch_order(SIZES, SIZES, 4, 1))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5, 1, 2), (0.7, 0.2, 0.1)])
def test_weighted_sources_repeat_no_clip_before_all_their_clips_were_seen(weights):
    drawn = [epoch_order(SIZES, weights, 0, epoch) for epoch in range(9)]
    for source, size in enumerate(SIZES):
        counts = np.zeros(size, int)
        for order in drawn:
            # Within an epoch the shuffle mixes the turns; at its end no clip is two turns ahead of another.
            np.add.at(counts, order[order[:, 0] == source, 1], 1)
            assert counts.max() - counts.min() <= 1


def test_weighted_sources_get_their_shares():
    counts = np.stack([np.bincount(epoch_order(SIZES, (5, 1, 2), 0, epoch)[:, 0], minlength=3) for epoch in range(9)])
    assert counts.tolist() == 9 * [[20, 4, 8]]
    drawn = np.bincount(stream((3, 2), (1, 9), 0, 40)[:, 0])
    assert drawn.tolist() == [20, 180]  # also a share of less than one an epoch, over the epochs


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.2, 0.3), (1e-9, 1, 3), SIZES])
@pytest.mark.parametrize("epochs", [0, 1, 2, 1000])
def test_source_counts_add_up_and_round_by_less_than_two(weights, epochs):
    counts = source_counts(SIZES, weights, epochs)
    assert sum(counts) == epochs * sum(SIZES)
    exact = np.array(weights) / sum(weights) * sum(SIZES) * epochs
    assert (np.abs(exact - counts) < 2).all()
    if weights == SIZES:
        assert counts == [epochs * size for size in SIZES]


def test_source_counts_refuse_what_is_not_positive():
    with pytest.raises(ValueError, match="positive"):
        source_counts((3, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="one weight a source"):
        source_counts((3, 2), (1,), 1)


STRETCHES = [(3, {Shape(5, 16, 16): 8}), (2, {Shape(5, 32, 32): 4, Shape(1, 8, 8): 2}), (4, {Shape(1, 8, 24): 12})]


def test_phases_follow_each_other_and_the_last_goes_on():
    phases = phases_of(STRETCHES)
    assert [phase.first_step for phase in phases] == [0, 3, 5]
    found = [phases.index(phase_at(phases, step)) for step in (0, 2, 3, 4, 5, 8, 9, 1000)]
    assert found == [0, 0, 1, 1, 2, 2, 2, 2]
    assert phase_at(phases, 9).batches == STRETCHES[2][1]
    assert phases_of(STRETCHES[:1])[0] == phases[0]


@pytest.mark.parametrize("stretch", [(0, {Shape(1, 8, 8): 8}), (1, {Shape(1, 8, 8): 0}), (1, {})])
def test_phases_refuse_what_is_not_positive(stretch):
    with pytest.raises(ValueError, match="phase 1: expected at least one bucket, and steps and batch sizes of at l"):
        phases_of([(1, {Shape(1, 1, 1): 1}), stretch])
    with pytest.raises(ValueError, match="at least one phase"):
        phases_of([])
    with pytest.raises(ValueError, match="count from 0, got -1"):
        phase_at(phases_of(STRETCHES), -1)


def test_rows_have_orders_of_their_own():
    orders = [epoch_order(SIZES, SIZES, 0, 0, row).tolist() for row in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_substitutes_are_all_the_other_clips_of_the_source_each_once():
    tried = [substitute(0, 11, attempt, index=4, size=9) for attempt in range(8)]
    assert sorted(tried) == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(IndexError, match="no substitute"):
        substitute(0, 11, 8, index=4, size=9)


def test_substitutes_differ_by_position():
    chosen = {substitute(0, place, 0, index=3, size=1000) for place in range(20)}
    assert len(chosen) > 15
    assert substitute(0, 5, 0, 3, 1000) == substitute(0, 5, 0, 3, 1000)
