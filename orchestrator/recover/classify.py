"""What an ended attempt means: its cause, and whether the job is started again. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from launch.contract import ExitCode, RankExit

BACK_OFF_S = 2.0  # doubles with every restart
MAX_BACK_OFF_S = 300.0


class Outcome(enum.StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    USER_ERROR = "user-error"
    DATA_ERROR = "data-error"
    OUT_OF_MEMORY = "out-of-memory"
    CONTRACT_MISMATCH = "contract-mismatch"
    CRASHED = "crashed"
    KILLED = "killed"
    NODE_LOST = "node-lost"
    HUNG = "hung"


@dataclass(frozen=True)
class Treatment:
    """What follows from a cause."""

    again: bool
    """Whether the job is started again, while it has restarts left."""
    elsewhere: bool = False
    """Whether it then keeps away from the node of the rank that failed first, where other nodes will do."""
    suspect: bool = False
    """Whether that node comes under suspicion."""
    at_once: bool = False
    """Whether its first restart waits for nothing. What nobody knows the reason of may need a moment to pass."""


NEVER = Treatment(again=False)
RETRY = Treatment(again=True)
ELSEWHERE = Treatment(again=True, elsewhere=True, suspect=True, at_once=True)

# One row a cause.
TREATMENTS: dict[Outcome, Treatment] = {
    Outcome.SUCCEEDED: NEVER,
    Outcome.STOPPED: NEVER,
    Outcome.USER_ERROR: NEVER,
    Outcome.DATA_ERROR: NEVER,
    Outcome.OUT_OF_MEMORY: NEVER,  # the same plan would run out again; another one is no retry (memory.ladder)
    Outcome.CONTRACT_MISMATCH: NEVER,
    Outcome.CRASHED: RETRY,
    Outcome.KILLED: ELSEWHERE,
    Outcome.NODE_LOST: Treatment(again=True, elsewhere=True, at_once=True),  # it may not be known yet to be gone
    Outcome.HUNG: ELSEWHERE,
}

RULED = frozenset(
    {Outcome.CRASHED, Outcome.KILLED, Outcome.HUNG, Outcome.USER_ERROR, Outcome.DATA_ERROR, Outcome.NODE_LOST}
)
"""Causes for which a job's own rules may say otherwise."""
THEN = {"fail": NEVER, "retry": RETRY, "elsewhere": ELSEWHERE}
"""What a rule may say."""


class Rule(Protocol):
    """A job's own word on how a failure is taken: one of the first two is set."""

    @property
    def exit_code(self) -> int | None: ...
    @property
    def log(self) -> str | None: ...
    @property
    def then(self) -> Literal["fail", "retry", "elsewhere"]: ...


def treatment_of(verdict: Verdict, rules: Sequence[Rule]) -> Treatment:
    """The first of a job's rules that holds for the failure, else the table's row."""
    first = verdict.first
    if verdict.outcome in RULED and first is not None:
        status = first.status if first.status is not None else int(first.code)
        for rule in rules:
            if rule.exit_code == status or (rule.log is not None and rule.log in first.found):
                return THEN[rule.then]
    return TREATMENTS[verdict.outcome]


OUTCOMES: dict[ExitCode, Outcome] = {
    ExitCode.DONE: Outcome.SUCCEEDED,
    ExitCode.CRASH: Outcome.CRASHED,
    ExitCode.STOPPED: Outcome.STOPPED,
    ExitCode.OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    ExitCode.DATA_ERROR: Outcome.DATA_ERROR,
    ExitCode.USER_ERROR: Outcome.USER_ERROR,
    ExitCode.CONTRACT_MISMATCH: Outcome.CONTRACT_MISMATCH,
    ExitCode.LEASH_EXPIRED: Outcome.NODE_LOST,
    ExitCode.KILLED: Outcome.KILLED,
}


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    first: RankExit | None
    """The rank whose failure is the cause; the others' are its echo."""


def judge(exits: Sequence[RankExit], world_size: int) -> Verdict:
    """The outcome of an attempt of which these ranks have told how they ended.

    All done is success. Any failure is the earliest one's, but one that only says that a peer is gone, or that the
    agent ended the rest of a failing gang, is an echo, however early it was written down: a killed rank's end is
    noticed after its peers have lost their connections to it. Echoes beside a rank that stopped are of that one's end.
    A rank of which nothing was heard was lost with its node.
    """
    failures = sorted(
        (one for one in exits if one.code not in (ExitCode.DONE, ExitCode.STOPPED)),
        key=lambda one: (_is_echo(one), one.time),
    )
    stopped = any(one.code == ExitCode.STOPPED for one in exits)
    if failures and stopped and len(exits) == world_size and _is_echo(failures[0]):
        return Verdict(Outcome.STOPPED, None)
    if failures and (len(exits) == world_size or not _is_echo(failures[0])):
        return Verdict(OUTCOMES[failures[0].code], failures[0])
    if len(exits) < world_size:
        return Verdict(Outcome.NODE_LOST, None)
    if stopped:
        return Verdict(Outcome.STOPPED, None)
    return Verdict(Outcome.SUCCEEDED, None)


def _is_echo(end: RankExit) -> bool:
    return end.error is not None and end.error.echo


def restarts_left(outcome: Outcome, failed_by: Mapping[str, int], most: int, most_of: Mapping[Any, int]) -> int:
    """How often a job may be started again, whose attempts failed so often by each cause, the last one by `outcome`;
    below 0 where it may not any more. Causes that `most_of` names have a budget of their own, the others share `most`.
    """
    if outcome in most_of:
        return most_of[outcome] - failed_by.get(outcome, 0)
    return most - sum(count for cause, count in failed_by.items() if cause not in most_of)


def back_off(failures: int, treatment: Treatment = RETRY) -> float:
    """Seconds to wait after the `failures`-th failure; none before the first."""
    waits = failures - treatment.at_once
    return min(MAX_BACK_OFF_S, BACK_OFF_S * 2.0 ** min(waits - 1, 30)) if waits > 0 else 0.0
