"""The RayCluster of a yard inside Kubernetes: its worker groups as the fleet sees them, and its changes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.gpus import gpu_type
from orchestrator.cluster.group import Group
from orchestrator.cluster.model import BF16_LABEL, HOST_SHARE, Gpu, Node
from orchestrator.errors import NotFoundError
from orchestrator.outside.k8s.again import WatchExpired, until_unchanged
from orchestrator.outside.k8s.manifest import GPU_TYPE

RAYCLUSTERS = "rayclusters"
if TYPE_CHECKING:
    from orchestrator.outside.k8s.api import Api

GROUP_LABEL = "ray.io/node-group"
"""Which Ray nodes have where KubeRay says it to them (RAY_NODE_TYPE_NAME); else a pod's name tells."""
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
WATCH_S = 60
Object = dict[str, Any]


class RayCluster:
    """One RayCluster. Its methods raise as those of Api; reading, watching and patching it is all that they do."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api, self.namespace, self.name = api, namespace, name

    def read(self) -> Object:
        return self._api.get(RAYCLUSTERS, self.namespace, self.name)

    def changes(self, seconds: int = WATCH_S) -> Iterator[Object]:
        """The RayCluster now, and again whenever it changes, for so many seconds, or until the server has forgotten
        what comes next: who asks again begins with it as it is then. Raises NotFoundError once it is deleted."""
        self.read()  # a watch of what is not there would say nothing
        try:
            for event in self._api.watch(RAYCLUSTERS, self.namespace, self.name, seconds):
                if event["type"] == "DELETED":
                    raise NotFoundError(f"the RayCluster {self.name} was deleted", field="cluster")
                yield event["object"]
        except WatchExpired:
            return

    def resize(self, replicas: Mapping[str, int], doomed: Mapping[str, Sequence[str]]) -> Object:
        """Have so many nodes in each group, within its bounds, those of the pods `doomed` not among them. Other fields
        stay as they are, whoever changes them at the same time."""

        def change() -> Object:
            found = self.read()
            groups = [dict(group) for group in found["spec"].get("workerGroupSpecs") or ()]
            before = [dict(group) for group in groups]
            for group in groups:
                name = group["groupName"]
                if name in replicas:
                    group["replicas"] = max(group["minReplicas"], min(group["maxReplicas"], replicas[name]))
                    if doomed.get(name):
                        group["scaleStrategy"] = {"workersToDelete": list(doomed[name])}
                    else:
                        group.pop("scaleStrategy", None)
            if groups == before:
                return found
            version = {"resourceVersion": found["metadata"]["resourceVersion"]}
            body = {"metadata": version, "spec": {"workerGroupSpecs": groups}}
            return self._api.patch(RAYCLUSTERS, self.namespace, self.name, body)

        return until_unchanged(change)


def groups_of(raycluster: Object) -> list[Group]:
    """Its worker groups. What a node of each is follows from its pods' limits and labels."""
    found = []
    for group in raycluster["spec"].get("workerGroupSpecs") or ():
        found.append(
            Group(
                name=group["groupName"],
                replicas=group.get("replicas", group["minReplicas"]),
                least=group["minReplicas"],
                most=group["maxReplicas"],
                like=_node_of(group),
                doomed=tuple((group.get("scaleStrategy") or {}).get("workersToDelete") or ()),
            )
        )
    return found


def _node_of(group: Object) -> Node:
    container = group["template"]["spec"]["containers"][0]
    limits = container.get("resources", {}).get("limits") or container.get("resources", {}).get("requests") or {}
    labels = dict(group.get("labels") or {})
    cores = max(1, int(quantity(limits.get("cpu", "1"))))
    count = sum(int(quantity(value)) for name, value in limits.items() if name.endswith("/gpu"))
    selector = group["template"]["spec"].get("nodeSelector") or {}
    kind = labels.get(GPU_TYPE) or _product(selector.get("nvidia.com/gpu.product")) or "GPU"
    known = gpu_type(kind)
    slots = group.get("rayStartParams", {}).get("num-cpus")
    return Node(
        id=group["groupName"],
        name=group["groupName"],
        address=group["groupName"],
        cores=cores,
        cpu_slots=int(slots) if slots is not None else cores,
        memory_bytes=int(quantity(limits["memory"]) * HOST_SHARE) if "memory" in limits else None,
        gpus=tuple(
            Gpu(index=index, type=kind, memory_bytes=known.memory_bytes if known is not None else None)
            for index in range(count)
        ),
        bf16=labels.get(BF16_LABEL) == "true",
        labels=labels,
    )


def _product(name: str | None) -> str | None:
    """`NVIDIA-H100-80GB-HBM3`, as NVIDIA's GPU feature discovery says it, as job files do."""
    known = gpu_type(name) if name is not None else None
    return known.name if known is not None else name


def group_of_node(node: Node, cluster: str, groups: Sequence[Group]) -> str | None:
    """The group that a Ray node is of; None for the head and for what is none of the cluster's pods."""
    names = {group.name for group in groups}
    label = node.labels.get(GROUP_LABEL)
    if label in names:
        return label
    found = [name for name in names if node.name.startswith(f"{cluster}-{name}-")]
    return max(found, key=len) if found else None


def quantity(text: str | int | float) -> float:
    """`500m`, `16Gi`, `4` as a number. Raises ValueError."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|)", str(text))
    if match is None:
        raise ValueError(f"`{text}` is no quantity")
    return float(match[1]) / 1000 if match[2] == "m" else float(match[1]) * UNITS[match[2]]
