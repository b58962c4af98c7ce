"""Which rows meet in a step: every example once an epoch, alike on any number of devices, and resumable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt import vote
from selfdoubt.errors import ConfigError
from selfdoubt.train.batches import LengthSortedSampler, StepSampler, collate, pack_rows
from selfdoubt.train.config import TrainConfig

LENGTHS = torch.randint(3, 30, (103,), generator=torch.Generator().manual_seed(0))


def config(**settings):
    return TrainConfig(**{"data": "", "out": "", "batch_size": 6, "max_length": 32} | settings)


def steps(*, members=1, rank=0, world=1, **settings):
    settings["wrapper"] = vote.Wrapper(n_voters=members) if members > 1 else None
    return StepSampler(LENGTHS, LENGTHS - 2, config(**settings), rank=rank, world=world)


def examples(batches):
    return [i for batch in batches for row in batch.rows for i in row]


def test_an_epoch_sees_every_example_once_but_for_an_unfilled_step():
    seen = examples(steps())
    assert len(seen) == len(set(seen)) == 102


def test_epochs_and_seeds_have_orders_of_their_own():
    sampler = steps()
    first = examples(sampler)
    assert examples(sampler) == first
    sampler.set_epoch(1)
    assert examples(sampler) != first
    assert examples(steps(seed=1)) != first


def test_rows_of_a_batch_are_of_about_the_same_length():
    spread = [max(LENGTHS[row].sum() for row in b.rows) - min(LENGTHS[row].sum() for row in b.rows) for b in steps()]
    assert sum(spread) / len(spread) < 4  # at random about 17


def test_members_share_the_long_rows():
    for batch in steps(members=3):
        sums = [int(sum(LENGTHS[row].sum() for row in batch.rows[m * 2 : m * 2 + 2])) for m in range(3)]
        assert max(sums) - min(sums) <= max(int(LENGTHS[row].sum()) for row in batch.rows)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("accumulate", "world"), [(1, 2), (2, 1), (2, 2)])
def test_a_step_has_the_same_rows_for_each_member_however_it_is_split(members, accumulate, world):
    whole = list(steps(members=members, batch_size=6 * accumulate * world))
    parts = [list(steps(members=members, accumulate=accumulate, rank=r, world=world)) for r in range(world)]
    micro = 6 // members
    for number, step in enumerate(whole):
        split = [parts[r][number * accumulate + k] for k in range(accumulate) for r in range(world)]
        for m in range(members):
            mine = [row for batch in split for row in batch.rows[m * micro : (m + 1) * micro]]
            rows = step.rows[m * micro * accumulate * world : (m + 1) * micro * accumulate * world]
            assert mine == rows
        assert {batch.step_tokens for batch in split} == {step.step_tokens}
        assert step.step_tokens == sum(int(LENGTHS[row].sum()) - 2 * len(row) for row in step.rows)


@pytest.mark.parametrize("done", [0, 1, 5, 16])
def test_an_interrupted_epoch_goes_on_with_what_is_left(done):
    whole = list(steps())
    resumed = steps()
    resumed.start = done
    assert list(resumed) == whole[done:]
    assert list(resumed) == whole  # the next epoch is whole again


def test_too_few_examples_for_a_step_are_an_error():
    with pytest.raises(ConfigError, match="a step takes 300 rows, and there are 103"):
        steps(batch_size=300)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.randoms(use_true_random=False))
def test_packing_keeps_every_example_and_fits(lengths, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack_rows(order, torch.tensor(lengths), 20)
    assert sorted(i for row in rows for i in row) == sorted(order)
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)


def test_packing_fills_rows():
    sampler = steps(pack=True)
    filled = [int(LENGTHS[row].sum()) / 32 for batch in sampler for row in batch.rows]
    assert sum(filled) / len(filled) > 0.85


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [7, 8, 9])
def test_validation_sees_every_example_once_in_equally_many_batches(world, n):
    places = [LengthSortedSampler(LENGTHS[:n], 2, rank=r, world=world) for r in range(world)]
    assert len({len(place) for place in places}) == 1
    seen = [i for place in places for i in examples(place)]
    assert sorted(seen) == list(range(n))
    assert all(batch.rows for place in places for batch in place)


A, B = {"ids": [5, 6, 7], "counts": [False, False, True]}, {"ids": [8, 9], "counts": [False, True]}


def test_labels_are_the_next_tokens_that_count():
    batch = collate([[A], [B]], 2)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[-100, 7, -100], [9, -100, -100]]
    assert batch.chosen.tolist() == [1, 3]
    assert batch.mask() is None
    assert batch.tokens == 5


def test_packed_examples_do_not_see_each_other():
    batch = collate([[A, B]], 2, 6, packed=True)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.labels.tolist() == [[-100, 7, -100, 9, -100, -100]]
    sees = batch.mask()[0, 0]
    assert sees[4].tolist() == [False, False, False, True, True, False]
    assert sees[2].tolist() == [True, True, True, False, False, False]
    assert sees[5].any()  # padding sees itself: a row of a softmax cannot be empty


@pytest.mark.parametrize("pad_to", [1, 8, 64])
def test_rows_are_padded_to_few_widths_within_the_longest(pad_to):
    batches = list(steps(pad_to=pad_to))
    for batch in batches:
        longest = max(int(LENGTHS[row].sum()) for row in batch.rows)
        assert longest <= batch.width <= 32
        assert batch.width == 32 or batch.width % pad_to == 0
        assert batch.width - longest < pad_to
    assert len({batch.width for batch in batches}) <= 32 // pad_to + 1


def test_validation_is_padded_in_the_same_way():
    widths = [batch.width for batch in LengthSortedSampler(LENGTHS, 4, padding=8, limit=30)]
    assert set(widths) <= {8, 16, 24, 30}


def test_auto_pads_to_the_longest_row_on_a_cpu():
    assert [b.width for b in steps(accelerator="cpu")] == [b.width for b in steps(pad_to=1)]
