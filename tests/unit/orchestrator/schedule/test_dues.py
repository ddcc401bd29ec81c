"""When jobs are to be looked at again."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule.dues import SPARE, Dues

NAMES = st.sampled_from(["j1", "j2", "j3"])
TIMES = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf])


@given(st.lists(st.tuples(st.sampled_from(["set", "drop", "pop"]), NAMES, TIMES)))
def test_the_last_word_counts(doings: list[tuple[str, str, float]]) -> None:
    dues, known = Dues(), dict[str, float]()
    for what, name, at in doings:
        if what == "set":
            dues.set(name, at)
            known[name] = at
        elif what == "drop":
            dues.drop(name)
            known.pop(name, None)
        elif math.isfinite(at):
            due = {one for one, when in known.items() if when <= at}
            assert set(dues.pop(at)) == due
            known = {one: when for one, when in known.items() if one not in due}
        assert dues.next_at() == min(known.values(), default=math.inf)
        assert len(dues) == sum(map(math.isfinite, known.values()))


def test_they_come_in_order_and_may_be_set_again_meanwhile() -> None:
    dues = Dues()
    for name, at in (("j3", 3.0), ("j1", 1.0), ("j2", 2.0)):
        dues.set(name, at)
    seen = []
    for name in dues.pop(2.5):
        seen.append(name)
        dues.set(name, 9.0)
    assert seen == ["j1", "j2"]
    assert dues.next_at() == 3.0


def test_what_was_said_before_is_not_kept_for_ever() -> None:
    dues = Dues()
    for step in range(10_000):
        dues.set("j1", 1.0 + step)
    assert len(dues._heap) <= 2 + SPARE
    assert list(dues.pop(1e9)) == ["j1"]
