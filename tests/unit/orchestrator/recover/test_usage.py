"""Sums over jobs, slots that nobody held, prices and energy."""

from __future__ import annotations

import math

import pytest

from orchestrator.cluster.status import Energy, Slots
from orchestrator.recover.classify import Outcome
from orchestrator.recover.ledger import Category, Stint, Story, account
from orchestrator.recover.usage import Part, bins_of, energy_of, offered, parts_of, use_of, within
from tests.unit.orchestrator.recover.test_ledger import AGAIN, crashed, spent

STOPPED = Stint(
    1, 2, 10.0, 50.0, Outcome.STOPPED, planned=True, spent=spent(12.0, "done", 20, load=8, step=30)
)  # without a commit


def parts(*stints: Stint, until: float = 150.0, **kinds: int) -> list[Part]:
    return parts_of(account(Story(0.0, until, stints), until), {one.number: kinds or {"cpu": 2} for one in stints})


def test_losses_are_told_apart_by_what_lost_them() -> None:
    failed, stopped = use_of(parts(crashed(), AGAIN)), use_of(parts(STOPPED))
    assert (failed.lost_to_failures_slot_s, failed.lost_to_preemption_slot_s) == (80, 0)
    assert failed.lost_to_startup_slot_s == 2 * (10 + 5)
    assert (stopped.lost_to_failures_slot_s, stopped.lost_to_preemption_slot_s) == (0, 60)
    assert stopped.lost_slot_s == 60 + stopped.lost_to_startup_slot_s == 80
    assert failed.useful == pytest.approx(144 / math.fsum(failed.slot_seconds.values()))


def test_slots_of_each_kind_and_what_they_cost() -> None:
    use = use_of(parts(STOPPED, H100=1, cpu=1))
    assert use.kind_seconds == {"H100": 40, "cpu": 40}
    assert use.cost({"h100": 36.0, "cpu": 0.0}) == pytest.approx(0.4)
    assert use.cost({"H100": 36.0}) is None  # what cpu costs is not configured
    assert use.cost({}) is None
    assert use_of([]).cost({"cpu": 1.0}) == 0
    assert use_of([]).useful is None


def test_of_a_time_there_is_what_lies_in_it() -> None:
    use = use_of(within(parts(crashed(), AGAIN), 60.0, 80.0))
    told = {category: seconds for category, seconds in use.seconds.items() if seconds}
    assert told == {Category.RECOVERING: 15, Category.TRAINING: 5}
    assert use.kind_seconds == {"cpu": 2 * 2 + 2 * 10}


def test_slots_that_were_there() -> None:
    four, eight = {"a": Slots(name="a", kind="cpu", slots=4)}, {"b": Slots(name="b", kind="H100", slots=8)}
    assert offered([], 0.0, 10.0) == (None, {})
    assert offered([(20.0, four)], 0.0, 10.0) == (None, {})
    assert offered([(4.0, four)], 0.0, 10.0) == (4.0, {"cpu": 24})
    changes = [(-5.0, four), (2.0, four | eight), (5.0, {})]
    assert offered(changes, 0.0, 10.0) == (0.0, {"H100": 24, "cpu": 20})


def test_bins_hold_what_was_held() -> None:
    several = parts(crashed(), AGAIN)
    bins = bins_of(several, 0.0, 150.0, 7)
    sums = use_of(several).slot_seconds
    for category in Category:
        assert math.fsum(one.get(category, 0.0) for one in bins) == pytest.approx(sums[category])
    assert bins_of(several, 150.0, 160.0, 3) == [{}, {}, {}]
    assert bins_of([], 0.0, 1.0, 1) == [{}]


def test_energy_is_told_where_every_node_has_told_it() -> None:
    told = [Energy(gpu_j=1.0, cpu_j=2.0), Energy(gpu_j=3.0, cpu_j=4.0)]
    assert energy_of(told, whole=True) == Energy(gpu_j=4.0, cpu_j=6.0)
    assert energy_of(told, whole=False) == Energy(gpu_j=4.0)  # others may have used the processors, too
    assert energy_of([told[0], None], whole=True) == Energy()
    assert energy_of([told[0], Energy(cpu_j=1.0)], whole=True) == Energy(cpu_j=3.0)
    assert energy_of(None, whole=True) == energy_of([], whole=True) == Energy()


def test_what_tells_nothing_is_neither_useful_nor_useless() -> None:
    command = Stint(1, 2, 10.0, 150.0, Outcome.SUCCEEDED, begun_at=10.0)
    training = parts(crashed(), AGAIN)
    assert use_of(parts(command)).useful is None
    assert use_of([*parts(command), *training]).useful == pytest.approx(use_of(training).useful)
