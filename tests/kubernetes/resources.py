"""The kinds that the emulated API server has, and what their objects must look like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate

from k8s.check.schemas import crd_dir, custom

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
CRDS = crd_dir()
KUBERNETES = "1.33"
NAME = {"type": "string"}


@dataclass(frozen=True)
class Resource:
    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


RAY, KUEUE, RBAC = "ray.io", "kueue.x-k8s.io", "rbac.authorization.k8s.io"
RESOURCES = (
    Resource("", "v1", "namespaces", "Namespace", False, short=("ns",)),
    Resource("", "v1", "nodes", "Node", False, ("status",), ("no",)),
    Resource("", "v1", "pods", "Pod", True, ("status", "log", "eviction"), ("po",)),
    Resource("", "v1", "configmaps", "ConfigMap", short=("cm",)),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "events", "Event", short=("ev",)),
    Resource("", "v1", "services", "Service", short=("svc",)),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", short=("sa",)),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", short=("pvc",)),
    Resource("apps", "v1", "deployments", "Deployment", True, ("status",)),
    Resource("batch", "v1", "jobs", "Job", True, ("status",)),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("status",)),
    Resource(RBAC, "v1", "roles", "Role"),
    Resource(RBAC, "v1", "rolebindings", "RoleBinding"),
    Resource(RAY, "v1", "rayclusters", "RayCluster", True, ("status",)),
    Resource(RAY, "v1", "rayjobs", "RayJob", True, ("status",)),
    Resource(KUEUE, "v1beta1", "workloads", "Workload", True, ("status",)),
)
CUSTOM = (RAY, KUEUE)


def faults(resource: Resource, item: Object) -> list[str]:
    """What is wrong with an object, by the published schemas; nothing where there is none of its kind."""
    if resource.group in CUSTOM:
        validator = custom(resource.api_version, resource.kind, CRDS)
        return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(item)] if validator is not None else []
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as problem:
        return [str(problem)]
    return []
