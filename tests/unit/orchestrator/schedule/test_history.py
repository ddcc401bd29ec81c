"""What is expected of run times, from those that were seen."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule.history import FEW, GRID, REMEMBERED, History, Kind, Ran, _index, class_at, class_of
from tests.builders import a_gang

JOB = a_gang("j1", 1, queue="q", name="train")
RANS = (0.0, 40.0, 300.0, 2e3, 1e4, 2e5)


def seen(*ran_s: float, queue: str = "q", name: str = "train", processes: int = 1) -> History:
    history = History()
    for one in ran_s:
        history.add(Ran(queue, name, processes, one))
    return history


def answers(history: History) -> list[float | None]:
    jobs = (JOB, a_gang("j2", 8, queue="q", name="train"), a_gang("j3", queue="r"))
    return [
        answer
        for job in jobs
        for ran in RANS
        for answer in (history.expected_s(job, ran), *(history.left_s(job, ran, part) for part in (0.1, 0.5, 0.9)))
    ]


def gittins(runs: Iterable[float], ran: float) -> float:
    """By its definition: the least expected time per completion over all spans that end with a class."""
    left = [run for run in runs if run >= ran]
    best = math.inf
    for stop in GRID:
        done = sum(run < stop for run in left)
        if stop > ran and done:
            best = min(best, sum(min(run, stop) - ran for run in left) / done)
    return best


@given(st.lists(st.floats(0, GRID[-1]), min_size=1, max_size=60))
def test_the_index_is_that_of_gittins(runs: list[float]) -> None:
    count, total = [0.0] * len(GRID), [0.0] * len(GRID)
    for run in runs:
        at = max(at for at, start in enumerate(GRID) if start <= run)
        count[at] += 1
        total[at] += run
    index = _index(count, total)
    for at, start in enumerate(GRID):
        expected = gittins(runs, start)
        if math.isfinite(expected):
            assert index[at] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        else:
            assert index[at] == max(start, GRID[1]), "as long again as it ran already"


def test_without_history_it_is_least_attained_service() -> None:
    history = History()
    expected = [history.expected_s(JOB, start) for start in GRID[1:20]]
    assert expected == sorted(expected)
    assert history.left_s(JOB, 0.0, 0.5) is None
    assert history.version == 0


def test_where_all_end_soon_a_job_that_goes_on_is_expected_to_take_long() -> None:
    history = seen(*[100.0] * 50, *[1e5] * 5)
    assert history.expected_s(JOB, 0.0) < 150
    assert history.expected_s(JOB, 300.0) > 3000


def test_where_all_take_the_same_time_a_job_is_the_better_the_longer_it_ran() -> None:
    """What least attained service has the wrong way round."""
    history = seen(*[5000.0 + at for at in range(200)])
    expected = [history.expected_s(JOB, ran) for ran in (0.0, 1000.0, 2000.0, 4000.0)]
    assert expected == sorted(expected, reverse=True)
    assert 4000 < expected[0] < 6500
    assert history.expected_s(JOB, 9000.0) > expected[0]


def test_only_like_jobs_tell_of_a_job() -> None:
    history = seen(*[100.0] * 100)
    for _ in range(100):
        history.add(Ran("q", "other", 1, 1e5))
        history.add(Ran("q", "train", 8, 1e4))
    short, long = history.expected_s(JOB, 0.0), history.expected_s(a_gang("j2", 1, queue="q", name="other"), 0.0)
    large = history.expected_s(a_gang("j3", 8, queue="q", name="train"), 0.0)
    unknown = history.expected_s(a_gang("j4", 1, queue="q", name="new"), 0.0)
    assert short < unknown < long
    assert short < large
    assert history.expected_s(a_gang("j5", 7, queue="q", name="train"), 0.0) == large, "sizes by powers of two"


def test_what_few_jobs_tell_is_mixed_with_what_all_do() -> None:
    history = seen(*[1e4] * 200, queue="r")
    before = history.expected_s(JOB, 0.0)
    history.add(Ran("q", "train", 1, 60.0))
    once = history.expected_s(JOB, 0.0)
    for _ in range(99):
        history.add(Ran("q", "train", 1, 60.0))
    often = history.expected_s(JOB, 0.0)
    assert often < 100 < once <= before


def test_a_quantile_is_told_only_once_some_have_ended() -> None:
    assert seen(*[100.0] * (FEW - 1)).left_s(JOB, 0.0, 0.5) is None
    assert seen(*[100.0] * FEW).left_s(JOB, 0.0, 0.5) is not None


runs = st.lists(st.floats(0, 5e6), min_size=FEW, max_size=80)


@given(runs, st.floats(0, 6e6))
def test_quantiles_are_monotone(found: list[float], ran: float) -> None:
    history = seen(*found)
    quantiles = [history.left_s(JOB, ran, part / 20) for part in range(1, 20)]
    assert all(one is not None and one >= 0 for one in quantiles)
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(one for one in quantiles if one is not None))


def test_quantiles_are_those_that_were_seen() -> None:
    draw = random.Random(1)
    found = [draw.lognormvariate(7, 1) for _ in range(3000)]
    history = seen(*found)
    for part in (0.25, 0.5, 0.9):
        left = history.left_s(JOB, 0.0, part)
        assert left == pytest.approx(sorted(found)[int(part * len(found))], rel=0.15)
    later = sorted(one - 2000 for one in found if one > 2000)
    assert history.left_s(JOB, 2000.0, 0.5) == pytest.approx(later[len(later) // 2], rel=0.15)


records = st.lists(
    st.builds(Ran, st.sampled_from("qr"), st.sampled_from(["train", "eval"]), st.integers(1, 9), st.floats(0, 5e6)),
    max_size=60,
)


@given(records)
def test_the_same_records_give_the_same_answers(found: list[Ran]) -> None:
    """Each as it was when it was given: what comes later changes no answer that was given before."""
    told = History()
    before = [answers(told)]
    for ran in found:
        version = told.version
        told.add(ran)
        before.append(answers(told))
        if told.version == version:
            assert before[-1][::4] == before[-2][::4], "only a new version ranks jobs otherwise"
    again = History()
    for ran, answer in zip(found, before, strict=False):
        assert answers(again) == answer
        again.add(ran)
    assert answers(again) == before[-1]
    assert again.version == told.version


def test_classes() -> None:
    for at, (start, following) in enumerate(pairwise(GRID)):
        assert class_of(start) == at == class_of((start + following) / 2)
        assert class_at(0.0, start) == at == class_at(0.0, (start + following) / 2)
    assert class_of(GRID[-1]) == class_at(0.0, 1e12) == len(GRID) - 1


@given(began=st.floats(-1e9, 2e9), at=st.integers(1, len(GRID) - 1))
def test_a_class_begins_at_the_very_moment_that_was_told(began: float, at: int) -> None:
    moment = began + GRID[at]
    assert class_at(began, moment) == at
    assert class_at(began, math.nextafter(moment, -math.inf)) == at - 1


def test_what_was_worked_out_from_answers_goes_with_them() -> None:
    history = seen(*[100.0] * 30)
    memo, _ = history.memo(JOB)
    memo["x"] = 1
    assert history.memo(JOB)[0] == {"x": 1}
    before = history.median_left_s(JOB, 0)
    for _ in range(100):
        history.add(Ran("q", "train", 1, 1e5))
    assert "x" not in history.memo(JOB)[0]
    assert history.median_left_s(JOB, 0) == history.left_s(JOB, 0.0, 0.5) != before


def test_what_changed_is_told_by_kind() -> None:
    history = History()
    a, b, other = ("q", "a", 0), ("q", "b", 0), ("r", "a", 0)
    history.add(Ran("q", "a", 1, 100.0))
    assert set(history.changed(0, [a, b, other])) == {a, b, other}  # the first of all is news to everybody
    for _ in range(30):
        history.add(Ran("q", "a", 1, 100.0))
        history.add(Ran("r", "b", 1, 100.0))
    # Of q's kind a there are 31, so that the table of the kind changes its mind at other times than its queue's.
    for _ in range(5):
        version, answer = history.version, {kind: told(history, kind) for kind in (a, b, other)}
        history.add(Ran("q", "b", 1, 3e4))
        changed = history.changed(version, [a, b, other])
        assert b in changed or told(history, b) == answer[b]
        assert a not in changed
        assert told(history, a) == answer[a]
        assert history.changed(history.version, [a, b, other]) == []


def told(history: History, kind: Kind) -> float:
    queue, name, _ = kind
    return history.expected_s(a_gang("j1", queue=queue, name=name), 0.0)


def test_all_kinds_are_told_when_quantiles_begin_to_be_answered() -> None:
    history, other = seen(*[100.0] * (FEW - 1)), ("r", "x", 0)
    version = history.version
    assert history.left_s(a_gang("j1", queue="r"), 0.0, 0.5) is None
    history.add(Ran("q", "train", 1, 100.0))
    assert history.left_s(a_gang("j1", queue="r"), 0.0, 0.5) is not None
    assert history.changed(version, [other]) == [other]


def test_who_asks_too_late_is_told_that_all_may_have_changed() -> None:
    history = History()
    for number in range(REMEMBERED + 1):
        history.add(Ran("q", f"name-{number}", 1, 100.0))
    assert history.changed(0, [("r", "x", 0)]) == [("r", "x", 0)]
    assert history.changed(history.version - 1, [("r", "x", 0)]) == []
