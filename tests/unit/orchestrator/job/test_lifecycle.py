"""The tables of transitions."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.errors import IllegalTransitionError
from orchestrator.job.lifecycle import (
    ATTEMPT_TRANSITIONS,
    JOB_TRANSITIONS,
    AttemptState,
    JobState,
    check_attempt_transition,
    check_job_transition,
)


def test_tables_cover_every_state() -> None:
    assert set(JOB_TRANSITIONS) == set(JobState)
    assert set(ATTEMPT_TRANSITIONS) == set(AttemptState)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobState, JobState)))
def test_job_transitions_are_the_tables(old: JobState, new: JobState) -> None:
    if new in JOB_TRANSITIONS[old]:
        check_job_transition("j", old, new)
    else:
        with pytest.raises(IllegalTransitionError, match=f"from {old} to {new}"):
            check_job_transition("j", old, new)


def test_final_states_are_final() -> None:
    assert {state for state in JobState if state.final} == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert {state for state in AttemptState if state.final} == {AttemptState.ENDED}


def test_an_illegal_transition_tells_the_story_so_far() -> None:
    with pytest.raises(IllegalTransitionError, match=r"first this; then that"):
        check_attempt_transition("j", 3, AttemptState.ENDED, AttemptState.RUNNING, lambda: ["first this", "then that"])


def test_every_live_state_can_reach_an_end() -> None:
    for table in (JOB_TRANSITIONS, ATTEMPT_TRANSITIONS):
        for state in table:
            seen, front = {state}, [state]
            while front:
                for following in table[front.pop()]:  # type: ignore[index]
                    if following not in seen:
                        seen.add(following)
                        front.append(following)
            assert any(not table[one] for one in seen)  # type: ignore[index]
