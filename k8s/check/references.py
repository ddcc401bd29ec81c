"""Rules for names: what objects call each other is there."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s.check.model import Found, Object, Objects, containers, name_of, of_kind, pods, ray_specs, rule, selects

SECRETS: dict[str, frozenset[str]] = {
    "tuneyard-secrets": frozenset({"database-url", "token", "auth_token"}),
    "tuneyard-redis": frozenset({"password"}),
    "tuneyard-s3": frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"}),
    "tuneyard-tls": frozenset({"tls.crt", "tls.key"}),
    "tuneyard-metrics": frozenset({"token"}),
}
"""Secrets that docs/kubernetes.md tells to create, and their keys."""
MADE_BY_KUBERNETES = {"kube-root-ca.crt"}


def walk(value: object, key: str) -> Iterator[Object]:
    """Every mapping under `key`, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get(key), dict):
            yield value[key]
        for inside in value.values():
            yield from walk(inside, key)
    elif isinstance(value, list):
        for inside in value:
            yield from walk(inside, key)


@rule("add the object, or mend the name")
def references_resolve(objects: Objects) -> Found:
    have = {(item["kind"], item["metadata"]["name"]): item for item in objects}

    def missing(kind: str, name: str) -> bool:
        return (kind, name) not in have

    for pod in pods(objects):
        account = pod.spec.get("serviceAccountName", "default")
        if missing("ServiceAccount", account):
            yield pod.owner, f"ServiceAccount {account} is not there"
        names = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names:
                    yield pod.owner, f"volume {mount['name']} is not there"
        for claim in walk(pod.spec, "persistentVolumeClaim"):
            if missing("PersistentVolumeClaim", claim["claimName"]):
                yield pod.owner, f"PersistentVolumeClaim {claim['claimName']} is not there"
        for key in ("configMapRef", "configMapKeyRef", "configMap"):
            for found in walk(pod.spec, key):
                name = found["name"]
                if name in MADE_BY_KUBERNETES:
                    continue
                if missing("ConfigMap", name):
                    yield pod.owner, f"ConfigMap {name} is not there"
                elif key == "configMapKeyRef" and found["key"] not in have["ConfigMap", name].get("data", {}):
                    yield pod.owner, f"ConfigMap {name} has no {found['key']}"
    for item in of_kind(objects, "RoleBinding"):
        if missing(item["roleRef"]["kind"], item["roleRef"]["name"]):
            yield name_of(item), f"{item['roleRef']['kind']} {item['roleRef']['name']} is not there"
        for subject in item["subjects"]:
            space = have.get(("ServiceAccount", subject["name"]), {}).get("metadata", {}).get("namespace")
            if space is None or space != subject.get("namespace"):
                yield name_of(item), f"ServiceAccount {subject['name']} is not there"
    for item in of_kind(objects, "Role"):
        for right in item["rules"]:
            for name in right.get("resourceNames", []):
                if right["resources"] == ["rayclusters"] and missing("RayCluster", name):
                    yield name_of(item), f"RayCluster {name} is not there"


@rule("use a Secret and a key that docs/kubernetes.md tells to create, or add it there and in SECRETS")
def secrets_are_known(objects: Objects) -> Found:
    for item in objects:
        for key in ("secretKeyRef", "credentials"):
            for found in walk(item, key):
                if found.get("key") not in SECRETS.get(found.get("name", ""), ()):
                    yield name_of(item), f"Secret {found.get('name')} with key {found.get('key')}"
        for found in walk(item, "secretRef"):
            if found.get("name") not in SECRETS:
                yield name_of(item), f"Secret {found.get('name')}"
    for item in of_kind(objects, "Ingress"):
        for tls in item["spec"].get("tls", []):
            if tls.get("secretName") not in SECRETS:
                yield name_of(item), f"Secret {tls.get('secretName')}"
    for where, _, spec in ray_specs(objects):
        auth = spec.get("authOptions", {})
        if auth.get("mode") == "token" and "auth_token" not in SECRETS.get(auth.get("secretName", ""), ()):
            yield where, f"Secret {auth.get('secretName')} with key auth_token"


@rule("make the selector match the labels of a pod, or of the Service")
def selectors_find_something(objects: Objects) -> Found:
    found = list(pods(objects))
    for item in of_kind(objects, "Service"):
        chosen = [pod for pod in found if selects({"matchLabels": item["spec"]["selector"]}, pod.labels)]
        if not chosen:
            yield name_of(item), "selects no pod"
        names = {port.get("name") for pod in chosen for one in pod.containers for port in one.get("ports", [])}
        numbers = {port["containerPort"] for pod in chosen for one in pod.containers for port in one.get("ports", [])}
        for port in item["spec"]["ports"]:
            if chosen and port.get("targetPort", port["port"]) not in names | numbers:
                yield name_of(item), f"no pod has the port {port.get('targetPort', port['port'])}"
    for item in of_kind(objects, "PodDisruptionBudget"):
        if not any(selects(item["spec"]["selector"], pod.labels) for pod in found):
            yield name_of(item), "selects no pod"
    for item in of_kind(objects, "NetworkPolicy"):
        selectors = [item["spec"]["podSelector"]]
        rights = [*item["spec"].get("ingress", []), *item["spec"].get("egress", [])]
        for right in rights:
            for peer in (*right.get("from", []), *right.get("to", [])):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    selectors.append(peer["podSelector"])
        for selector in selectors:
            if not any(selects(selector, pod.labels) for pod in found):
                yield name_of(item), f"{selector} selects no pod"
    for item in of_kind(objects, "ServiceMonitor"):
        chosen_services = [
            service
            for service in of_kind(objects, "Service")
            if selects(item["spec"]["selector"], service["metadata"].get("labels", {}))
        ]
        ports = {port.get("name") for service in chosen_services for port in service["spec"]["ports"]}
        for endpoint in item["spec"]["endpoints"]:
            if endpoint["port"] not in ports:
                yield name_of(item), f"no Service that it selects has the port {endpoint['port']}"


@rule("name a Service that is here; KubeRay makes NAME-head-svc for the head of a RayCluster NAME")
def services_are_there(objects: Objects) -> Found:
    ports = {
        item["metadata"]["name"]: {key for port in item["spec"]["ports"] for key in (port.get("name"), port["port"])}
        for item in of_kind(objects, "Service")
    }
    heads = {f"{cluster}-head-svc" for _, cluster, _ in ray_specs(objects)}
    for item in of_kind(objects, "Ingress"):
        for backend in walk(item, "service"):
            port = backend["port"].get("name", backend["port"].get("number"))
            if port not in ports.get(backend["name"], ()):
                yield name_of(item), f"Service {backend['name']} with port {port}"
    for _, where, container in containers(objects):
        for text in (*container.get("command", []), *container.get("args", [])):
            for host in re.findall(r"ray://([\w.-]+):\d+", text):
                if host not in heads:
                    yield where, f"Service {host}"
    for where, _, spec in ray_specs(objects):
        address = spec.get("gcsFaultToleranceOptions", {}).get("redisAddress")
        host = address.removeprefix("redis://").partition(":")[0] if address else None
        if host is not None and "." not in host and host not in ports:  # one with dots is elsewhere
            yield where, f"Service {host}"
