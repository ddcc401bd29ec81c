"""k8s/base: it renders, every object is valid, and it keeps the rules below, each of which catches its violation.

Valid means by the published schemas: nothing here talks to a cluster.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from orchestrator.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "k8s" / "base"
CRDS = Path(os.environ.get("TUNEYARD_CRD_DIR", ROOT.parent / "shared" / "schemas"))
KUBERNETES = ("1.29", "1.33", "1.37")

Object = dict[str, Any]


def parse(text: str) -> list[Object]:
    return [json.loads(json.dumps(item)) for item in YAML(typ="safe", pure=True).load_all(text) if item]


def resources() -> list[Object]:
    """What kustomization.yaml lists, in plain Python: enough for a base without generators or patches."""
    (kustomization,) = parse((BASE / "kustomization.yaml").read_text())
    objects = [item for name in kustomization["resources"] for item in parse((BASE / name).read_text())]
    for item in objects:
        if item["kind"] != "Namespace":
            item["metadata"]["namespace"] = kustomization["namespace"]
    return objects


@pytest.fixture
def base() -> list[Object]:
    return resources()


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(owner, pod template) of everything that makes pods."""
    for item in of_kind(objects, "Deployment"):
        yield item["metadata"]["name"], item["spec"]["template"]
    for item in of_kind(objects, "RayCluster"):
        yield "head", item["spec"]["headGroupSpec"]["template"]
        for group in item["spec"]["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


def containers(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for owner, template in pods(objects):
        for container in (*template["spec"].get("initContainers", []), *template["spec"]["containers"]):
            yield f"{owner}/{container['name']}", container


# The rules: each returns what breaks it.


def images_have_a_tag(objects: list[Object]) -> list[str]:
    fixed = re.compile(r"^[a-z0-9./-]+:(?!latest$)[\w.-]+$")
    return [f"{where}: {c['image']}" for where, c in containers(objects) if not fixed.match(c["image"])]


def resources_are_bounded(objects: list[Object]) -> list[str]:
    return [
        f"{where}: no {side}.{name}"
        for where, c in containers(objects)
        for side in ("requests", "limits")
        for name in ("cpu", "memory")
        if name not in c.get("resources", {}).get(side, {})
    ]


def pods_are_not_root(objects: list[Object]) -> list[str]:
    def fine(context: Object) -> bool:
        profile = context.get("seccompProfile", {}).get("type")
        return context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0 and profile == "RuntimeDefault"

    return [owner for owner, template in pods(objects) if not fine(template["spec"].get("securityContext", {}))]


def containers_are_locked_down(objects: list[Object]) -> list[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return [where for where, c in containers(objects) if c.get("securityContext") != wanted]


def hosts_are_out_of_reach(objects: list[Object]) -> list[str]:
    return [
        owner
        for owner, template in pods(objects)
        if any(template["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        or any("hostPath" in volume for volume in template["spec"]["volumes"])
    ]


def containers_are_probed(objects: list[Object]) -> list[str]:
    kinds = ("readinessProbe", "livenessProbe")
    return [f"{where}: no {kind}" for where, c in containers(objects) for kind in kinds if kind not in c]


def temporary_files_have_room(objects: list[Object]) -> list[str]:
    """The root is read-only, so /tmp is a volume; Ray's object store needs shared memory."""
    wrong = []
    for owner, template in pods(objects):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in template["spec"]["containers"][0]["volumeMounts"]}
        if "emptyDir" not in mounts.get("/tmp", {}):
            wrong.append(f"{owner}: /tmp")
        ray = template["metadata"]["labels"]["app.kubernetes.io/name"] == "tuneyard-ray"
        if ray and mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
            wrong.append(f"{owner}: /dev/shm")
    return wrong


def rights_are_listed(objects: list[Object]) -> list[str]:
    wide = [item["metadata"]["name"] for item in objects if item["kind"].startswith("ClusterRole")]
    for item in of_kind(objects, "Role"):
        for rule in item["rules"]:
            named = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            if "*" in named or "secrets" in rule["resources"]:
                wide.append(item["metadata"]["name"])
    return wide


def tokens_are_not_mounted(objects: list[Object]) -> list[str]:
    accounts = [(item["metadata"]["name"], item) for item in of_kind(objects, "ServiceAccount")]
    specs = [(owner, template["spec"]) for owner, template in pods(objects)]
    return [name for name, item in (*accounts, *specs) if item.get("automountServiceAccountToken") is not False]


def secrets_are_referred_to(objects: list[Object]) -> list[str]:
    """No Secret object, and no secret's value where a name is expected."""
    secret = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|DATABASE_URL|_KEY$")
    wrong = [item["metadata"]["name"] for item in of_kind(objects, "Secret")]
    wrong += [key for item in of_kind(objects, "ConfigMap") for key in item["data"] if secret.search(key)]
    return wrong + [
        f"{where}: {variable['name']}"
        for where, c in containers(objects)
        for variable in c.get("env", [])
        if secret.search(variable["name"]) and "value" in variable
    ]


def network_is_closed(objects: list[Object]) -> list[str]:
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        if spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}:
            return []
    return ["no policy denies everything by default"]


def settings_exist(objects: list[Object]) -> list[str]:
    """Every TUNEYARD_ variable is a setting, and no Service's variables can be mistaken for one."""
    given = [key for item in of_kind(objects, "ConfigMap") for key in item["data"]]
    given += [variable["name"] for _, c in containers(objects) for variable in c.get("env", [])]
    known = {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields}
    wrong = [key for key in given if key.startswith("TUNEYARD_") and key not in known]
    return wrong + [owner for owner, t in pods(objects) if t["spec"].get("enableServiceLinks") is not False]


def references_resolve(objects: list[Object]) -> list[str]:
    """Selectors find pods; claims, settings and accounts that pods name are in the base."""
    have = {(item["kind"], item["metadata"]["name"]) for item in objects}
    wanted: set[tuple[str, str]] = set()
    for _, template in pods(objects):
        wanted.add(("ServiceAccount", template["spec"]["serviceAccountName"]))
        for volume in template["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for _, container in containers(objects):
        wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
    wrong = [f"{kind} {name}" for kind, name in sorted(wanted - have)]
    labels = [template["metadata"]["labels"] for _, template in pods(objects)]
    for service in of_kind(objects, "Service"):
        if not any(service["spec"]["selector"].items() <= each.items() for each in labels):
            wrong.append(f"Service {service['metadata']['name']} selects nothing")
    return wrong


def ray_groups_are_fixed(objects: list[Object]) -> list[str]:
    """Without an autoscaler a group has one size; names become DNS labels; the head runs no ranks."""
    wrong = []
    for item in of_kind(objects, "RayCluster"):
        spec = item["spec"]
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            wrong.append("head: num-cpus")
        for name in (item["metadata"]["name"], *(group["groupName"] for group in spec["workerGroupSpecs"])):
            if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
                wrong.append(f"{name}: not a DNS-1035 label")
        for group in spec["workerGroupSpecs"]:
            if not group["replicas"] == group["minReplicas"] == group["maxReplicas"]:
                wrong.append(f"{group['groupName']}: replicas")
    return wrong


RULES: tuple[Callable[[list[Object]], list[str]], ...] = (
    images_have_a_tag, resources_are_bounded, pods_are_not_root, containers_are_locked_down, hosts_are_out_of_reach,
    containers_are_probed, temporary_files_have_room, rights_are_listed, tokens_are_not_mounted,
    secrets_are_referred_to, network_is_closed, settings_exist, references_resolve, ray_groups_are_fixed,
)  # fmt: skip


def container(objects: list[Object]) -> Object:
    return of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]


def pod(objects: list[Object]) -> Object:
    return of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]


def worker(objects: list[Object]) -> Object:
    return of_kind(objects, "RayCluster")[0]["spec"]["workerGroupSpecs"][0]


SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "leaked"}}
VIOLATIONS: tuple[tuple[Callable[[list[Object]], list[str]], Callable[[list[Object]], object]], ...] = (
    (images_have_a_tag, lambda o: container(o).update(image="tuneyard:latest")),
    (images_have_a_tag, lambda o: worker(o)["template"]["spec"]["containers"][0].update(image="tuneyard")),
    (resources_are_bounded, lambda o: container(o)["resources"]["limits"].pop("memory")),
    (resources_are_bounded, lambda o: worker(o)["template"]["spec"]["containers"][0].pop("resources")),
    (pods_are_not_root, lambda o: pod(o)["securityContext"].update(runAsUser=0)),
    (pods_are_not_root, lambda o: worker(o)["template"]["spec"]["securityContext"].pop("runAsNonRoot")),
    (pods_are_not_root, lambda o: pod(o)["securityContext"].pop("seccompProfile")),
    (containers_are_locked_down, lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    (containers_are_locked_down, lambda o: container(o)["securityContext"].update(privileged=True)),
    (containers_are_locked_down, lambda o: container(o)["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
    (hosts_are_out_of_reach, lambda o: pod(o).update(hostNetwork=True)),
    (hosts_are_out_of_reach, lambda o: pod(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
    (containers_are_probed, lambda o: container(o).pop("livenessProbe")),
    (containers_are_probed, lambda o: worker(o)["template"]["spec"]["containers"][0].pop("readinessProbe")),
    (temporary_files_have_room, lambda o: container(o)["volumeMounts"].pop()),
    (temporary_files_have_room, lambda o: worker(o)["template"]["spec"]["volumes"][-1].update(emptyDir={})),
    (rights_are_listed, lambda o: of_kind(o, "Role")[0]["rules"][0].update(verbs=["*"])),
    (rights_are_listed, lambda o: of_kind(o, "Role")[0]["rules"][0].update(resources=["secrets"])),
    (rights_are_listed, lambda o: of_kind(o, "Role")[0].update(kind="ClusterRole")),
    (tokens_are_not_mounted, lambda o: pod(o).pop("automountServiceAccountToken")),
    (secrets_are_referred_to, lambda o: o.append(SECRET)),
    (secrets_are_referred_to, lambda o: of_kind(o, "ConfigMap")[0]["data"].update(TUNEYARD_TOKEN="x")),
    (secrets_are_referred_to, lambda o: container(o)["env"].append({"name": "DB_PASSWORD", "value": "x"})),
    (network_is_closed, lambda o: of_kind(o, "NetworkPolicy")[0]["spec"].update(egress=[{}])),
    (settings_exist, lambda o: of_kind(o, "ConfigMap")[0]["data"].update(TUNEYARD_LEESH="1")),
    (settings_exist, lambda o: pod(o).pop("enableServiceLinks")),
    (references_resolve, lambda o: of_kind(o, "PersistentVolumeClaim")[0]["metadata"].update(name="other")),
    (references_resolve, lambda o: of_kind(o, "Service")[0]["spec"]["selector"].update(tier="none")),
    (ray_groups_are_fixed, lambda o: worker(o).update(maxReplicas=9)),
    (ray_groups_are_fixed, lambda o: worker(o).update(groupName="2cpu")),
    (ray_groups_are_fixed, lambda o: of_kind(o, "RayCluster")[0]["spec"]["headGroupSpec"].update(rayStartParams={})),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_base_keeps_the_rule(base: list[Object], rule: Callable[[list[Object]], list[str]]) -> None:
    assert rule(base) == []


@pytest.mark.parametrize(
    ("rule", "violate"), VIOLATIONS, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(VIOLATIONS)]
)
def test_rule_catches_its_violation(
    base: list[Object],
    rule: Callable[[list[Object]], list[str]],
    violate: Callable[[list[Object]], object],
) -> None:
    violate(base)
    assert rule(base) != []


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _ in VIOLATIONS} == set(RULES)


def test_kubectl_renders_what_the_files_say(base: list[Object]) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def name(item: Object) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    assert sorted(parse(done.stdout), key=name) == sorted(base, key=name)


def core(objects: list[Object]) -> list[Object]:
    """Objects of Kubernetes itself, and each Ray pod template as the Pod it becomes."""
    mine = [item for item in objects if item["kind"] != "RayCluster"]
    for owner, template in pods(of_kind(objects, "RayCluster")):
        mine.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": owner}, "spec": template["spec"]})
    return mine


@pytest.mark.parametrize("version", KUBERNETES)
def test_core_objects_are_valid(base: list[Object], version: str) -> None:
    for item in core(base):
        assert kubernetes_validate.validate(item, version, strict=True) == version


@pytest.mark.parametrize("version", KUBERNETES)
def test_validation_catches_unknown_field_and_wrong_type(base: list[Object], version: str) -> None:
    for change in ({"replicaz": 1}, {"replicas": "one"}):
        wrong = copy.deepcopy(of_kind(base, "Deployment")[0])
        wrong["spec"].update(change)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


def closed(schema: Any) -> Any:
    """A CRD's schema with unknown fields refused, which the API server would drop."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="session")
def ray_cluster() -> jsonschema.Draft202012Validator:
    path = CRDS / "ray.io_rayclusters.json"
    if not path.is_file():
        pytest.skip(f"no RayCluster schema in {CRDS}; TUNEYARD_CRD_DIR names another directory")
    (version,) = (item for item in json.loads(path.read_text())["spec"]["versions"] if item["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def test_ray_cluster_is_valid(base: list[Object], ray_cluster: jsonschema.Draft202012Validator) -> None:
    (item,) = of_kind(base, "RayCluster")
    assert [f"{e.json_path}: {e.message}" for e in ray_cluster.iter_errors(item)] == []


@pytest.mark.parametrize(
    "violate",
    [
        lambda o: worker(o).update(maxReplica=1),
        lambda o: worker(o).pop("groupName"),
        lambda o: worker(o)["template"]["spec"]["containers"][0].update(imagePolicy="Always"),
        lambda o: worker(o).update(replicas="two"),
    ],
    ids=["unknown", "missing", "unknown-in-pod", "wrong-type"],
)
def test_ray_schema_catches_faults(
    base: list[Object],
    ray_cluster: jsonschema.Draft202012Validator,
    violate: Callable[[list[Object]], object],
) -> None:
    violate(base)
    assert not ray_cluster.is_valid(of_kind(base, "RayCluster")[0])
