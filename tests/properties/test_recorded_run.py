"""The simulator and the real controller decide alike: a run is recorded, then simulated, and both are compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.control.rules import rules_of
from orchestrator.schedule.gang import Queue, Why
from orchestrator.settings import Settings
from orchestrator.simulate.conditions import Conditions
from orchestrator.simulate.engine import simulate
from orchestrator.simulate.workload import SimulatedJob, Workload
from orchestrator.store.store import Store
from tests.builders import a_node
from tests.recorded import Decision, Noting, Scene, carried_out

RULES: dict[str, bool | float] = {
    "first_level_s": 60.0, "starving_s": 3000.0, "patience_s": 10.0, "min_run_s": 100.0, "min_run_for_class_s": 20.0,
    "max_evictions": 3, "grow_after_s": 50.0,
}  # fmt: skip
NODES = (
    *(a_node(f"r{at}", gpus=4, rack="r") for at in range(3)),
    *(a_node(f"s{at}", gpus=4, rack="s") for at in range(2)),
    a_node("t0", gpus=8, rack="t"),
)
QUEUES = (
    Queue("research", weight=2.0, guaranteed=8),
    Queue("product", guaranteed=4, ceiling=16, lendable=False),
    Queue("students"),
)


def jobs(seed: int, count: int, within_s: float, grid_s: float = 0.5) -> tuple[SimulatedJob, ...]:
    """Jobs of all kinds. Times are multiples of `grid_s`: some things happen at one instant."""
    draw = random.Random(seed)

    def on_grid(seconds: float) -> float:
        return max(1, round(seconds / grid_s)) * grid_s

    found = []
    submits = sorted(on_grid(draw.uniform(0, within_s)) for _ in range(count))
    for submit, number in zip(submits, draw.sample(range(10 * count), count), strict=True):
        least = draw.choice([1, 1, 2, 2, 4])
        most = least * draw.choice([1, 1, 2, 4])
        found.append(
            SimulatedJob(
                job_id=f"j{number}",  # in no order
                submit_s=submit,
                duration_s=on_grid(draw.lognormvariate(5.3, 1.2)),
                num_gpus=draw.randint(least, most),
                tenant=draw.choice(QUEUES).name,
                priority=draw.choice([0, 0, 0, 0, 5]),
                min_gpus=least,
                max_gpus=most,
                name=draw.choice(["train", "evaluate"]),
            )
        )
    return tuple(found)


def a_scene(*args: Any, rules: dict[str, bool | float] = RULES, **conditions: Any) -> Scene:
    """A yard of 24 GPUs, of which 20 are to be had."""
    return Scene(NODES, jobs(*args), QUEUES, frozenset({"s1"}), rules, Conditions(tenants_as_queues=True, **conditions))


def recorded(scene: Scene, looks: Iterable[float] = ()) -> list[Decision]:
    store = Store("sqlite:///:memory:")
    store.prepare()
    try:
        return carried_out(scene, store, looks)
    finally:
        store.close()


def simulated(scene: Scene, **rules: Any) -> list[Decision]:
    """With other `rules`, where any are given."""
    policy = Noting()
    simulate(
        [node for node in scene.nodes if node.name not in scene.cordoned],
        Workload(tuple(scene.jobs), "a recorded run"),
        policy,
        scene.conditions,
        rules=replace(rules_of(Settings(rules=dict(scene.rules))), **rules),
        queues=scene.queues,
    )
    return policy.decisions


def difference(real: Sequence[Decision], virtual: Sequence[Decision]) -> str | None:
    """Where they part; None if they are the same, times but for rounding."""
    for at, (one, other) in enumerate(zip(real, virtual, strict=False)):
        if abs(one.at - other.at) > 1e-6 or replace(one, at=other.at) != other:
            return f"decision {at}: the controller {one}, the simulator {other}"
    return None if len(real) == len(virtual) else f"{len(real)} decisions, and {len(virtual)}"


BUSY = a_scene(2, 100, 4000.0, preemption_cost_s=5.0)


@pytest.fixture(scope="module")
def busy() -> list[Decision]:
    return recorded(BUSY)


def test_a_recorded_run_is_simulated_to_the_last_decision(busy: list[Decision]) -> None:
    counts = Counter(decision.why for decision in busy)
    assert {why: count for why, count in counts.items() if count < 5} == {}
    assert set(counts) == {None, Why.SHORTER, Why.HIGHER_CLASS, Why.QUOTA, Why.SHRINK, Why.GROW}
    assert difference(busy, simulated(BUSY)) is None


@pytest.mark.parametrize("change", [{"min_run_s": 101.0}, {"max_evictions": 2}, {"grow_after_s": 60.0}])
def test_other_rules_are_noticed(busy: list[Decision], change: dict[str, float]) -> None:
    assert difference(busy, simulated(BUSY, **change)) is not None


def test_a_recorded_run_whose_jobs_start_slowly_and_save() -> None:
    """And whose controller looks more often than it has to."""
    scene = a_scene(7, 25, 800.0, startup_s=3.25, checkpoint_s=97.3, preemption_cost_s=0.0)
    real = recorded(scene, looks=[37.7 * at for at in range(30)])
    assert {Why.GROW, Why.SHRINK} <= {decision.why for decision in real}
    assert difference(real, simulated(scene)) is None


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.001, 0.5, 20.0]),
    st.sampled_from([0.0, 5.5, 60.0]),
    st.sampled_from([0.0, 30.0]),
    st.fixed_dictionaries({"consolidate": st.booleans(), "preempt": st.booleans(), "resize": st.booleans()}),
)
def test_any_recorded_run(seed: int, grid_s: float, cost_s: float, startup_s: float, rules: dict[str, bool]) -> None:
    scene = a_scene(seed, 24, 800.0, grid_s, rules=RULES | rules, preemption_cost_s=cost_s, startup_s=startup_s)
    assert difference(recorded(scene), simulated(scene)) is None
