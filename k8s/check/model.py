"""What is checked, and what a check finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
Objects = list[Object]
Found = Iterator[tuple[str, str]]
"""Of what a rule finds: the object, and what is wrong with it."""

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
CONTROLLER = "tuneyard-controller"


@dataclass(frozen=True)
class Finding:
    """Something wrong, where it is, and what to do."""

    subject: str
    """The overlay or the file."""
    object: str
    rule: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.object}: {self.rule}: {self.message}\n    {self.remedy}"


@dataclass(frozen=True)
class Rule:
    """Something that all objects of an overlay keep together."""

    name: str
    remedy: str
    find: Callable[[Objects], Found]

    def check(self, subject: str, objects: Objects) -> list[Finding]:
        return [Finding(subject, where, self.name, message, self.remedy) for where, message in self.find(objects)]


RULES: list[Rule] = []
"""All of them, once the modules that hold them are imported (`k8s.check.policy`)."""


def rule(remedy: str) -> Callable[[Callable[[Objects], Found]], Callable[[Objects], Found]]:
    """Make a function a rule, named as the function with dashes."""

    def register(find: Callable[[Objects], Found]) -> Callable[[Objects], Found]:
        RULES.append(Rule(find.__name__.replace("_", "-"), remedy, find))
        return find

    return register


@dataclass(frozen=True)
class Pod:
    """A pod as a workload or KubeRay makes it."""

    owner: str
    labels: Mapping[str, str]
    spec: Object
    role: str = ""
    """head or worker, of a Ray cluster."""
    replicas: int = 1

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def name_of(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def ray_specs(objects: Iterable[Object]) -> Iterator[tuple[str, str, Object]]:
    """(object, name of the cluster, spec) of every Ray cluster, a RayJob's own included."""
    for item in objects:
        if item["kind"] == "RayCluster":
            yield name_of(item), item["metadata"]["name"], item["spec"]
        elif item["kind"] == "RayJob" and "rayClusterSpec" in item["spec"]:
            yield name_of(item), item["metadata"]["name"], item["spec"]["rayClusterSpec"]


def pods(objects: Iterable[Object]) -> Iterator[Pod]:
    """The pods of everything that makes some, with the labels that KubeRay adds and the autoscaler's container."""
    objects = list(objects)
    for item in of_kind(objects, *WORKLOADS, "CronJob"):
        spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
        template, replicas = spec["template"], item["spec"].get("replicas", 1)
        yield Pod(name_of(item), template["metadata"].get("labels", {}), template["spec"], replicas=replicas)
    for owner, cluster, spec in ray_specs(objects):
        head = spec["headGroupSpec"]["template"]
        yield Pod(f"{owner} head", _labels(head, cluster, "head", "headgroup"), _with_autoscaler(head, spec), "head")
        for group in spec.get("workerGroupSpecs", []):
            template, name = group["template"], group["groupName"]
            labels = _labels(template, cluster, "worker", name)
            yield Pod(f"{owner} {name}", labels, template["spec"], "worker", group.get("replicas", 0))


def _labels(template: Object, cluster: str, node_type: str, group: str) -> dict[str, str]:
    own = {"ray.io/cluster": cluster, "ray.io/node-type": node_type, "ray.io/group": group}
    labels: dict[str, str] = template.get("metadata", {}).get("labels", {})
    return own | labels


def _with_autoscaler(head: Object, spec: Object) -> Object:
    if not spec.get("enableInTreeAutoscaling"):
        return dict(head["spec"])
    given = {key: value for key, value in spec.get("autoscalerOptions", {}).items() if key in AUTOSCALER_CONTAINER}
    return {**head["spec"], "containers": [*head["spec"]["containers"], {"name": "autoscaler", **given}]}


AUTOSCALER_CONTAINER = (
    "image", "imagePullPolicy", "env", "envFrom", "resources", "securityContext", "volumeMounts",
)  # fmt: skip


def containers(objects: Iterable[Object]) -> Iterator[tuple[Pod, str, Object]]:
    """(pod, where, container) of all pods."""
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, f"{pod.owner}/{container['name']}", container


def environment(container: Object, objects: Iterable[Object]) -> dict[str, str | None]:
    """What a container's variables are; None for those from a Secret or a field."""
    maps = {item["metadata"]["name"]: item.get("data", {}) for item in of_kind(objects, "ConfigMap")}
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        found |= maps.get(source.get("configMapRef", {}).get("name", ""), {})
    return found | {one["name"]: one.get("value") for one in container.get("env", [])}


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for one in selector.get("matchExpressions", []):
        value, values = labels.get(one["key"]), one.get("values", [])
        match one["operator"]:
            case "In":
                fine = value in values
            case "NotIn":
                fine = value not in values
            case "Exists":
                fine = value is not None
            case _:
                fine = value is None
        if not fine:
            return False
    return True


UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]{0,2})", str(text))
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * UNITS[found[2]]
