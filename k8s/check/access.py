"""Rules for rights, secrets and the network."""

from __future__ import annotations

import re

from k8s.check.model import Found, Object, Objects, containers, name_of, of_kind, pods, rule
from orchestrator.settings import PREFIX, Settings

SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|DATABASE_URL|_KEY$")
DENY_ALL = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@rule("a Role, not a ClusterRole; list groups, resources and verbs, none of which is * and no secrets")
def rights_are_listed(objects: Objects) -> Found:
    for item in objects:
        if item["kind"].startswith("ClusterRole"):
            yield name_of(item), "is for the whole cluster"
    for item in of_kind(objects, "Role"):
        for right in item["rules"]:
            if "*" in (*right["apiGroups"], *right["resources"], *right["verbs"]):
                yield name_of(item), "has a wildcard"
            if "secrets" in right["resources"]:
                yield name_of(item), "may have secrets"


@rule("name the object in resourceNames: a right to change is for one object")
def changes_are_of_named_objects(objects: Objects) -> Found:
    for item in of_kind(objects, "Role"):
        for right in item["rules"]:
            change = {"patch", "update", "delete", "deletecollection"} & set(right["verbs"])
            # Pods have names that nobody knows before.
            if change and not right.get("resourceNames") and right["resources"] != ["pods"]:
                yield name_of(item), f"{sorted(change)} of any {right['resources']}"


@rule("automountServiceAccountToken: false; who needs a token mounts a projected one, for an account with a Role")
def tokens_are_not_mounted(objects: Objects) -> Found:
    for item in of_kind(objects, "ServiceAccount"):
        if item.get("automountServiceAccountToken") is not False:
            yield name_of(item), "its token is mounted by default"
    bound = {
        subject["name"]
        for item in of_kind(objects, "RoleBinding")
        for subject in item["subjects"]
        if subject["kind"] == "ServiceAccount"
    }
    for pod in pods(objects):
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.owner, "a token is mounted"
        if projected_tokens(pod.spec) and pod.spec.get("serviceAccountName") not in bound:
            yield pod.owner, "has a token for an account without a Role"


@rule("mount the token into the autoscaler's container alone: what Ray runs for a job must not find one")
def jobs_find_no_token(objects: Objects) -> Found:
    for pod, where, container in containers(objects):
        if pod.role and container["name"] != "autoscaler":
            mounted = {one["name"] for one in container.get("volumeMounts", [])}
            if projected_tokens(pod.spec) & mounted:
                yield where, "has a token"


def projected_tokens(spec: Object) -> set[str]:
    """Names of the volumes that hold a token."""
    return {
        volume["name"]
        for volume in spec.get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }


@rule("refer to a Secret by secretKeyRef; create it by hand, as docs/kubernetes.md says")
def secrets_are_referred_to(objects: Objects) -> Found:
    for item in of_kind(objects, "Secret"):
        yield name_of(item), "its values are in a file"
    for item in of_kind(objects, "ConfigMap"):
        for key in item.get("data", {}):
            if SECRET.search(key):
                yield name_of(item), f"{key} is no setting, but a secret"
    for _, where, container in containers(objects):
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]) and "value" in variable:
                yield where, f"{variable['name']} has its value in a file"


@rule("keep the policy that denies everything, and say to whom or on which ports in every other")
def network_is_closed(objects: Objects) -> Found:
    policies = of_kind(objects, "NetworkPolicy")
    if not any(item["spec"] == DENY_ALL for item in policies):
        yield "NetworkPolicy", "no policy denies everything by default"
    for item in policies:
        for right in item["spec"].get("egress", []):
            if not right.get("to") and not right.get("ports"):
                yield name_of(item), "lets out to everywhere"
        for right in item["spec"].get("ingress", []):
            if not right.get("from"):
                yield name_of(item), "lets everybody in"


@rule("variables are settings of orchestrator/settings.py, with values that they take; enableServiceLinks: false")
def settings_exist(objects: Objects) -> Found:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    given = [(name_of(item), key) for item in of_kind(objects, "ConfigMap") for key in item.get("data", {})]
    given += [(where, one["name"]) for _, where, container in containers(objects) for one in container.get("env", [])]
    for where, key in given:
        if key.startswith(PREFIX) and key not in known:
            yield where, f"{key} is no setting"
    for item in of_kind(objects, "ConfigMap"):
        values = {key[len(PREFIX) :].lower(): text for key, text in item.get("data", {}).items() if key in known}
        try:
            Settings(**values)
        except Exception as problem:
            yield name_of(item), str(problem)
    for pod in pods(objects):
        if pod.spec.get("enableServiceLinks") is not False:
            yield pod.owner, "gets variables of Services, of which TUNEYARD_PORT would be a setting"
