"""Where a job's time went, for attempts that end in each way."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.pulse import PHASES
from orchestrator.cluster.status import Spent
from orchestrator.job.lifecycle import JobState
from orchestrator.recover.classify import Outcome
from orchestrator.recover.ledger import (
    OF_PHASE,
    Account,
    Category,
    Mark,
    Span,
    Stint,
    Story,
    account,
    kept_step,
    mark_at,
)


def spent(began: float, phase: str = "done", at: int = 0, from_step: int | None = 0, **seconds: float) -> Spent:
    """`first_step` is written for `first-step`."""
    failed_at = seconds.pop("failed_at", None)
    named = {name.replace("_", "-"): value for name, value in seconds.items()}
    return Spent(began_at=began, seconds=named, phase=phase, step=at, from_step=from_step, failed_at=failed_at)


def mark(at: int, **seconds: float) -> Mark:
    return Mark(at, {name.replace("_", "-"): value for name, value in seconds.items()})


def told(found: Account) -> dict[str, float]:
    """Categories that have seconds."""
    assert math.isclose(math.fsum(found.seconds.values()), found.wall_s, abs_tol=1e-6)
    return {category.value: round(seconds, 6) for category, seconds in found.seconds.items() if seconds}


GOOD = Stint(
    1, 2, 10.0, 100.0, Outcome.SUCCEEDED,
    spent=spent(12.0, "done", 50, start=1, load=7, first_step=2, step=58, evaluate=6, save=2, export=10),
)  # fmt: skip


def test_a_job_that_succeeds_at_once() -> None:
    found = account(Story(0.0, 100.0, [GOOD]), 500.0)
    assert told(found) == {
        "queued": 10, "starting": 10, "training": 60, "evaluating": 6, "saving": 2, "exporting": 10, "stopping": 2,
    }  # fmt: skip
    assert found.goodput == pytest.approx(60 / 90)
    assert found.useful == pytest.approx(120 / 180)
    assert math.isclose(math.fsum(found.slot_seconds.values()), 180)
    assert [span.seconds for span in found.spans if span.startup] == [{Category.STARTING: 10}]


def crashed(**changes: Any) -> Stint:
    """Trains for 40 s from 20 on, then fails in the middle of a step; the yard notices 2 s later."""
    told = spent(12.0, "step", 31, start=1, load=7, first_step=2, step=36, failed_at=60.0, **changes.pop("more", {}))
    return Stint(1, 2, 10.0, 62.0, Outcome.KILLED, spent=told, **changes)


AGAIN = Stint(
    2, 2, 70.0, 150.0, Outcome.SUCCEEDED,
    spent=spent(71.0, "done", 50, start=1, load=3, first_step=2, step=70, export=3),
)  # fmt: skip


def test_a_crash_before_any_commit_loses_all_work() -> None:
    found = account(Story(0.0, 150.0, [crashed(), AGAIN]), 150.0)
    assert told(found) == {
        "queued": 10, "starting": 10, "lost": 40, "recovering": 2 + 8 + 5, "training": 72, "exporting": 3,
    }  # fmt: skip
    startup = [(span.stint, span.seconds) for span in found.spans if span.startup]
    assert startup == [(1, {Category.STARTING: 10}), (2, {Category.RECOVERING: 5})]
    assert found.broken == {1}


def test_a_crash_after_a_commit_loses_what_came_after_the_copy() -> None:
    commits = [mark(10, start=1, load=7, first_step=2, step=8), mark(20, start=1, load=7, first_step=2, step=18)]
    again = Stint(2, 2, 70.0, 150.0, Outcome.SUCCEEDED, spent=AGAIN.spent.model_copy(update={"from_step": 20}))
    found = account(Story(0.0, 150.0, [crashed(commits=commits), again]), 150.0)
    assert told(found) == {
        "queued": 10, "starting": 10, "training": 20 + 72, "lost": 20, "recovering": 15, "exporting": 3,
    }  # fmt: skip


def test_a_checkpoint_that_was_damaged_loses_the_work_up_to_the_one_before() -> None:
    commits = [mark(10, start=1, load=7, first_step=2, step=8), mark(20, start=1, load=7, first_step=2, step=18)]
    again = Stint(2, 2, 70.0, None, spent=AGAIN.spent.model_copy(update={"from_step": 10, "phase": "step"}))
    found = account(Story(0.0, None, [crashed(commits=commits), again]), 150.0)
    assert told(found)["lost"] == 30


def test_what_failed_for_good_is_lost_and_nothing_recovers() -> None:
    found = account(Story(0.0, 62.0, [crashed()]), 500.0)
    assert told(found) == {"queued": 10, "starting": 10, "lost": 40, "stopping": 2}
    assert found.goodput == 0.0


def test_until_the_next_attempt_trains_the_job_recovers() -> None:
    failing = Stint(2, 2, 70.0, 80.0, Outcome.CRASHED, spent=spent(71.0, "load", from_step=None, start=1, failed_at=79))
    third = Stint(3, 2, 90.0, None, spent=spent(91.0, "step", 31, from_step=0, start=1, load=3, first_step=5))
    found = account(Story(0.0, None, [crashed(), failing, third]), 105.0)
    assert told(found) == {
        "queued": 10, "starting": 10, "lost": 40, "recovering": 2 + 8 + 10 + 10 + 5, "training": 10,
    }  # fmt: skip


def test_a_planned_stop_saves_and_the_job_waits_its_turn() -> None:
    stopped = Stint(
        1, 2, 10.0, 50.0, Outcome.STOPPED, planned=True, commits=[mark(20, start=1, load=7, step=20)],
        spent=spent(12.0, "done", 20, start=1, load=7, step=20, save=4),
    )  # fmt: skip
    again = Stint(2, 4, 80.0, None, spent=spent(80.0, "step", 25, from_step=20, load=10, step=5))
    moves = [(50.0, JobState.QUEUED)]
    found = account(Story(0.0, None, [stopped, again], moves), 100.0)
    assert told(found) == {
        "queued": 40, "starting": 10 + 10, "training": 20 + 10, "saving": 4, "stopping": 6,
    }  # fmt: skip
    assert found.slot_seconds[Category.TRAINING] == pytest.approx(2 * 20 + 4 * 10)


def test_a_pause_is_no_wait_in_the_queue() -> None:
    stopped = Stint(1, 2, 10.0, 50.0, Outcome.STOPPED, planned=True, spent=spent(12.0, "done", 20, load=8, step=30))
    again = Stint(2, 2, 90.0, None, spent=spent(90.0, "load", from_step=None))
    moves = [(50.0, JobState.PAUSED), (80.0, JobState.QUEUED)]
    found = account(Story(0.0, None, [stopped, again], moves), 95.0)
    assert told(found) == {"queued": 20, "starting": 15, "lost": 30, "paused": 30}  # nobody has heard of a commit


def test_a_pause_of_what_never_started() -> None:
    moves = [(5.0, JobState.PAUSED), (20.0, JobState.QUEUED), (21.0, JobState.PAUSED)]
    found = account(Story(0.0, None, [], moves), 30.0)
    assert told(found) == {"queued": 6, "paused": 24}
    assert (found.goodput, found.useful) == (None, None)


def test_a_job_that_was_cancelled_in_the_queue() -> None:
    assert told(account(Story(3.0, 9.0), 50.0)) == {"queued": 6}


def test_a_job_that_still_runs_is_doing_what_it_was_last_heard_to_do() -> None:
    running = Stint(1, 2, 10.0, spent=spent(12.0, "evaluate", 20, start=1, load=7, step=10, evaluate=1))
    found = account(Story(0.0, None, [running]), 40.0)
    assert told(found) == {"queued": 10, "starting": 10, "training": 10, "evaluating": 10}


def test_an_attempt_that_ended_before_its_ranks_began() -> None:
    found = account(Story(0.0, 30.0, [Stint(1, 2, 10.0, 30.0, Outcome.USER_ERROR)]), 30.0)
    assert told(found) == {"queued": 10, "starting": 20}


def test_a_command_tells_nothing_of_what_it_does() -> None:
    found = account(Story(0.0, 30.0, [Stint(1, 2, 10.0, 30.0, Outcome.SUCCEEDED, begun_at=12.0)]), 30.0)
    assert told(found) == {"queued": 10, "starting": 2, "running": 18}
    assert (found.goodput, found.useful) == (None, None)


def test_a_node_that_was_lost_is_waited_for() -> None:
    lost = Stint(1, 2, 10.0, 62.0, Outcome.NODE_LOST, spent=spent(12.0, "step", 9, load=8, step=20))
    found = account(Story(0.0, None, [lost]), 80.0)
    assert told(found) == {"queued": 10, "starting": 10, "lost": 20, "recovering": 22 + 18}


def test_killed_by_a_planned_stop_that_took_too_long_is_no_failure() -> None:
    late = Stint(1, 2, 10.0, 62.0, Outcome.KILLED, planned=True, spent=spent(12.0, "save", 9, load=8, step=20))
    found = account(Story(0.0, None, [late]), 80.0)
    assert told(found) == {"queued": 10 + 18, "starting": 10, "lost": 20, "stopping": 22}


def test_between_two_marks_time_is_shared_by_steps() -> None:
    marks = [mark(0, load=4), mark(10, load=4, step=20), mark(20, load=4, step=30, save=4)]
    assert mark_at(15, marks).seconds == {"load": 4, "step": 25, "save": 2}
    assert mark_at(10, marks) == marks[1]
    assert mark_at(99, marks) == marks[2]
    assert mark_at(-1, marks) == marks[0]


def test_the_step_from_which_the_next_attempt_goes_on_has_the_last_word() -> None:
    stint = crashed(commits=[mark(20, step=1)])
    assert kept_step(stint, []) == 20
    assert kept_step(stint, [AGAIN]) == 0
    assert kept_step(stint, [Stint(2, 2, 70.0)]) == 20
    assert kept_step(GOOD, []) is None


def test_a_part_of_a_span_has_its_share() -> None:
    span = Span(10.0, 20.0, {Category.TRAINING: 8.0, Category.SAVING: 2.0}, 1, 4)
    part = span.within(15.0, 100.0)
    assert part == Span(15.0, 20.0, {Category.TRAINING: 4.0, Category.SAVING: 1.0}, 1, 4)
    assert span.within(0.0, 10.0) is None


def test_every_phase_of_a_pulse_has_a_category() -> None:
    assert set(OF_PHASE) == set(PHASES)


times = st.floats(0, 1e4, allow_nan=False).map(lambda at: 1.7e9 + at)
phases = st.sampled_from([*PHASES, "unheard-of"])
lengths = st.floats(0, 1e4, allow_nan=False)


@st.composite
def stints(draw: st.DrawFn, number: int) -> Stint:
    """Any attempt, with clocks that disagree."""
    ended = draw(st.none() | times)
    seconds = st.dictionaries(phases, lengths)
    books = st.builds(
        Spent, began_at=times, seconds=seconds, phase=phases, step=st.integers(0, 50),
        from_step=st.none() | st.integers(0, 50), failed_at=st.none() | times,
    )  # fmt: skip
    return Stint(
        number=number,
        processes=draw(st.integers(1, 8)),
        created_at=draw(times),
        ended_at=ended,
        outcome=None if ended is None else draw(st.sampled_from(Outcome)),
        planned=draw(st.booleans()),
        spent=draw(st.none() | books),
        commits=draw(st.lists(st.builds(Mark, st.integers(0, 50), seconds), max_size=3)),
        begun_at=draw(st.none() | times),
    )


@st.composite
def stories(draw: st.DrawFn) -> Story:
    moves = st.tuples(times, st.sampled_from([JobState.QUEUED, JobState.PAUSED]))
    return Story(
        submitted_at=draw(times),
        ended_at=draw(st.none() | times),
        stints=[draw(stints(number)) for number in range(1, 1 + draw(st.integers(0, 4)))],
        moves=sorted(draw(st.lists(moves, max_size=5))),
    )


@given(stories(), times, times, times)
def test_seconds_are_never_negative_and_add_up_to_the_wall_time(
    job: Story, now: float, since: float, until: float
) -> None:
    found = account(job, now)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert math.isclose(math.fsum(found.seconds.values()), found.wall_s, abs_tol=1e-6)
    at = found.since
    for span in found.spans:
        assert span.since == at < span.until
        assert math.isclose(math.fsum(span.seconds.values()), span.until - span.since, abs_tol=1e-6)
        at = span.until
    assert at == found.until
    held = sum((span.until - span.since) * span.processes for span in found.spans)
    assert math.isclose(math.fsum(found.slot_seconds.values()), held, abs_tol=1e-6 * 8)
    parts = [part for span in found.spans if (part := span.within(since, until))]
    seen = max(0.0, min(until, found.until) - max(since, found.since))
    assert math.isclose(math.fsum(second for part in parts for second in part.seconds.values()), seen, abs_tol=1e-6)
