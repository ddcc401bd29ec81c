"""What an ended attempt means: its cause, and whether the job is started again. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

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


# One row a cause: is the job started again?
RETRIED: dict[Outcome, bool] = {
    Outcome.SUCCEEDED: False,
    Outcome.STOPPED: False,
    Outcome.USER_ERROR: False,
    Outcome.DATA_ERROR: False,
    Outcome.OUT_OF_MEMORY: False,  # the same plan would run out again; another one is no retry (memory.ladder)
    Outcome.CONTRACT_MISMATCH: False,
    Outcome.CRASHED: True,
    Outcome.KILLED: True,
    Outcome.NODE_LOST: True,
    Outcome.HUNG: True,
}

ELSEWHERE = frozenset({Outcome.KILLED, Outcome.HUNG})
"""Causes after which the job keeps away from the node of the rank that failed first, where other nodes will do. A node
that was lost is not there to be taken."""

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


def may_retry(outcome: Outcome, failures: int, max_restarts: int) -> bool:
    """Whether a job whose attempts failed `failures` times, the last one with `outcome`, is started again."""
    return RETRIED[outcome] and failures <= max_restarts


def back_off(failures: int, outcome: Outcome | None = None) -> float:
    """Seconds to wait after the `failures`-th failure, which was `outcome`; none before the first, and none after a
    node was lost once: the job goes on elsewhere, and waiting would not bring the node back."""
    failures -= outcome == Outcome.NODE_LOST
    return min(MAX_BACK_OFF_S, BACK_OFF_S * 2.0 ** min(failures - 1, 30)) if failures > 0 else 0.0
