"""What an ended attempt means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.attempt import ExitCode
from orchestrator.recover.classify import (
    BACK_OFF_S,
    MAX_BACK_OFF_S,
    OUTCOMES,
    THEN,
    TREATMENTS,
    Outcome,
    back_off,
    judge,
    restarts_left,
    treatment_of,
)
from tests.builders import an_exit

FAILURES = [code for code in ExitCode if code not in (ExitCode.DONE, ExitCode.STOPPED)]


def test_the_tables_know_every_end() -> None:
    assert set(OUTCOMES) == set(ExitCode)
    assert set(TREATMENTS) == set(Outcome)


def test_all_done_is_success() -> None:
    assert judge([an_exit(0), an_exit(1)], 2).outcome == Outcome.SUCCEEDED


def test_one_stopped_is_a_stop() -> None:
    assert judge([an_exit(0), an_exit(1, ExitCode.STOPPED)], 2).outcome == Outcome.STOPPED


@pytest.mark.parametrize("code", FAILURES)
def test_the_earliest_failure_is_the_cause(code: ExitCode) -> None:
    verdict = judge([an_exit(0, ExitCode.KILLED, time=5), an_exit(1, code, time=4), an_exit(2, time=1)], 3)
    assert (verdict.outcome, verdict.first and verdict.first.rank) == (OUTCOMES[code], 1)


@pytest.mark.parametrize("code", [ExitCode.OUT_OF_MEMORY, ExitCode.KILLED])
def test_an_echo_is_not_the_cause_however_early_it_was_written(code: ExitCode) -> None:
    """A killed rank's end is noticed by its agent, maybe of another node with another clock, after its peers fail."""
    peers = [an_exit(0, ExitCode.CRASH, 1.0, "closed by peer", echo=True), an_exit(2, ExitCode.KILLED, 9.0, echo=True)]
    verdict = judge([*peers, an_exit(1, code, 5.0, "the kernel killed it")], 3)
    assert (verdict.outcome, verdict.first and verdict.first.rank) == (OUTCOMES[code], 1)


def test_where_all_are_echoes_the_one_that_said_nothing_was_lost() -> None:
    peers = [an_exit(0, ExitCode.CRASH, 2.0, "closed by peer", echo=True), an_exit(1, ExitCode.CRASH, 1.0, echo=True)]
    assert judge(peers, 3).outcome == Outcome.NODE_LOST
    verdict = judge(peers, 2)
    assert (verdict.outcome, verdict.first and verdict.first.rank) == (Outcome.CRASHED, 1)


def test_echoes_of_a_rank_that_stopped_are_no_failure() -> None:
    ends = [an_exit(0, ExitCode.STOPPED), an_exit(1, ExitCode.CRASH, 2.0, "closed by peer", echo=True)]
    assert judge(ends, 2).outcome == Outcome.STOPPED
    assert judge([*ends, an_exit(2, ExitCode.CRASH)], 3).outcome == Outcome.CRASHED
    assert judge(ends, 3).outcome == Outcome.NODE_LOST


@given(st.lists(st.sampled_from(ExitCode), max_size=8), st.integers(1, 8))
def test_a_success_needs_every_rank(codes: list[ExitCode], world_size: int) -> None:
    exits = [an_exit(rank, code, time=rank) for rank, code in enumerate(codes[:world_size])]
    verdict = judge(exits, world_size)
    all_done = len(exits) == world_size and all(end.code == ExitCode.DONE for end in exits)
    assert (verdict.outcome == Outcome.SUCCEEDED) == all_done
    assert (verdict.first is not None) == any(end.code in FAILURES for end in exits)
    if verdict.first is None and len(exits) < world_size:
        assert verdict.outcome == Outcome.NODE_LOST


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_what_was_nobodys_fault_is_tried_again(outcome: Outcome) -> None:
    again = outcome in (Outcome.CRASHED, Outcome.KILLED, Outcome.NODE_LOST, Outcome.HUNG)
    assert TREATMENTS[outcome].again is again


def test_causes_share_the_budget_but_for_those_that_have_their_own() -> None:
    failed_by = {"crashed": 2, "killed": 1, "node-lost": 4}
    assert restarts_left(Outcome.CRASHED, failed_by, 3, {}) == -4
    assert restarts_left(Outcome.CRASHED, failed_by, 3, {"node-lost": 5}) == 0
    assert restarts_left(Outcome.NODE_LOST, failed_by, 0, {"node-lost": 5}) == 1
    assert restarts_left(Outcome.HUNG, failed_by, 9, {"hung": 0}) == 0


@dataclass(frozen=True)
class ARule:
    then: Literal["fail", "retry", "elsewhere"]
    exit_code: int | None = None
    log: str | None = None


def test_the_first_rule_of_a_job_that_holds_goes_before_the_table() -> None:
    rules = [ARule("retry", log="ECC"), ARule("fail", exit_code=1), ARule("elsewhere", exit_code=75)]

    def treated(code: ExitCode, **told: Any) -> Any:
        end = an_exit(0, code).model_copy(update=told)
        return treatment_of(judge([end], 1), rules)

    assert treated(ExitCode.CRASH) is THEN["fail"]
    assert treated(ExitCode.CRASH, status=75) is THEN["elsewhere"]
    assert treated(ExitCode.CRASH, found=("ECC",)) is THEN["retry"]
    assert treated(ExitCode.CRASH, status=3) is TREATMENTS[Outcome.CRASHED]
    assert treated(ExitCode.USER_ERROR, found=("ECC",)) is THEN["retry"]
    assert treated(ExitCode.OUT_OF_MEMORY, found=("ECC",)) is TREATMENTS[Outcome.OUT_OF_MEMORY], "the ladder's"


@given(st.integers(1, 100_000))
def test_waiting_grows_and_is_bounded(failures: int) -> None:
    assert BACK_OFF_S <= back_off(failures) <= back_off(failures + 1) <= MAX_BACK_OFF_S
    assert (back_off(0), back_off(1), back_off(2), back_off(100_000)) == (0.0, 2.0, 4.0, 300.0)
    at_once = TREATMENTS[Outcome.NODE_LOST]
    assert [back_off(failures, at_once) for failures in range(4)] == [0.0, 0.0, 2.0, 4.0]
