"""Expected starts: the yard's own decisions, played forward."""

from __future__ import annotations

import math

from orchestrator.schedule.forecast import forecast
from orchestrator.schedule.gang import Held, Rules
from orchestrator.schedule.history import History, Ran
from orchestrator.schedule.place import place
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node

NOW = 1000.0


def busy(until: float | None = None, **keys: object) -> Yard:
    """One node of two slots, both held."""
    yard = Yard([a_node("n0", slots=2)], rules=Rules(preempt=False), **keys)  # type: ignore[arg-type]
    placement = place(yard.capacity, 2, "any")
    assert placement is not None
    yard.hold(Held(a_gang("j0", 2, oracle_s=until), placement, NOW - 100))
    return yard


def test_gangs_start_one_after_the_other_where_run_times_are_known() -> None:
    yard = busy(until=150.0)
    for number in (1, 2):
        yard.wait(a_gang(f"j{number}", 2, oracle_s=60.0, queued_at=NOW))
    etas = forecast(yard, NOW, ["j1", "j2"])
    assert [(eta.low, eta.expected, eta.high) for eta in etas.values()] == [(NOW + 50,) * 3, (NOW + 110,) * 3]
    assert set(yard.waiting) == {"j1", "j2"}, "nothing has happened"


def test_nobody_knows_where_nothing_has_ended() -> None:
    yard = busy()
    yard.wait(a_gang("j1", 1, queued_at=NOW))
    assert forecast(yard, NOW, ["j1"])["j1"].expected == math.inf


def test_history_gives_a_band() -> None:
    history = History()
    for seconds in range(100, 2100, 20):
        history.add(Ran("default", "", 2, float(seconds)))
    yard = busy(history=history)
    yard.wait(a_gang("j1", 1, queued_at=NOW))
    eta = forecast(yard, NOW, ["j1"])["j1"]
    assert NOW < eta.low < eta.expected < eta.high < NOW + 2100


def test_max_duration_bounds_what_nobody_knows() -> None:
    yard = Yard([a_node("n0", slots=2)], rules=Rules(preempt=False))
    placement = place(yard.capacity, 2, "any")
    assert placement is not None
    yard.hold(Held(a_gang("j0", 2, left_s=300.0), placement, NOW - 100))
    yard.wait(a_gang("j1", 1, queued_at=NOW))
    assert forecast(yard, NOW, ["j1"])["j1"].expected == NOW + 200
