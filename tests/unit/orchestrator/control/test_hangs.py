"""A gang of which a rank does not move: who it is, and what becomes of the job."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster.status import Stall
from orchestrator.control.hangs import cause


def stalled(rank: int, **changes: Any) -> Stall:
    fields = {
        "time": 1.0, "phase": "step", "part": "backward", "step": 7, "count": 40, "seconds": 130.0, "limit_s": 120.0,
        "stopped": False, "overdue": True,
    }  # fmt: skip
    return Stall(rank=rank, **{**fields, **changes})


@pytest.mark.parametrize(
    ("stalls", "rank"),
    [
        ([], None),
        ([stalled(0, overdue=False), stalled(1, overdue=False)], None),
        ([stalled(0), stalled(1)], 0),
        ([stalled(0, seconds=125.0), stalled(1, seconds=126.0)], 1),
        ([stalled(0), stalled(1, count=39), stalled(2)], 1),
        ([stalled(0), stalled(1, count=39, overdue=False)], 1),
        ([stalled(0, count=38), stalled(1, stopped=True, seconds=25.0, overdue=False)], 1),
    ],
)
def test_who_keeps_the_others_waiting(stalls: list[Stall], rank: int | None) -> None:
    found = cause(stalls)
    assert (found.rank if found is not None else None) == rank
