"""Every sample exactly once per epoch, whatever runs it and wherever it starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.sampler import Sampler, epoch_order, micro_steps, rank_micro_batches, shuffled

sizes = st.integers(1, 40)


@given(rows=st.integers(1, 200), batch=sizes, epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_an_epoch_sees_every_row_once(rows: int, batch: int, epochs: int, seed: int) -> None:
    sampler = Sampler("data", seed, rows, batch)
    consumed, seen = 0, []
    for _ in range(sampler.steps_for(epochs)):
        step = sampler.batch(consumed)
        assert 0 < len(step) <= batch
        consumed += len(step)
        seen.extend(step)
    assert consumed == epochs * rows
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(rows=st.integers(1, 100), batch=sizes, other=sizes, consumed=st.integers(0, 300))
def test_it_goes_on_from_any_number_of_samples(rows: int, batch: int, other: int, consumed: int) -> None:
    """What is left of an epoch is what was not seen of it, even where the batch changes in between."""
    epoch, done = divmod(consumed, rows)
    seen = list(epoch_order("data", 0, epoch, rows)[:done])
    sizes_in_turn = [batch, other]
    while consumed < (epoch + 1) * rows:
        step = Sampler("data", 0, rows, sizes_in_turn[consumed % 2]).batch(consumed)
        consumed += len(step)
        seen.extend(step)
    assert sorted(seen) == list(range(rows))


@given(rows=st.integers(1, 400), batch=sizes, seed=st.integers(0, 5), data=st.data())
def test_grouping_by_length_keeps_every_row_once(rows: int, batch: int, seed: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 50), min_size=rows, max_size=rows)))
    sampler = Sampler("data", seed, rows, batch, lengths)
    order = sampler.order(0)
    assert sorted(order) == list(range(rows))
    whole = rows // batch * batch
    assert list(order[whole:]) == list(epoch_order("data", seed, 0, rows)[whole:])


def test_grouping_by_length_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=2000)

    def padding(sampler: Sampler) -> float:
        batches = [sampler.batch(start) for start in range(0, 2000, 16)]
        return sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum() - 1

    assert padding(Sampler("data", 0, 2000, 16)) > 0.8
    assert padding(Sampler("data", 0, 2000, 16, lengths)) < 0.06


def test_grouping_by_length_does_not_begin_with_the_short_rows() -> None:
    lengths = np.arange(800)
    first = Sampler("data", 0, 800, 16, lengths).order(0)[:400]
    assert 300 < lengths[first].mean() < 500


@given(rows=st.integers(1, 60), world_size=st.integers(1, 9), micro_batch=st.integers(1, 20))
def test_ranks_share_a_batch_without_loss_or_repetition(rows: int, world_size: int, micro_batch: int) -> None:
    batch = shuffled(1000, "rows")[:rows]
    parts = [rank_micro_batches(batch, rank, world_size, micro_batch) for rank in range(world_size)]
    assert {len(part) for part in parts} == {micro_steps(rows, world_size, micro_batch)}
    cuts = [cut for part in parts for cut in part]
    assert all(1 <= len(cut.rows) <= micro_batch for cut in cuts)
    assert sorted(np.concatenate([cut.rows for cut in cuts if not cut.dummy])) == sorted(batch)


def test_the_order_depends_on_data_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(data, seed, epoch, 50)) for data in "ab" for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)


def test_the_order_is_the_same_for_ever() -> None:
    """A job resumed after an upgrade must go on in the order it began with."""
    assert epoch_order("data", 0, 0, 10).tolist() == [9, 0, 7, 5, 3, 4, 1, 2, 6, 8]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 7), (2, 14), (0.5, 4), (1.5, 11), (0.001, 1)])
def test_parts_of_an_epoch_round_up_to_steps(epochs: float, steps: int) -> None:
    assert Sampler("data", 0, 100, 16).steps_for(epochs) == steps
