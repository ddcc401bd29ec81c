"""A yard that lets its RayCluster grow and shrink, before an emulated API server that plays KubeRay."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import RankExit
from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.errors import NotFoundError
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.outside.k8s.api import Api
from orchestrator.outside.k8s.cluster import RayCluster, groups_of, quantity
from orchestrator.serve.fleet import MINE, Fleet
from orchestrator.settings import Settings
from orchestrator.store.rows import Mark
from orchestrator.store.store import Store
from tests.builders import a_command_job
from tests.kubernetes.cluster import Cluster, beyond, rules_of, unused
from tests.kubernetes.operators import Operators, condition
from tests.kubernetes.resources import ROOT
from tests.virtual import World

IDLE_S = 60.0


def a_raycluster(cluster: Cluster, name: str = "yard", **bounds: int) -> None:
    def group(name: str) -> Any:
        container = {"name": "ray-worker", "image": "x:1", "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}
        sizes = {"replicas": 1, "minReplicas": 0, "maxReplicas": 4, **bounds}
        return {"groupName": name, "rayStartParams": {}, "template": {"spec": {"containers": [container]}}, **sizes}

    head = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray-head", "image": "x:1"}]}}}
    spec = {"headGroupSpec": head, "workerGroupSpecs": [group("small"), group("large")]}
    cluster.create("rayclusters", {"metadata": {"name": name}, "spec": spec})


def test_a_raycluster_is_watched_through_an_expired_version(cluster: Cluster) -> None:
    a_raycluster(cluster)
    mine = RayCluster(Api(), "default", "yard")
    changes = mine.changes(seconds=30)
    seen = next(changes)
    cluster.status("rayclusters", "yard", readyWorkerReplicas=1)
    began = time.monotonic()
    assert next(changes)["status"]["readyWorkerReplicas"] == 1
    assert time.monotonic() - began < 5
    cluster.control("expire")
    assert list(changes) == []  # it is to be read anew
    again = mine.changes(seconds=30)
    assert next(again)["metadata"]["resourceVersion"] != seen["metadata"]["resourceVersion"]
    cluster.delete("rayclusters", "yard")
    with pytest.raises(NotFoundError, match="was deleted"):
        list(again)


def test_a_change_in_between_is_not_lost(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a_raycluster(cluster)
    mine, meddled = RayCluster(Api(), "default", "yard"), []
    read = RayCluster.read

    def meddle(self: RayCluster) -> Any:
        found = read(self)
        if len(meddled) < 2:
            meddled.append(1)
            cluster.patch("rayclusters", "yard", {"metadata": {"labels": {"meddled": str(len(meddled))}}})
        return found

    monkeypatch.setattr(RayCluster, "read", meddle)
    mine.resize({"small": 3}, {"small": ["yard-small-1"]})
    found = cluster.get("rayclusters", "yard")
    assert found is not None
    assert [group["replicas"] for group in found["spec"]["workerGroupSpecs"]] == [3, 1]
    assert found["spec"]["workerGroupSpecs"][0]["scaleStrategy"] == {"workersToDelete": ["yard-small-1"]}
    assert found["metadata"]["labels"] == {"meddled": "2"}
    mine.resize({"small": 9}, {})
    found = cluster.get("rayclusters", "yard")
    assert found is not None
    assert found["spec"]["workerGroupSpecs"][0]["replicas"] == 4  # its bound
    assert "scaleStrategy" not in found["spec"]["workerGroupSpecs"][0]


# A yard on it.


class Yard(World):
    """A controller, its fleet, and the operator: nodes are what the operator has made pods for."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(())
        a_raycluster(cluster, replicas=0)
        self.cluster, self.operators, self.up = cluster, Operators(cluster), set()
        self.store = Store(f"sqlite:///{folder}/yard.db")
        self.store.prepare()
        self.controller = Controller(self.store, self, Settings(), clock=lambda: self.now)
        self.fleet = Fleet(self.controller, RayCluster(Api(), "default", "yard"), IDLE_S, clock=lambda: self.now)

    def nodes(self) -> list[Node]:
        """As Ray tells of pods that have joined it."""
        pods = self.cluster.find("pods", "ray.io/cluster=yard,ray.io/node-type=worker")
        ready = [pod["metadata"]["name"] for pod in pods if condition(pod, "Ready") == "True"]
        self.up = set(ready)
        return [Node(id=name, name=name, address="x", cores=4, cpu_slots=4) for name in ready]

    def step(self, seconds: float = 1.0) -> None:
        """One round of everybody."""
        self.controller.tick()
        self.fleet.look()
        self.operators.settle()
        self.now += seconds

    def submit(self, name: str, processes: int) -> None:
        self.store.add_job(name, a_command_job(processes), self.now)

    def ends(self, name: str) -> None:
        for run, gang in self.gangs.items():
            if run.startswith(f"{name}."):
                gang.begun = True
                for rank in range(gang.contract.plan.world_size):
                    gang.exits.setdefault(rank, RankExit(rank=rank, code=ExitCode.DONE, time=self.now))

    def state(self, name: str) -> JobState:
        return self.store.job(name).state

    @property
    def replicas(self) -> list[int]:
        found = self.cluster.get("rayclusters", "yard")
        assert found is not None
        return [group["replicas"] for group in found["spec"]["workerGroupSpecs"]]


@pytest.fixture
def yard(cluster: Cluster, tmp_path: Path) -> Yard:
    return Yard(cluster, tmp_path)


def test_it_grows_for_a_gang_and_shrinks_when_that_has_ended(yard: Yard) -> None:
    yard.controller.tick()
    yard.fleet.look()
    assert yard.replicas == [0, 0]
    yard.submit("job-aaaaa", 10)
    yard.controller.tick()
    yard.fleet.look()
    assert yard.replicas == [3, 0]
    yard.controller.tick()
    told = yard.store.job("job-aaaaa")
    assert (told.reason.code, told.reason.sentence) == (
        ReasonCode.NO_NODES, "the cluster grows for it: small to 3 nodes",
    )  # fmt: skip
    yard.operators.settle()
    yard.step()
    yard.step()
    assert yard.state("job-aaaaa") == JobState.STARTING
    assert yard.replicas == [3, 0]
    for _ in range(3):
        yard.step(IDLE_S)
    assert yard.replicas == [3, 0]  # it runs on all of them
    yard.ends("job-aaaaa")
    for _ in range(3):
        yard.step()
    assert yard.state("job-aaaaa") == JobState.SUCCEEDED
    assert yard.replicas == [3, 0]
    yard.step(IDLE_S)
    for _ in range(4):
        yard.step()
    assert yard.replicas == [0, 0]
    assert yard.nodes() == []
    yard.step()
    assert yard.store.node_marks() == []  # of nodes that have left


def test_a_node_with_ranks_is_never_taken(yard: Yard) -> None:
    """The pods that go are those without ranks, whichever the operator would have chosen."""
    for name in ("job-aaaaa", "job-bbbbb", "job-ccccc"):
        yard.submit(name, 4)
    for _ in range(4):
        yard.step()
    assert yard.replicas == [3, 0]
    where = {attempt.job_id: attempt.held.shares[0].node for attempt in yard.store.live_attempts()}
    yard.ends("job-bbbbb")
    stopped: list[str] = []
    yard.operators.before_stop = lambda pod: stopped.append(pod["metadata"]["name"])
    for _ in range(6):
        yard.step(IDLE_S / 2)
    assert yard.replicas == [2, 0]
    assert stopped == [where["job-bbbbb"]]
    assert yard.state("job-aaaaa") == yard.state("job-ccccc") == JobState.STARTING


def test_a_job_that_comes_while_a_node_is_closed_gets_it(yard: Yard) -> None:
    yard.submit("job-aaaaa", 4)
    for _ in range(3):
        yard.step()
    yard.ends("job-aaaaa")
    yard.step()
    yard.step()
    yard.step(IDLE_S)
    yard.fleet.look()
    assert [mark.reason for mark in yard.store.node_marks()] == [MINE]
    yard.submit("job-bbbbb", 4)
    yard.fleet.look()
    assert yard.store.node_marks() == []
    yard.step()
    assert yard.state("job-bbbbb") == JobState.STARTING
    assert yard.replicas == [1, 0]


def test_an_administrators_mark_stays(yard: Yard) -> None:
    yard.submit("job-aaaaa", 4)
    for _ in range(3):
        yard.step()
    (node,) = yard.nodes()
    yard.store.mark_node(node.name, Mark.CORDONED, "its fan", yard.now)
    yard.ends("job-aaaaa")
    for _ in range(6):
        yard.step(IDLE_S)
    assert [(mark.name, mark.reason) for mark in yard.store.node_marks()] == [(node.name, "its fan")]


def test_without_the_lease_it_does_nothing(yard: Yard) -> None:
    yard.submit("job-aaaaa", 4)
    assert yard.fleet.look() is None
    assert yard.replicas == [0, 0]


def test_a_fleet_that_lives_sees_changes_within_seconds(yard: Yard) -> None:
    """Its threads: one looks, one watches, and an expired watch is begun anew."""
    yard.controller.tick()
    yard.fleet.start()
    try:
        yard.submit("job-aaaaa", 4)
        until(lambda: yard.replicas == [1, 0], 20)
        yard.cluster.control("expire")
        yard.cluster.ask(
            "PATCH", yard.cluster.path("rayclusters", "yard"),
            [{"op": "replace", "path": "/spec/workerGroupSpecs/0/maxReplicas", "value": 2}],
            "application/json-patch+json",
        )  # fmt: skip
        began = time.monotonic()
        until(lambda: len(yard.controller.prospect.nodes) == 2 + 4, 20)
        assert time.monotonic() - began < 10
    finally:
        yard.fleet.close()


def test_the_role_of_the_fleet_is_what_it_does(yard: Yard) -> None:
    yard.submit("job-aaaaa", 4)
    for _ in range(3):
        yard.step()
    list(zip(range(2), RayCluster(Api(), "default", "yard").changes(seconds=1), strict=False))
    rules = rules_of(ROOT / "k8s" / "components" / "fleet" / "role.yaml")
    asked = yard.cluster.asked("OpenAPI-Generator")
    assert beyond(asked, rules) == []
    assert unused(asked, rules) == []
    assert beyond(asked, [{**rules[0], "verbs": ["get"]}]) != []


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_groups_as_nodes() -> None:
    container = {
        "name": "ray-worker",
        "resources": {"limits": {"cpu": "7500m", "memory": "64Gi", "nvidia.com/gpu": "2"}},
    }
    group = {
        "groupName": "gpu-workers", "minReplicas": 0, "maxReplicas": 3, "labels": {"ray.io/accelerator-type": "H100"},
        "template": {"spec": {"containers": [container]}},
    }  # fmt: skip
    (found,) = groups_of({"spec": {"workerGroupSpecs": [group]}})
    assert (found.replicas, found.least, found.most, found.like.cores) == (0, 0, 3, 7)
    assert [gpu.type for gpu in found.like.gpus] == ["H100", "H100"]
    with pytest.raises(ValueError, match="no quantity"):
        quantity("much")
