"""Rules for pods: what they run, with which rights, within which bounds."""

from __future__ import annotations

import re

from k8s.check.model import Found, Objects, containers, name_of, of_kind, pods, rule

TAGGED = re.compile(r"^[a-z0-9./-]+(?::\d+/[a-z0-9./-]+)?:(?!latest$)[\w.-]+$")
LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


OF_NO_NAMESPACE = frozenset(
    {
        "Namespace",
        "ClusterRole",
        "ClusterRoleBinding",
        "PriorityClass",
        "StorageClass",
        "ClusterQueue",
        "ResourceFlavor",
    }
    | {"Topology", "WorkloadPriorityClass"}
)


@rule("name a version: image: tuneyard:0.1.0")
def images_have_a_tag(objects: Objects) -> Found:
    for _, where, container in containers(objects):
        if not TAGGED.match(container.get("image", "")):
            yield where, f"image {container.get('image')!r}"


@rule("give cpu and memory in resources.requests and resources.limits")
def resources_are_bounded(objects: Objects) -> Found:
    for _, where, container in containers(objects):
        for side in ("requests", "limits"):
            for name in ("cpu", "memory"):
                if name not in container.get("resources", {}).get(side, {}):
                    yield where, f"no {side}.{name}"


@rule("set runAsNonRoot, a runAsUser above 0 and seccompProfile RuntimeDefault in the pod's securityContext")
def pods_are_not_root(objects: Objects) -> Found:
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) <= 0:
            yield pod.owner, "may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield pod.owner, "no seccomp profile"


@rule(f"set the container's securityContext to {LOCKED}, and no more")
def containers_are_locked_down(objects: Objects) -> Found:
    for _, where, container in containers(objects):
        if container.get("securityContext") != LOCKED:
            yield where, f"securityContext is {container.get('securityContext')}"


@rule("no host network, process or IPC namespace, and no hostPath volume")
def hosts_are_out_of_reach(objects: Objects) -> Found:
    for pod in pods(objects):
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(key):
                yield pod.owner, key
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield pod.owner, f"volume {volume['name']} is of the host"


@rule("give it a readinessProbe and a livenessProbe")
def containers_are_probed(objects: Objects) -> Found:
    for pod, where, container in containers(objects):
        if container["name"] == "autoscaler" and pod.role == "head":
            continue  # the operator's container: nothing of ours can give it one
        for kind in ("readinessProbe", "livenessProbe"):
            if kind not in container and container not in pod.spec.get("initContainers", []):
                yield where, f"no {kind}"


@rule("mount an emptyDir at /tmp, and on Ray's pods one of medium Memory, with a sizeLimit, at /dev/shm")
def temporary_files_have_room(objects: Objects) -> Found:
    for pod, where, container in containers(objects):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        mounts = {one["mountPath"]: volumes.get(one["name"], {}) for one in container.get("volumeMounts", [])}
        if "emptyDir" not in mounts.get("/tmp", {}):
            yield where, "the root is read-only, and /tmp is no volume"
        if not pod.role or container["name"] == "autoscaler":
            continue
        shared = mounts.get("/dev/shm", {}).get("emptyDir", {})
        if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
            yield where, "/dev/shm is no bounded memory"


@rule("use strategy Recreate: the next pod could not mount the disk while the old one has it")
def disks_have_one_pod(objects: Objects) -> Found:
    single = {
        item["metadata"]["name"]
        for item in of_kind(objects, "PersistentVolumeClaim")
        if item["spec"]["accessModes"] != ["ReadWriteMany"]
    }
    for item in of_kind(objects, "Deployment"):
        volumes = item["spec"]["template"]["spec"].get("volumes", [])
        claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes}
        together = item["spec"].get("strategy", {}).get("type") != "Recreate" or item["spec"].get("replicas", 1) > 1
        if claims & single and together:
            yield f"Deployment/{item['metadata']['name']}", f"several pods of it would share {claims & single}"


@rule("label the Namespace pod-security.kubernetes.io/enforce: restricted; write metadata.namespace")
def namespace_is_restricted(objects: Objects) -> Found:
    spaces = of_kind(objects, "Namespace")
    for item in spaces:
        if item["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"Namespace/{item['metadata']['name']}", "pods of any kind are let in"
    names = {item["metadata"]["name"] for item in spaces}
    for item in objects:
        space = item["metadata"].get("namespace")
        if item["kind"] in OF_NO_NAMESPACE:
            if space is not None:
                yield name_of(item), "is of the whole cluster, and has a namespace"
        elif space not in names:
            yield name_of(item), f"is in the namespace {space}, which is not here"
