"""Each rule catches its violations: of every one there is an example here."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from k8s.check.model import RULES, Object, Objects, of_kind, quantity, selects
from k8s.check.policy import check_policy

PROD, DEV, SCALED = "overlays/prod-kueue", "overlays/dev-cpu", "components/autoscaler"
FLEET = "components/fleet"
Render = Callable[[str], Objects]


def the(o: Objects, kind: str, name: str | None = None) -> Object:
    return next(item for item in of_kind(o, kind) if name in (None, item["metadata"]["name"]))


def controller(o: Objects) -> Object:
    return the(o, "Deployment", "tuneyard-controller")


def pod(o: Objects) -> Object:
    found: Object = controller(o)["spec"]["template"]["spec"]
    return found


def container(o: Objects) -> Object:
    found: Object = pod(o)["containers"][0]
    return found


def ray(o: Objects) -> Object:
    found: Object = the(o, "RayCluster")["spec"]
    return found


def head(o: Objects) -> Object:
    found: Object = ray(o)["headGroupSpec"]
    return found


def worker(o: Objects, index: int = 0) -> Object:
    found: Object = ray(o)["workerGroupSpecs"][index]
    return found


def ranks(o: Objects, index: int = 0) -> Object:
    found: Object = worker(o, index)["template"]["spec"]["containers"][0]
    return found


def redis(o: Objects) -> Object:
    found: Object = ray(o)["gcsFaultToleranceOptions"]
    return found


def policy(o: Objects, name: str) -> Object:
    found: Object = the(o, "NetworkPolicy", name)["spec"]
    return found


def settings(o: Objects) -> Object:
    found: Object = the(o, "ConfigMap", "tuneyard-settings")["data"]
    return found


def flavor(o: Objects) -> Object:
    return the(o, "ResourceFlavor", "tuneyard-gpu")


def budget(o: Objects) -> Object:
    found: Object = the(o, "PodDisruptionBudget", "tuneyard-controller")["spec"]
    return found


def quota(o: Objects) -> Object:
    found: Object = the(o, "ClusterQueue")["spec"]["resourceGroups"][0]
    return found


def alerts(o: Objects) -> list[Object]:
    found: list[Object] = the(o, "PrometheusRule")["spec"]["groups"][0]["rules"]
    return found


def board(o: Objects, change: Callable[[Object], object]) -> None:
    data = the(o, "ConfigMap", "tuneyard-dashboard")["data"]
    text = json.loads(data["tuneyard.json"])
    change(text)
    data["tuneyard.json"] = json.dumps(text)


def mount_token(o: Objects) -> None:
    mount = {"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    head(o)["template"]["spec"]["containers"][0]["volumeMounts"].append(mount)


def grace(o: Objects, seconds: str) -> None:
    ranks(o)["lifecycle"]["preStop"]["exec"]["command"][-1] = seconds


def variable(found: Object, name: str) -> Object:
    return next(one for one in found["env"] if one["name"] == name)


def drop(found: Object, name: str) -> None:
    found["env"].remove(variable(found, name))


def secret_key(o: Objects, key: str) -> None:
    variable(container(o), "TUNEYARD_TOKEN")["valueFrom"]["secretKeyRef"].update(key=key)


def select(o: Objects, kind: str, name: str) -> None:
    spec = the(o, kind, name)["spec"]
    spec.get("selector", spec.get("podSelector"))["matchLabels"].update(x="y")


SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "leaked"}}
RAY_JOB = {
    "apiVersion": "ray.io/v1", "kind": "RayJob",
    "metadata": {"name": "job", "labels": {"kueue.x-k8s.io/queue-name": "tuneyard"}}, "spec": {},
}  # fmt: skip
ELSEWHERE = {"name": "RAY_REDIS_ADDRESS", "value": "x:1"}
Break = Callable[[Objects], object]
VIOLATIONS: tuple[tuple[str, str, Break], ...] = (
    ("images-have-a-tag", DEV, lambda o: container(o).update(image="tuneyard:latest")),
    ("images-have-a-tag", DEV, lambda o: ranks(o).update(image="tuneyard")),
    ("images-have-a-tag", SCALED, lambda o: ray(o)["autoscalerOptions"].pop("image")),
    ("resources-are-bounded", DEV, lambda o: container(o)["resources"]["limits"].pop("memory")),
    ("resources-are-bounded", DEV, lambda o: ranks(o).pop("resources")),
    ("resources-are-bounded", SCALED, lambda o: ray(o)["autoscalerOptions"]["resources"].pop("requests")),
    ("pods-are-not-root", DEV, lambda o: pod(o)["securityContext"].update(runAsUser=0)),
    ("pods-are-not-root", DEV, lambda o: worker(o)["template"]["spec"]["securityContext"].pop("runAsNonRoot")),
    ("pods-are-not-root", DEV, lambda o: pod(o)["securityContext"].pop("seccompProfile")),
    ("containers-are-locked-down", DEV, lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False)),
    ("containers-are-locked-down", DEV, lambda o: container(o)["securityContext"].update(privileged=True)),
    ("containers-are-locked-down", DEV, lambda o: ranks(o)["securityContext"]["capabilities"].update(add=["ALL"])),
    ("hosts-are-out-of-reach", DEV, lambda o: pod(o).update(hostNetwork=True)),
    ("hosts-are-out-of-reach", DEV, lambda o: pod(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
    ("containers-are-probed", DEV, lambda o: container(o).pop("livenessProbe")),
    ("containers-are-probed", DEV, lambda o: ranks(o).pop("readinessProbe")),
    ("temporary-files-have-room", DEV, lambda o: container(o)["volumeMounts"].pop()),
    ("temporary-files-have-room", DEV, lambda o: worker(o)["template"]["spec"]["volumes"][-1].update(emptyDir={})),
    ("disks-have-one-pod", DEV, lambda o: controller(o)["spec"].update(replicas=2)),
    ("disks-have-one-pod", PROD, lambda o: the(o, "Deployment", "tuneyard-redis")["spec"].pop("strategy")),
    ("namespace-is-restricted", DEV, lambda o: the(o, "Namespace")["metadata"]["labels"].clear()),
    ("namespace-is-restricted", DEV, lambda o: controller(o)["metadata"].update(namespace="default")),
    ("namespace-is-restricted", DEV, lambda o: controller(o)["metadata"].pop("namespace")),
    ("namespace-is-restricted", PROD, lambda o: the(o, "ClusterQueue")["metadata"].update(namespace="tuneyard")),
    ("rights-are-listed", DEV, lambda o: the(o, "Role")["rules"][0].update(verbs=["*"])),
    ("rights-are-listed", DEV, lambda o: the(o, "Role")["rules"][0].update(resources=["secrets"])),
    ("rights-are-listed", DEV, lambda o: the(o, "Role").update(kind="ClusterRole")),
    ("changes-are-of-named-objects", SCALED, lambda o: the(o, "Role", "yard")["rules"][1].pop("resourceNames")),
    ("tokens-are-not-mounted", DEV, lambda o: pod(o).pop("automountServiceAccountToken")),
    ("tokens-are-not-mounted", DEV, lambda o: the(o, "ServiceAccount").pop("automountServiceAccountToken")),
    ("tokens-are-not-mounted", SCALED, lambda o: the(o, "RoleBinding", "yard")["subjects"].clear()),
    ("jobs-find-no-token", SCALED, mount_token),
    ("secrets-are-referred-to", DEV, lambda o: o.append(SECRET)),
    ("secrets-are-referred-to", DEV, lambda o: settings(o).update(TUNEYARD_TOKEN="x")),
    ("secrets-are-referred-to", DEV, lambda o: container(o)["env"].append({"name": "DB_PASSWORD", "value": "x"})),
    ("network-is-closed", DEV, lambda o: policy(o, "default-deny").update(egress=[{}])),
    ("network-is-closed", DEV, lambda o: policy(o, "names")["egress"].append({})),
    ("network-is-closed", DEV, lambda o: policy(o, "controller")["ingress"][0].pop("from")),
    ("settings-exist", DEV, lambda o: settings(o).update(TUNEYARD_LEESH="1")),
    ("settings-exist", DEV, lambda o: settings(o).update(TUNEYARD_LEASH="soon")),
    ("settings-exist", DEV, lambda o: pod(o).pop("enableServiceLinks")),
    ("references-resolve", DEV, lambda o: the(o, "PersistentVolumeClaim")["metadata"].update(name="other")),
    ("references-resolve", DEV, lambda o: the(o, "ConfigMap", "tuneyard-collectives")["metadata"].update(name="other")),
    ("references-resolve", DEV, lambda o: pod(o).update(serviceAccountName="other")),
    ("references-resolve", DEV, lambda o: container(o)["volumeMounts"][0].update(name="other")),
    ("references-resolve", DEV, lambda o: the(o, "RoleBinding")["roleRef"].update(name="other")),
    ("references-resolve", DEV, lambda o: the(o, "RoleBinding")["subjects"][0].update(namespace="other")),
    ("references-resolve", DEV, lambda o: the(o, "Role")["rules"][0].update(resourceNames=["other"])),
    ("secrets-are-known", DEV, lambda o: secret_key(o, "other")),
    ("secrets-are-known", PROD, lambda o: ranks(o)["envFrom"][-1]["secretRef"].update(name="other")),
    ("secrets-are-known", PROD, lambda o: the(o, "Ingress")["spec"]["tls"][0].update(secretName="other")),
    ("secrets-are-known", DEV, lambda o: ray(o)["authOptions"].update(secretName="other")),
    ("selectors-find-something", DEV, lambda o: the(o, "Service")["spec"]["selector"].update(tier="none")),
    ("selectors-find-something", DEV, lambda o: the(o, "Service")["spec"]["ports"][0].update(targetPort="other")),
    ("selectors-find-something", PROD, lambda o: select(o, "PodDisruptionBudget", "gpu-h100")),
    ("selectors-find-something", DEV, lambda o: select(o, "NetworkPolicy", "controller")),
    ("selectors-find-something", PROD, lambda o: the(o, "ServiceMonitor")["spec"]["endpoints"][0].update(port="other")),
    ("services-are-there", PROD, lambda o: redis(o).update(redisAddress="redis:6379")),
    ("services-are-there", DEV, lambda o: container(o).update(args=["--address", "ray://other-head-svc:10001"])),
    ("services-are-there", PROD, lambda o: the(o, "Service", "tuneyard")["metadata"].update(name="other")),
    ("ray-names-are-labels", DEV, lambda o: worker(o).update(groupName="2cpu")),
    ("ray-names-are-labels", DEV, lambda o: head(o)["rayStartParams"].pop("num-cpus")),
    ("ray-names-are-labels", PROD, lambda o: worker(o, 1).update(groupName="cpu-workers")),
    ("ray-groups-have-a-size", DEV, lambda o: worker(o).update(maxReplicas=9)),
    ("ray-groups-have-a-size", DEV, lambda o: worker(o).pop("replicas")),
    ("ray-groups-have-a-size", SCALED, lambda o: worker(o).update(replicas=99)),
    ("ray-groups-have-a-size", FLEET, lambda o: worker(o).update(replicas=99)),
    ("ray-groups-have-a-size", FLEET, lambda o: settings(o).pop("TUNEYARD_FLEET")),
    ("fleets-may-move", FLEET, lambda o: settings(o).update(TUNEYARD_FLEET="tuneyard/other")),
    ("fleets-may-move", FLEET, lambda o: worker(o).update(minReplicas=2, maxReplicas=2)),
    ("fleets-may-move", FLEET, lambda o: ray(o).update(enableInTreeAutoscaling=True)),
    ("fleets-may-move", FLEET, lambda o: the(o, "Role", "tuneyard-controller")["rules"][0]["verbs"].remove("patch")),
    ("fleets-may-move", PROD, lambda o: settings(o).update(TUNEYARD_FLEET="tuneyard/yard")),
    ("autoscaler-is-v2", SCALED, lambda o: ray(o)["autoscalerOptions"].update(version="v1")),
    ("autoscaler-is-v2", SCALED, lambda o: worker(o)["template"]["spec"].update(restartPolicy="Always")),
    ("autoscaler-is-v2", SCALED, lambda o: head(o)["template"]["spec"].pop("restartPolicy")),
    ("autoscaler-is-v2", SCALED, lambda o: ray(o).update(enableInTreeAutoscaling=False)),
    ("autoscaler-is-v2", PROD, lambda o: ray(o).update(enableInTreeAutoscaling=True)),
    ("ray-asks-for-a-token", DEV, lambda o: ray(o).pop("authOptions")),
    ("ray-asks-for-a-token", DEV, lambda o: drop(container(o), "RAY_AUTH_TOKEN")),
    ("redis-has-a-password", PROD, lambda o: redis(o).pop("redisPassword")),
    ("redis-has-a-password", PROD, lambda o: redis(o).update(redisPassword={"value": "x"})),
    ("redis-has-a-password", PROD, lambda o: redis(o).pop("externalStorageNamespace")),
    ("redis-has-a-password", PROD, lambda o: head(o)["template"]["spec"]["containers"][0]["env"].append(ELSEWHERE)),
    ("ray-groups-are-alike", PROD, lambda o: ranks(o, 1)["envFrom"].pop()),
    ("racks-are-where-they-say", PROD, lambda o: worker(o, 1)["labels"].update({"tuneyard.io/rack": "rack-9"})),
    ("racks-are-where-they-say", PROD, lambda o: worker(o, 1)["template"]["spec"].pop("nodeSelector")),
    ("racks-are-where-they-say", DEV, lambda o: worker(o)["rayStartParams"].update(labels="tuneyard.io/rack=r1")),
    ("drains-save", DEV, lambda o: ranks(o).pop("lifecycle")),
    ("drains-save", DEV, lambda o: grace(o, "120")),
    ("drains-save", DEV, lambda o: drop(ranks(o), "TUNEYARD_HOME")),
    ("budgets-let-go", DEV, lambda o: the(o, "PodDisruptionBudget")["spec"].update(minAvailable=2)),
    ("budgets-let-go", DEV, lambda o: the(o, "PodDisruptionBudget")["spec"].update(minAvailable="50%")),
    ("budgets-let-go", PROD, lambda o: budget(o).update(maxUnavailable=0)),
    ("controllers-share-a-database", PROD, lambda o: drop(container(o), "TUNEYARD_DATABASE_URL")),
    ("controllers-share-a-database", PROD, lambda o: controller(o)["spec"].update(strategy={"type": "Recreate"})),
    ("controllers-share-a-database", PROD, lambda o: o.remove(the(o, "PodDisruptionBudget", "tuneyard-controller"))),
    ("kueue-names-resolve", PROD, lambda o: the(o, "LocalQueue")["metadata"].update(name="other")),
    ("kueue-names-resolve", PROD, lambda o: the(o, "LocalQueue")["spec"].update(clusterQueue="other")),
    ("kueue-names-resolve", PROD, lambda o: flavor(o)["spec"].update(topologyName="other")),
    ("kueue-names-resolve", PROD, lambda o: flavor(o)["spec"].pop("nodeLabels")),
    ("kueue-names-resolve", PROD, lambda o: flavor(o)["metadata"].update(name="other")),
    ("kueue-names-resolve", PROD, lambda o: the(o, "WorkloadPriorityClass")["metadata"].update(name="other")),
    ("kueue-names-resolve", PROD, lambda o: ray(o).update(suspend=True)),
    ("kueue-names-resolve", PROD, lambda o: o.append(RAY_JOB)),
    ("kueue-names-resolve", PROD, lambda o: quota(o)["coveredResources"].reverse()),
    ("kueue-quota-holds-the-cluster", PROD, lambda o: worker(o, 1).update(replicas=9)),
    ("metrics-exist", PROD, lambda o: alerts(o)[0].update(expr="tuneyard_controler_acting < 1")),
    ("metrics-exist", PROD, lambda o: alerts(o)[0].update(expr='tuneyard_jobs{stat="queued"} > 1')),
    ("metrics-exist", PROD, lambda o: alerts(o)[0].update(expr="sum by (tenant) (tuneyard_jobs) > 1")),
    ("metrics-exist", PROD, lambda o: alerts(o)[0].update(expr="up == 0")),
    ("metrics-exist", PROD, lambda o: board(o, lambda b: b["panels"][0]["targets"][0].update(expr="tuneyard_nothing"))),
    ("alerts-say-what-they-are", PROD, lambda o: alerts(o)[0]["labels"].clear()),
    ("alerts-say-what-they-are", PROD, lambda o: alerts(o)[0]["annotations"].pop("summary")),
    ("alerts-say-what-they-are", PROD, lambda o: alerts(o).append(alerts(o)[0])),
    ("dashboards-are-readable", PROD, lambda o: board(o, lambda b: b.pop("uid"))),
    ("dashboards-are-readable", PROD, lambda o: board(o, lambda b: b["panels"][1].update(id=1))),
    ("dashboards-are-readable", PROD, lambda o: board(o, lambda b: b["panels"][1].update(targets=[]))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "subject", "violate"), VIOLATIONS, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(VIOLATIONS)]
)
def test_rule_catches_its_violation(rendered: Render, name: str, subject: str, violate: Break) -> None:
    objects = rendered(subject)
    violate(objects)
    found = [finding for finding in check_policy(subject, objects) if finding.rule == name]
    assert found
    assert all(finding.remedy and finding.message and finding.object for finding in found)


def test_every_rule_has_a_violation() -> None:
    assert {name for name, _, _ in VIOLATIONS} == {rule.name for rule in RULES}
    assert len(RULES) == len({rule.name for rule in RULES}) > 25


@pytest.mark.parametrize(("text", "number"), [("500m", 0.5), ("2", 2), (3, 3), ("16Gi", 2**34), ("1.5Ti", 1.5 * 2**40)])
def test_quantities_are_numbers(text: str | int, number: float) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["", "Gi", "1Zi", "-1", "1 Gi"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        quantity(text)


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["0", "1"]}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "In", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_selectors_take_labels(selector: Object, fits: bool) -> None:
    assert selects(selector, {"a": "1"}) is fits
