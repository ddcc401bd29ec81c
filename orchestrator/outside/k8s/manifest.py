"""The RayJob of a job: all that Kubernetes is told, and all that its run needs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.outside.k8s.options import Kind, KubernetesOptions
from orchestrator.outside.k8s.record import (
    ARRAY_LABEL,
    HANDED,
    JOB_LABEL,
    KEY,
    ORDER,
    ORDER_FILE,
    OURS,
    OWN,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    Handed,
    RunOrder,
)
from orchestrator.outside.shape import Shape

GROUP, VERSION = "ray.io", "v1"
RAY_VERSION = "2.60.0"
MODULE = "orchestrator.serve.rayjob"
MAX_ORDER = 200_000
"""Bytes: all annotations of an object may have 262,144."""
WORKERS = "workers"
GPU_TYPE = "ray.io/accelerator-type"
MARGIN_S = 20.0
"""Of a pod's grace, what is kept for ending what does not save in time."""
USER = 1000
Object = dict[str, Any]


def rayjob_of(handed: Handed, order: RunOrder, shape: Shape, kind: Kind, options: KubernetesOptions) -> Object:
    """An object that the API server takes.

    Raises:
        SpecError: the job is too large to travel with it.
    """
    text = order.model_dump_json()
    if len(text.encode()) > MAX_ORDER:
        raise SpecError(
            f"the job takes {len(text.encode())} bytes, and {MAX_ORDER} travel with a RayJob",
            code="out-of-range",
            hint="keep long lists in a file on the volume, and name it",
        )
    labels = {OWN: OURS, JOB_LABEL: handed.name}
    if handed.array is not None:
        labels[ARRAY_LABEL] = handed.array
    if options.queue is not None:
        labels[QUEUE_LABEL] = options.queue
    if options.priority_class is not None:
        labels[PRIORITY_LABEL] = options.priority_class
    spec: Object = {
        "entrypoint": f"python -m {MODULE} {ORDER_FILE}/order.json",
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _submitter(handed, options),
        "shutdownAfterJobFinishes": True,
        "backoffLimit": options.restarts,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "enableInTreeAutoscaling": False,
            "headGroupSpec": _head(handed, text, options),
            "workerGroupSpecs": [_workers(handed, shape, kind, options)],
        },
    }
    if options.keep is not None:
        spec["ttlSecondsAfterFinished"] = int(options.keep)
    if options.queue is not None:
        spec["suspend"] = True  # Kueue's from now on
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": handed.name,
            "namespace": handed.namespace,
            "labels": labels,
            "annotations": {KEY: handed.key, HANDED: handed.model_dump_json()},
        },
        "spec": spec,
    }


def _head(handed: Handed, order: str, options: KubernetesOptions) -> Object:
    """Ray's head and the job's controller. It has no ranks; before it goes it lets the controller save and end."""
    file = {"path": "order.json", "fieldRef": {"fieldPath": f"metadata.annotations['{ORDER}']"}}
    container = _container("ray-head", options, f"{options.head_cpus}", options.head_memory_gb)
    container["ports"] = [
        {"name": "gcs", "containerPort": 6379},
        {"name": "client", "containerPort": 10001},
        {"name": "dashboard", "containerPort": 8265},
    ]
    # What KubeRay stops, Ray would kill after three seconds.
    container["env"] += [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": f"{options.grace:.0f}"}]
    container["volumeMounts"] += [{"name": "order", "mountPath": ORDER_FILE, "readOnly": True}]
    leave = [*_python(MODULE), "--leave", "--grace", f"{_within(options.grace):.0f}", f"{ORDER_FILE}/order.json"]
    container["lifecycle"] = {"preStop": {"exec": {"command": leave}}}
    template = _pod(handed, container, options)
    template["metadata"]["annotations"] = {ORDER: order}
    template["spec"]["volumes"] += [{"name": "order", "downwardAPI": {"items": [file]}}]
    return {"rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"}, "template": template}


def _workers(handed: Handed, shape: Shape, kind: Kind, options: KubernetesOptions) -> Object:
    memory = memory_gb_of(shape, kind)
    container = _container("ray-worker", options, f"{shape.cpus}", memory)
    if shape.kind is not None:
        for side in ("requests", "limits"):
            container["resources"][side][kind.resource] = f"{shape.per_node}"
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    # By then the hook has moved what ran here; Ray's own wait would end after the pod.
    container["env"] += [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "0"}]
    evacuate = [*_python("orchestrator.execute.evacuate"), "--grace", f"{_within(options.grace):.0f}"]
    container["lifecycle"] = {"preStop": {"exec": {"command": evacuate}}}
    template = _pod(handed, container, options)
    if kind.selector:
        template["spec"]["nodeSelector"] = dict(kind.selector)
    if shape.kind is not None and kind.tolerations:
        template["spec"]["tolerations"] = [one.model_dump(exclude_none=True) for one in kind.tolerations]
    group: Object = {
        "groupName": WORKERS,
        "replicas": shape.nodes,
        "minReplicas": shape.nodes,
        "maxReplicas": shape.nodes,
        "rayStartParams": {} if shape.kind is not None else {"num-cpus": f"{shape.per_node}"},
        "template": template,
    }
    if shape.kind is not None:
        group["labels"] = {GPU_TYPE: shape.kind}
    return group


def memory_gb_of(shape: Shape, kind: Kind) -> float:
    """Of a worker pod: what the plan needs, where that is known, else its share of the node's."""
    if shape.memory_mb is not None:
        return shape.memory_mb * (1 << 20) / 10**9
    share = shape.per_node / kind.gpus if shape.kind is not None and kind.gpus else shape.cpus / kind.cpus
    return kind.memory_gb * min(1.0, share)


def _submitter(handed: Handed, options: KubernetesOptions) -> Object:
    """The pod that hands the entrypoint to Ray and prints what it prints."""
    container = _container("ray-job-submitter", options, "500m", 1.0)
    return _pod(handed, container, options, {"restartPolicy": "Never"}, volumes=("user", "tmp"))


def _container(name: str, options: KubernetesOptions, cpu: str, memory_gb: float) -> Object:
    asked = {"cpu": cpu, "memory": f"{-(-int(memory_gb * 10**9) // (1 << 20))}Mi"}
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": "HOME", "value": "/home/tuneyard"},
            {"name": "HF_HOME", "value": f"{options.mount}/hub"},
            {"name": "TUNEYARD_HOME", "value": options.mount},
        ],
        "resources": {"requests": dict(asked), "limits": dict(asked)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "home", "mountPath": options.mount},
            {"name": "user", "mountPath": "/home/tuneyard"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "ray", "mountPath": "/tmp/ray"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _pod(
    handed: Handed,
    container: Object,
    options: KubernetesOptions,
    more: Mapping[str, Any] | None = None,
    volumes: Sequence[str] = ("home", "user", "tmp", "ray", "shm"),
) -> Object:
    """A template as Pod Security's `restricted` wants it."""
    have: dict[str, Object] = {
        "home": {"persistentVolumeClaim": {"claimName": options.claim}},
        "user": {"emptyDir": {"sizeLimit": "2Gi"}},
        "tmp": {"emptyDir": {"sizeLimit": "10Gi"}},
        "ray": {"emptyDir": {"sizeLimit": "20Gi"}},
        "shm": {"emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-int(options.shm_gb * 10**9) // (1 << 20))}Mi"}},
    }
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] in volumes]
    return {
        "metadata": {"labels": {JOB_LABEL: handed.name, "app.kubernetes.io/part-of": OURS}},
        "spec": {
            "serviceAccountName": options.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # would set TUNEYARD_PORT, which is a setting
            "terminationGracePeriodSeconds": int(options.grace),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": name, **have[name]} for name in volumes],
            **(more or {}),
        },
    }


def _python(module: str) -> list[str]:
    return ["python", "-m", module]


def _within(grace_s: float) -> float:
    return max(grace_s / 2, grace_s - MARGIN_S)
