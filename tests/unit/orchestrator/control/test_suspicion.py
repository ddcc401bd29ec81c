"""From failures to a suspect, and from its probe to a verdict. The probes are real, of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from orchestrator.cluster.model import Node
from orchestrator.cluster.status import ProbeCheck, ProbeReport, ProbeRequest
from orchestrator.control.probing import SILENCE_POLLS, Probing
from orchestrator.control.suspicion import Suspicion
from orchestrator.execute.local import free_ports, probed
from orchestrator.execute.probes import Probes
from orchestrator.store.rows import Mark, NodeFault
from orchestrator.store.store import Store
from tests.builders import a_command_job, a_node

NODES = [a_node(name, slots=2).model_copy(update={"address": "127.0.0.1"}) for name in ("n1", "n2")]
PATIENCE_S = 200.0


class TwoNodes:
    """An executor, so far as a probe needs one: both nodes are this machine."""

    def __init__(self) -> None:
        self.probes = {node.id: Probes() for node in NODES}
        self.deaf: set[str] = set()

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: free_ports(count) for node, count in wanted.items()}

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:
        return {node: probed(self.probes[node], request) for node, request in asked.items() if node not in self.deaf}


@pytest.fixture
def executor() -> Iterator[TwoNodes]:
    nodes = TwoNodes()
    yield nodes
    for probes in nodes.probes.values():
        probes.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    store.prepare()
    return store


def marks_of(store: Store) -> dict[str, Mark]:
    return {row.name: row.mark for row in store.node_marks()}


def failures(store: Store, node: Node, *jobs: str, now: float) -> None:
    lease = store.acquire_lease("me", now, 1e9)
    assert lease is not None
    for job in jobs:
        store.add_job(job, a_command_job(1), now=now)
        with store.acting(lease) as write:
            write.add_node_fault(NodeFault(node=node.name, job_id=job, attempt=1, outcome="killed", time=now))


def look_until_decided(suspicion: Suspicion, store: Store, now: float) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while Mark.SUSPECT in marks_of(store).values():
        assert time.monotonic() < deadline
        suspicion.look(NODES, marks_of(store), now)
        time.sleep(0.05)


def test_a_suspect_that_is_sound_comes_back(store: Store, executor: TwoNodes, tmp_path: Path) -> None:
    suspicion = Suspicion(store, executor, str(tmp_path))  # type: ignore[arg-type]
    suspicion.look(NODES, {}, 0.0)
    failures(store, NODES[0], "a-1", now=1.0)
    suspicion.aroused()
    suspicion.look(NODES, {}, 1.0)
    assert marks_of(store) == {}, "one job may kill itself"
    failures(store, NODES[0], "b-1", now=2.0)
    suspicion.aroused()
    suspicion.look(NODES, {}, 2.0)
    assert marks_of(store) == {NODES[0].name: Mark.SUSPECT}
    assert store.node_marks()[0].reason == "2 jobs failed on it within an hour: a-1, b-1; it is being probed"
    look_until_decided(suspicion, store, 3.0)
    assert marks_of(store) == {}
    suspicion.aroused()
    suspicion.look(NODES, {}, 3.0)
    assert marks_of(store) == {}, "what was held against it is forgotten"


def test_a_suspect_that_fails_its_probe_is_cordoned(store: Store, executor: TwoNodes, tmp_path: Path) -> None:
    failures(store, NODES[1], "a-1", "b-1", now=1.0)
    suspicion = Suspicion(store, executor, str(tmp_path / "broken disk"))  # type: ignore[arg-type]
    suspicion.look(NODES, {}, 1.0)
    look_until_decided(suspicion, store, 2.0)
    (mark,) = store.node_marks()
    assert (mark.name, mark.mark) == (NODES[1].name, Mark.CORDONED)
    assert mark.reason is not None
    assert mark.reason.startswith("its probe failed: disk: ")


def test_nodes_are_probed_alone_and_then_with_neighbours(executor: TwoNodes, tmp_path: Path) -> None:
    probing = Probing(executor, NODES, NODES, "p", str(tmp_path))  # type: ignore[arg-type]
    deadline = time.monotonic() + PATIENCE_S
    while (reports := probing.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for node, other in ((0, 1), (1, 0)):
        report = reports[NODES[node].id]
        assert report.ok, report.sentence
        names = [check.name for check in report.checks]
        assert names == ["matmul", "memory", "disk", f"all-reduce with {NODES[other].name}"]


def test_who_is_at_odds_with_one_neighbour_of_two_is_sound() -> None:
    alone, good = (ProbeCheck(name=name, ok=True, told="") for name in ("disk", "all-reduce with n2"))
    bad = ProbeCheck(name="all-reduce with n3", ok=False, told="it does not answer")
    assert ProbeReport(checks=(alone, good, bad)).sound
    assert not ProbeReport(checks=(alone, good, bad)).ok
    assert not ProbeReport(checks=(alone, bad)).sound
    assert not ProbeReport(checks=(alone.model_copy(update={"ok": False}), good)).sound


def test_a_node_that_does_not_answer_has_failed(executor: TwoNodes) -> None:
    executor.deaf = {NODES[0].id}
    probing = Probing(executor, NODES[:1], [], "p", "/tmp")  # type: ignore[arg-type]
    polls = 1
    while (reports := probing.poll()) is None:
        polls += 1
    assert polls == SILENCE_POLLS
    assert reports[NODES[0].id].sentence == "agent: it does not answer"
