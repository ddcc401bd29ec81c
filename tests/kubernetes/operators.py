"""What plays KubeRay's operator, Kueue and kubelets before the emulated API server: as little of them as jobs notice.

Nothing happens by itself: each `step` looks once and does what follows, so that a test sees every stage.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.kubernetes.cluster import Answer, Cluster
from tests.kubernetes.resources import Object
from tests.kubernetes.storage import now

QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
MAX_RAYJOB_NAME = 47
DONE = ("Complete", "Failed", "ValidationFailed")


class Entrypoint:
    """What runs as a RayJob's entrypoint: nothing, until a test says how it ended."""

    def __init__(self, rayjob: Object) -> None:
        self.rayjob = rayjob
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        """Its pods go: SIGTERM, and in the end SIGKILL."""


@dataclass
class Operators:
    cluster: Cluster
    pods_quota: int = 100
    """Kueue's, for all queues."""
    room: int = 100
    """Pods that there are nodes for."""
    start: Callable[[Object], Any] = Entrypoint
    before_stop: Callable[[Object], None] = lambda _: None
    """The preStop hook of a pod."""
    running: dict[str, Any] = field(default_factory=dict)
    """By RayJob's name."""

    def step(self) -> None:
        self.admit()
        for rayjob in self.cluster.find("rayjobs"):
            self.drive(rayjob)
        for raycluster in self.cluster.find("rayclusters"):
            self.scale(raycluster)
        self.kubelet()

    def settle(self, most: int = 30) -> None:
        """Step until nothing changes any more."""
        before = ""
        for _ in range(most):
            self.step()
            after = str(self.cluster.ask("GET", f"{self.cluster.path('rayjobs')}")["metadata"]["resourceVersion"])
            if after == before:
                return
            before = after
        raise AssertionError("it does not settle")

    @contextmanager
    def at_work(self, pause_s: float = 0.1) -> Iterator[None]:
        """Step again and again, in a thread, for who cannot do it himself."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(pause_s):
                self.step()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    # Kueue

    def admit(self) -> None:
        rayjobs = {one["metadata"]["name"]: one for one in self.cluster.find("rayjobs")}
        queued = {name: one for name, one in rayjobs.items() if QUEUE in (one["metadata"].get("labels") or {})}
        workloads = {one["metadata"]["ownerReferences"][0]["name"]: one for one in self.cluster.find("workloads")}
        used = 0
        waiting = []
        for name, rayjob in queued.items():
            if name not in workloads:
                workloads[name] = self._workload(rayjob)
            if _deployment(rayjob) in DONE or rayjob["metadata"].get("deletionTimestamp"):
                continue
            if condition(workloads[name], "QuotaReserved") == "True":
                used += pods_of(rayjob)
            else:
                waiting.append(name)
        for name in sorted(waiting, key=lambda one: queued[one]["metadata"]["creationTimestamp"]):
            wanted = pods_of(queued[name])
            if used + wanted > self.pods_quota:
                left = self.pods_quota - used
                message = f"couldn't assign flavors: insufficient quota for pods: {wanted} asked, {left} unused"
                self._conditions(workloads[name], QuotaReserved=("False", "Pending", message))
                continue
            used += wanted
            admitted = {"QuotaReserved": ("True", "QuotaReserved", ""), "Evicted": ("False", "QuotaReserved", "")}
            self._conditions(workloads[name], **admitted)
            self.cluster.patch("rayjobs", name, {"spec": {"suspend": False}})

    def preempt(self, name: str) -> None:
        """Kueue takes a job's quota back."""
        workload = next(one for one in self.cluster.find("workloads") if _owned(one, name))
        evicted = ("True", "Preempted", "to accommodate a workload of a higher priority")
        self._conditions(workload, Evicted=evicted, QuotaReserved=("False", "Pending", "preempted"))
        self.cluster.patch("rayjobs", name, {"spec": {"suspend": True}})

    def _workload(self, rayjob: Object) -> Object:
        labels = rayjob["metadata"]["labels"]
        return self.cluster.create(
            "workloads",
            {
                "metadata": {"name": f"rayjob-{rayjob['metadata']['name']}", "ownerReferences": [owner(rayjob)]},
                "spec": {"queueName": labels[QUEUE], "priorityClassName": labels.get(PRIORITY, ""), "active": True},
            },
        )

    def _conditions(self, workload: Object, **told: tuple[str, str, str]) -> None:
        have = {one["type"]: one for one in (workload.get("status") or {}).get("conditions") or ()}
        for kind, (status, reason, message) in told.items():
            have[kind] = {
                "type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now(),
            }  # fmt: skip
        self.cluster.status("workloads", workload["metadata"]["name"], conditions=list(have.values()))

    # KubeRay

    def drive(self, rayjob: Object) -> None:
        name, spec, status = rayjob["metadata"]["name"], rayjob["spec"], rayjob.get("status") or {}
        deployment = _deployment(rayjob)
        if rayjob["metadata"].get("deletionTimestamp"):
            self._stop(name)
            return
        if not deployment and (wrong := misfit(rayjob)):
            self._status(name, jobDeploymentStatus="ValidationFailed", message=wrong)
            return
        cluster = status.get("rayClusterName")
        if spec.get("suspend") and deployment not in DONE:
            if cluster and self.cluster.get("rayclusters", cluster):
                if deployment != "Suspending":
                    self._status(name, jobDeploymentStatus="Suspending")
                    self._stop(name)
                    self._delete("rayclusters", cluster)
            elif deployment != "Suspended":
                self._status(name, jobDeploymentStatus="Suspended", jobStatus="", rayClusterName="")
            return
        match deployment:
            case "" | "Suspended":
                self._make_cluster(rayjob)
            case "Retrying":
                if not (cluster and self.cluster.get("rayclusters", cluster)):
                    self._make_cluster(rayjob)
            case "Initializing":
                pods = self.cluster.find("pods", f"ray.io/cluster={cluster}")
                wanted = 1 + sum(group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"])
                if sum(condition(pod, "Ready") == "True" for pod in pods) >= wanted:
                    self._submitter(rayjob)
                    self.running[name] = self.start(rayjob)
                    self._status(name, jobDeploymentStatus="Running", jobStatus="RUNNING", startTime=now())
            case "Running":
                self._watch(rayjob, str(cluster))

    def _watch(self, rayjob: Object, cluster: str) -> None:
        name, status = rayjob["metadata"]["name"], rayjob["status"]
        heads = self.cluster.find("pods", f"ray.io/cluster={cluster},ray.io/node-type=head")
        lost = not [one for one in heads if "deletionTimestamp" not in one["metadata"]]
        if lost:
            self._stop(name)
        code = 137 if lost else self.running[name].poll()
        if code is None:
            return
        self.running.pop(name, None)
        if code == 0:
            self._status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1, endTime=now())
        elif (failed := int(status.get("failed") or 0) + 1) <= int(rayjob["spec"].get("backoffLimit") or 0):
            self._status(name, jobDeploymentStatus="Retrying", jobStatus="", failed=failed)
        else:
            why = {"reason": "AppFailed", "message": f"the entrypoint exited with {code}"}
            self._status(name, jobDeploymentStatus="Failed", jobStatus="FAILED", failed=failed, endTime=now(), **why)
        self._delete("rayclusters", cluster)

    def _make_cluster(self, rayjob: Object) -> None:
        name = f"{rayjob['metadata']['name']}-{secrets.token_hex(3)[:5]}"
        body = {
            "metadata": {"name": name, "ownerReferences": [owner(rayjob)]},
            "spec": rayjob["spec"]["rayClusterSpec"],
        }
        self.cluster.create("rayclusters", body)
        self._status(rayjob["metadata"]["name"], jobDeploymentStatus="Initializing", rayClusterName=name)

    def _submitter(self, rayjob: Object) -> None:
        name, template = rayjob["metadata"]["name"], rayjob["spec"]["submitterPodTemplate"]
        labels = {**template["metadata"].get("labels", {}), "job-name": name}
        metadata = {"name": f"{name}-{secrets.token_hex(3)[:5]}", "labels": labels, "ownerReferences": [owner(rayjob)]}
        self.cluster.create("pods", {"metadata": metadata, "spec": template["spec"]})

    def scale(self, raycluster: Object) -> None:
        """Make the pods that a Ray cluster is to have, and take those away that it is not to have any more."""
        if raycluster["metadata"].get("deletionTimestamp"):
            return
        name, spec = raycluster["metadata"]["name"], raycluster["spec"]
        pods = self.cluster.find("pods", f"ray.io/cluster={name}")
        live = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        if not any(pod["metadata"]["labels"]["ray.io/node-type"] == "head" for pod in live):
            self._pod(raycluster, "head", "headgroup", spec["headGroupSpec"]["template"])
        desired = 0
        for group in spec.get("workerGroupSpecs") or ():
            mine = [pod for pod in live if pod["metadata"]["labels"]["ray.io/group"] == group["groupName"]]
            for doomed in (group.get("scaleStrategy") or {}).get("workersToDelete") or ():
                if any(pod["metadata"]["name"] == doomed for pod in mine):
                    self._delete("pods", doomed)
                    mine = [pod for pod in mine if pod["metadata"]["name"] != doomed]
            desired += group["replicas"]
            for _ in range(group["replicas"] - len(mine)):
                self._pod(raycluster, "worker", group["groupName"], group["template"])
            for pod in mine[group["replicas"] :]:
                self._delete("pods", pod["metadata"]["name"])
        ready = [pod for pod in live if condition(pod, "Ready") == "True"]
        told = {"desiredWorkerReplicas": desired, "readyWorkerReplicas": max(0, len(ready) - 1)}
        if any((raycluster.get("status") or {}).get(key) != value for key, value in told.items()):
            self.cluster.status("rayclusters", name, **told)

    def _pod(self, raycluster: Object, kind: str, group: str, template: Object) -> None:
        name = raycluster["metadata"]["name"]
        labels = {"ray.io/cluster": name, "ray.io/node-type": kind, "ray.io/group": group}
        metadata = {
            **template.get("metadata", {}),
            "name": f"{name}-{group}-{secrets.token_hex(3)[:5]}"[-63:].lstrip("-"),
            "labels": {**template.get("metadata", {}).get("labels", {}), **labels},
            "ownerReferences": [owner(raycluster)],
        }
        self.cluster.create("pods", {"metadata": metadata, "spec": template["spec"]})

    # kubelets

    def kubelet(self) -> None:
        pods = self.cluster.find("pods")
        placed = sum(bool(pod["spec"].get("nodeName")) for pod in pods)
        for pod in pods:
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                self.before_stop(pod)
                self._delete("pods", name, gracePeriodSeconds=0)
            elif not pod["spec"].get("nodeName"):
                if placed >= self.room:
                    message = f"0/{self.room} nodes are available: {self.room} Insufficient cpu."
                    told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                    if condition(pod, "PodScheduled") != "False":
                        self.cluster.status("pods", name, phase="Pending", conditions=[told])
                    continue
                placed += 1
                self.cluster.patch("pods", name, {"spec": {"nodeName": f"node-{placed}"}})
                ready = [{"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready")]
                self.cluster.status("pods", name, phase="Running", conditions=ready, podIP=f"10.1.0.{placed}")

    def _stop(self, name: str) -> None:
        process = self.running.pop(name, None)
        if process is not None:
            process.stop()

    def _delete(self, plural: str, name: str, **options: Any) -> None:
        try:
            self.cluster.delete(plural, name, **options)
        except Answer as problem:
            if problem.code != 404:
                raise

    def _status(self, name: str, **status: Any) -> None:
        self.cluster.status("rayjobs", name, **status)


def owner(item: Object) -> Object:
    return {
        "apiVersion": item["apiVersion"], "kind": item["kind"], "name": item["metadata"]["name"],
        "uid": item["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def condition(item: Object, kind: str) -> str | None:
    found = (item.get("status") or {}).get("conditions") or ()
    return next((one["status"] for one in found if one["type"] == kind), None)


def pods_of(rayjob: Object) -> int:
    """Head, workers and submitter: what Kueue counts."""
    return 2 + sum(group["replicas"] for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def misfit(rayjob: Object) -> str | None:
    """What KubeRay's own validation would not take."""
    spec, name = rayjob["spec"], rayjob["metadata"]["name"]
    if len(name) > MAX_RAYJOB_NAME:
        return f"RayJob name should be no more than {MAX_RAYJOB_NAME} characters"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        return "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if spec.get("suspend") and spec.get("clusterSelector"):
        return "the ClusterSelector mode doesn't support the suspend operation"
    if spec.get("backoffLimit", 0) < 0:
        return "backoffLimit must be a positive integer"
    return None


def _deployment(rayjob: Object) -> str:
    return str((rayjob.get("status") or {}).get("jobDeploymentStatus") or "")


def _owned(item: Object, name: str) -> bool:
    return any(one["name"] == name for one in item["metadata"].get("ownerReferences") or ())
