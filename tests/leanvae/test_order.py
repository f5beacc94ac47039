"""The order of clips is a pure function of seed, epoch and position."""

import numpy as np
import pytest

from leanvae.data.order import epoch_order, locate, phase_at, phases_of, source_shares, substitute

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
    shares = source_shares(SIZES, (5, 1, 2))
    assert shares == [20, 4, 8]
    order = epoch_order(SIZES, (5, 1, 2), 0, 4)
    assert np.bincount(order[:, 0]).tolist() == shares


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 0.2, 0.3), (1e-9, 1, 3), SIZES])
def test_source_shares_add_up_to_the_epoch_and_round_by_less_than_one(weights):
    shares = source_shares(SIZES, weights)
    assert sum(shares) == sum(SIZES)
    exact = np.array(weights) / sum(weights) * sum(SIZES)
    assert (np.abs(exact - shares) < 1).all()


def test_source_shares_refuse_what_is_not_positive():
    with pytest.raises(ValueError, match="positive"):
        source_shares((3, 0), (1, 1))
    with pytest.raises(ValueError, match="one weight a source"):
        source_shares((3, 2), (1,))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_slices_make_up_the_same_steps(world_size):
    batch, length = 8, sum(SIZES)
    whole = stream(SIZES, SIZES, 0, 3)
    for step in range(10):
        parts = []
        for rank in range(world_size):
            local = batch // world_size
            for index in range(rank * local, (rank + 1) * local):
                epoch, place = locate(step * batch + index, length)
                parts.append(epoch_order(SIZES, SIZES, 0, epoch)[place])
        assert np.array_equal(parts, whole[step * batch : (step + 1) * batch])


STRETCHES = [(3, 8, (16, 16)), (2, 4, (32, 32)), (4, 12, (8, 24))]


def test_phases_follow_each_other_and_the_last_goes_on():
    phases = phases_of(STRETCHES)
    assert [phase.first_step for phase in phases] == [0, 3, 5]
    assert [phase.first_position for phase in phases] == [0, 24, 32]
    found = [phases.index(phase_at(phases, step)) for step in (0, 2, 3, 4, 5, 8, 9, 1000)]
    assert found == [0, 0, 1, 1, 2, 2, 2, 2]
    assert phase_at(phases, 9).resolution == (8, 24)


def slices(phases, rank=0, world_size=1, start=0, stop=12):
    """The positions of a rank's steps."""
    for step in range(start, stop):
        phase = phase_at(phases, step)
        local = phase.batch_size // world_size
        yield [phase.position(step, index) for index in range(rank * local, (rank + 1) * local)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_positions_run_on_over_phases_whatever_the_number_of_ranks(world_size):
    phases = phases_of(STRETCHES)
    parts = [list(slices(phases, rank, world_size)) for rank in range(world_size)]
    positions = [position for step in zip(*parts, strict=True) for part in step for position in part]
    assert positions == list(range(len(positions)))


@pytest.mark.parametrize("start", range(12))
def test_resuming_at_a_step_drops_the_first_ones_across_phases(start):
    phases = phases_of(STRETCHES)
    assert list(slices(phases, start=start)) == list(slices(phases))[start:]


def test_a_first_phase_stays_as_it_is_when_others_are_added():
    assert phases_of(STRETCHES[:1])[0] == phases_of(STRETCHES)[0]


@pytest.mark.parametrize("stretch", [(0, 8, (8, 8)), (1, 0, (8, 8)), (1, 8, (0, 8)), (1, 8, (8, -8))])
def test_phases_refuse_what_is_not_positive(stretch):
    with pytest.raises(ValueError, match="phase 1: steps, batch size, height and width must be at least 1, got"):
        phases_of([(1, 1, (1, 1)), stretch])
    with pytest.raises(ValueError, match="at least one phase"):
        phases_of([])
    with pytest.raises(ValueError, match="count from 0, got -1"):
        phase_at(phases_of(STRETCHES), -1)


def test_substitutes_are_all_the_other_clips_of_the_source_each_once():
    tried = [substitute(0, 2, 11, attempt, index=4, size=9) for attempt in range(8)]
    assert sorted(tried) == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(IndexError, match="no substitute"):
        substitute(0, 2, 11, 8, index=4, size=9)


def test_substitutes_differ_by_position():
    chosen = {substitute(0, 0, place, 0, index=3, size=1000) for place in range(20)}
    assert len(chosen) > 15
    assert substitute(0, 0, 5, 0, 3, 1000) == substitute(0, 0, 5, 0, 3, 1000)
