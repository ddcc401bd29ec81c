"""Which checkpoints are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.checkpoint.manifest import CheckpointId
from launch.checkpoint.retention import Retention, superfluous


def at(*steps: int) -> list[CheckpointId]:
    return [CheckpointId(step, 1) for step in steps]


LINEAGE = at(60, 50, 40, 30, 20, 10)


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(keep_last=3), (30, 20, 10)),
        (Retention(keep_last=1), (50, 40, 30, 20, 10)),
        (Retention(keep_last=0), (50, 40, 30, 20, 10)),
        (Retention(keep_last=99), ()),
        (Retention(keep_last=1, keep_every=20), (50, 30, 10)),
        (Retention(keep_last=2, keep_every=1), ()),
    ],
)
def test_the_newest_and_every_so_many(retention: Retention, gone: tuple[int, ...]) -> None:
    assert superfluous(LINEAGE, retention) == at(*gone)


def test_the_best_stay_and_of_equals_the_earlier() -> None:
    values = dict(zip(LINEAGE, [0.5, 0.9, 0.1, 0.2, 0.1, 0.7], strict=True))
    assert superfluous(LINEAGE, Retention(1, keep_best=1), values=values) == at(50, 40, 30, 10)
    assert superfluous(LINEAGE, Retention(1, keep_best=2), values=values) == at(50, 30, 10)
    best = Retention(1, keep_best=2, higher_is_better=True)
    assert superfluous(LINEAGE, best, values=values) == at(40, 30, 20)


def test_what_was_not_measured_is_not_the_best() -> None:
    values = {LINEAGE[3]: 0.5, CheckpointId(99, 9): 0.0}  # the other is of no lineage
    assert superfluous(LINEAGE, Retention(1, keep_best=1), values=values) == at(50, 40, 20, 10)
    assert superfluous(LINEAGE, Retention(1, keep_best=1)) == at(50, 40, 30, 20, 10)


def test_what_is_pinned_stays() -> None:
    assert superfluous(LINEAGE, Retention(1), pinned=at(20)) == at(50, 40, 30, 10)


@given(
    steps=st.sets(st.integers(0, 100), max_size=12),
    retention=st.builds(
        Retention,
        keep_last=st.integers(0, 5),
        keep_every=st.none() | st.integers(1, 10),
        keep_best=st.integers(0, 3),
        higher_is_better=st.booleans(),
    ),
    measured=st.dictionaries(st.integers(0, 100), st.floats(allow_nan=False), max_size=12),
    pinned=st.sets(st.integers(0, 100), max_size=3),
)
def test_the_newest_always_stays_and_each_rule_keeps_what_it_says(
    steps: set[int], retention: Retention, measured: dict[int, float], pinned: set[int]
) -> None:
    lineage = at(*sorted(steps, reverse=True))
    values = {CheckpointId(step, 1): value for step, value in measured.items()}
    gone = superfluous(lineage, retention, at(*pinned), values)
    kept = [found for found in lineage if found not in gone]
    assert kept[:1] == lineage[:1]
    assert kept[: retention.keep_last] == lineage[: retention.keep_last]
    assert not {found.step for found in gone} & pinned
    if retention.keep_every:
        assert all(found.step % retention.keep_every for found in gone)
    better = (lambda a, b: a > b) if retention.higher_is_better else (lambda a, b: a < b)
    for found in gone:
        if found in values:
            ahead = [one for one in kept if one in values and not better(values[found], values[one])]
            assert len(ahead) >= retention.keep_best
    # What is tidied once needs no second time.
    assert superfluous(kept, retention, at(*pinned), values) == []
