"""The schedule is a pure function of seed and step: shares are kept, nothing is lost or repeated, resuming is free."""

import random
from collections import Counter

import pytest

from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig
from leanvae.data.order import BLOCK, bucket_of_step, even_counts, phases_of
from leanvae.data.schedule import Schedule, assign
from leanvae.media.item import Item

SQUARE, WIDE, LONG, IMAGE = Shape(17, 64, 64), Shape(17, 48, 80), Shape(33, 32, 32), Shape(1, 64, 64)


def random_shares(draw, count):
    parts = [draw.uniform(0.01, 1) for _ in range(count)]
    return tuple(part / sum(parts) for part in parts)


@pytest.mark.parametrize("seed", range(8))
def test_even_counts_add_up_never_fall_and_keep_the_shares(seed):
    draw = random.Random(seed)
    shares = random_shares(draw, draw.randint(1, 6))
    offsets = [draw.random() for _ in shares]
    before = [0] * len(shares)
    for step in range(1, 500):
        counts = even_counts(shares, offsets, step)
        assert sum(counts) == step
        assert sum(b - a for a, b in zip(before, counts, strict=True)) == 1
        assert all(b >= a for a, b in zip(before, counts, strict=True))
        assert all(abs(count - share * step) < 2 for count, share in zip(counts, shares, strict=True))
        before = counts


@pytest.mark.parametrize("seed", range(4))
def test_the_bucket_of_a_step_is_known_without_those_before(seed):
    draw = random.Random(seed)
    shares = random_shares(draw, draw.randint(2, 5))
    counts = [0] * len(shares)
    for step in range(5 * BLOCK + 7):
        bucket, before = bucket_of_step(shares, seed, step)
        assert before == counts
        counts[bucket] += 1
    late = 10**9 + 5
    assert all(
        abs(n - share * late) < BLOCK for n, share in zip(bucket_of_step(shares, 0, late)[1], shares, strict=True)
    )


def test_steps_do_not_come_in_a_fixed_rhythm():
    steps = [step for step in range(4000) if bucket_of_step((0.8, 0.2), 0, step)[0] == 1]
    assert abs(len(steps) - 800) <= 13
    assert len({step % 5 for step in steps}) == 5
    assert steps != [step for step in range(4000) if bucket_of_step((0.8, 0.2), 1, step)[0] == 1]


def make_items():
    """Clips of two sources and images of a third, with their shapes."""
    draw = random.Random(0)
    items, shapes = [], []
    for number in range(60):
        items.append(Item(f"clip_{number}.mp4", "clip", source=number % 2))
        shapes.append(draw.choice([Shape(20, 128, 128), Shape(40, 90, 160), Shape(99, 200, 200), None]))
    for number in range(31):
        items.append(Item(f"photo_{number}.png", "image", source=2))
        shapes.append(Shape(1, 100, 100))
    return items, shapes


CONFIG = ClipDataConfig(sources=["a", "b", {"path": "c", "kind": "images"}])
STRETCHES = [
    (40, {SQUARE: 4, WIDE: 4, LONG: 8, IMAGE: 8}),
    (30, {SQUARE: 8, WIDE: 2, LONG: 4, IMAGE: 16}),
    (50, {Shape(9, 32, 32): 12, IMAGE: 8}),
]


def make_schedule(config=CONFIG, seed=0, items=None, stretches=STRETCHES):
    items, shapes = items or make_items()
    return Schedule(config, items, shapes, phases_of(stretches), seed)


def samples(schedule, step):
    """Paths of a step's samples."""
    draw = schedule.at(step)
    found = []
    for index in range(draw.batch_size):
        source, number = draw.row.item(schedule.seed, draw.place + index)
        found.append(draw.row.items[source][number].path)
    return found


def test_a_step_holds_one_bucket_of_one_kind():
    schedule = make_schedule()
    seen = set()
    for step in range(120):
        draw = schedule.at(step)
        seen.add(draw.bucket)
        kinds = {"photo" in path for path in samples(schedule, step)}
        assert kinds == {draw.bucket.is_image}
    assert seen == {SQUARE, WIDE, LONG, IMAGE, Shape(9, 32, 32)}


def test_positions_run_on_without_gaps():
    schedule, position = make_schedule(), 0
    for step in range(150):
        draw = schedule.at(step)
        assert draw.position == position
        position += draw.batch_size


def test_no_file_comes_again_before_all_of_its_bucket_have_come():
    """Also over phases, where they put the same files together."""
    schedule = make_schedule()
    rows = {}
    for step in range(120):
        draw = schedule.at(step)
        rows.setdefault(draw.row.number, []).append((draw, samples(schedule, step)))
    assert len(rows) == 5  # four buckets of the first phases, and the clips of the last
    for draws in rows.values():
        row, places, paths = draws[0][0].row, [], []
        for draw, drawn in draws:
            places += range(draw.place, draw.place + draw.batch_size)
            paths += drawn
        assert places == list(range(len(places)))
        for start in range(0, len(paths) - len(row), len(row)):
            assert len(set(paths[start : start + len(row)])) == len(row)


def test_each_sample_has_its_share_whatever_the_batch_sizes():
    schedule = make_schedule(stretches=[(20_000, STRETCHES[0][1])])
    drawn = Counter()
    for step in range(20_000):
        drawn[schedule.at(step).bucket] += schedule.at(step).batch_size
    items, shapes = make_items()
    members = assign(items, shapes, list(STRETCHES[0][1]))
    total = sum(drawn.values())
    for bucket, indices in members.items():
        assert drawn[bucket] / total == pytest.approx(len(indices) / len(items), rel=0.01)


def test_weights_are_shares_of_the_samples():
    config = ClipDataConfig(
        sources=[{"path": "a", "weight": 5}, {"path": "b", "weight": 1}, {"path": "c", "kind": "images", "weight": 2}]
    )
    schedule = make_schedule(config, stretches=[(3000, STRETCHES[0][1])])
    drawn = Counter()
    for step in range(3000):
        draw = schedule.at(step)
        for index in range(draw.batch_size):
            source, _ = draw.row.item(0, draw.place + index)
            drawn[draw.row.sources[source]] += 1
    total = sum(drawn.values())
    assert [drawn[source] / total for source in range(3)] == pytest.approx([5 / 8, 1 / 8, 2 / 8], rel=0.02)


def test_seeds_give_other_orders_and_the_same_one_the_same():
    first, again, other = make_schedule(), make_schedule(), make_schedule(seed=1)
    # In any order of asking: nothing is remembered that matters.
    later = {step: samples(again, step) for step in reversed(range(60))}
    assert [later[step] for step in range(60)] == [samples(first, step) for step in range(60)]
    assert [samples(first, step) for step in range(60)] != [samples(other, step) for step in range(60)]


def test_buckets_without_files_are_left_out():
    items = [Item(f"{number}.mp4", "clip") for number in range(5)], [Shape(20, 64, 64)] * 5
    config = ClipDataConfig(sources=["a"])
    schedule = make_schedule(config, items=items, stretches=[(3, {SQUARE: 2, LONG: 2})])
    assert schedule.empty == [(0, LONG)]
    assert {schedule.at(step).bucket for step in range(10)} == {SQUARE}
    with pytest.raises(ValueError, match="phase 0: there are no files for its buckets"):
        make_schedule(config, items=items, stretches=[(3, {IMAGE: 2})])
    with pytest.raises(ValueError, match=r"data.sources: b: nothing is left for training"):
        make_schedule(ClipDataConfig(sources=["a", "b"]), items=items, stretches=[(3, {SQUARE: 2})])
    with pytest.raises(ValueError, match="at least one phase"):
        Schedule(config, items[0], items[1], [], 0)
