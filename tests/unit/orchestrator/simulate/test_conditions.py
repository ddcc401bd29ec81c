"""What a simulation is told: nodes, queues, and the policy's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.document import read_document
from orchestrator.cluster.spec import load_cluster
from orchestrator.errors import SpecError
from orchestrator.schedule.gang import Queue, Rules
from orchestrator.simulate.conditions import (
    Conditions,
    accelerator_of,
    alike_nodes,
    nodes_of,
    read_queues,
    with_overrides,
)

CLUSTERS = Path(__file__).parents[4] / "configs" / "clusters"


def test_nodes_of_a_cluster_file() -> None:
    nodes = nodes_of(load_cluster(read_document(CLUSTERS / "a100-40.yaml")))
    assert [(len(node.gpus), node.cpu_slots) for node in nodes] == [(8, 0)] * 2 + [(0, 4)] * 4
    assert len({node.id for node in nodes}) == 6
    assert nodes[0].gpus[0].type == "A100-40GB"
    assert accelerator_of(nodes) == "gpu"
    assert accelerator_of(nodes_of(load_cluster(read_document(CLUSTERS / "laptop.yaml")))) == "any"
    assert [node.name for node in alike_nodes(2, 8)] == ["n00000", "n00001"]


def test_queues_by_tenant_even_if_it_looks_like_a_number(tmp_path: Path) -> None:
    path = tmp_path / "queues.yaml"
    path.write_text("queues:\n  6214e9: {weight: 2.0, guaranteed: 64}\n  ed69ec: {ceiling: 8, lendable: false}\n")
    assert read_queues(path) == (
        Queue("6214e9", 2.0, 64), Queue("ed69ec", 1.0, None, 8, lendable=False),
    )  # fmt: skip
    path.write_text("queues:\n  x: {wieght: 2.0}\n")
    with pytest.raises(SpecError) as refusal:
        read_queues(path)
    assert refusal.value.line == 2
    assert "weight" in (refusal.value.hint or "")


def test_rules_are_set_by_name() -> None:
    rules = with_overrides(Rules(), ["rules.min_run_s=600", "rules.preempt=false", "rules.levels=3"])
    assert (rules.min_run_s, rules.preempt, rules.levels) == (600.0, False, 3)
    assert isinstance(rules.min_run_s, float)
    assert with_overrides(Rules(), []) == Rules()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules.min_run=600", "did you mean rules.min_run_s?"),
        ("rules.zzz=600", "the fields are"),
        ("min_run_s=600", "only `rules.FIELD`"),
        ("rules=3", "only `rules.FIELD`"),
        ("rules.a.b=3", "the rules have no a"),
        ("rules.preempt=3", "true or false"),
        ("rules.levels=2.5", "a whole number"),
        ("rules.levels=true", "a number"),
        ("rules.min_run_s=soon", "a number"),
        ("rules.min_run_s", "not of the form"),
    ],
)
def test_what_cannot_be_set_is_told(override: str, message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        with_overrides(Rules(), [override])
    assert refusal.value.code == "bad-override"
    assert message in str(refusal.value)


def test_speed_of_an_elastic_job() -> None:
    assert Conditions(speedup=1).speed(8, 4) == 2
    assert Conditions(speedup=0.5).speed(1, 4) == 0.5
    assert Conditions(speedup=0.7).speed(4, 4) == 1
