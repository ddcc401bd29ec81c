"""Each schema catches what it is there for: unknown fields, missing ones, and values of the wrong type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from k8s.check import schemas
from k8s.check.model import Object, Objects, of_kind

Break = Callable[[Object], object]
Render = Callable[[str], Objects]
CORE: dict[str, list[Break]] = {
    "Deployment": [lambda d: d["spec"].update(replicaz=1), lambda d: d["spec"].update(replicas="one")],
    "Service": [lambda d: d["spec"].update(selektor={}), lambda d: d["spec"]["ports"][0].update(port="http")],
    "NetworkPolicy": [lambda d: d["spec"].update(policyTypes="Ingress"), lambda d: d["spec"].update(egres=[])],
    "PodDisruptionBudget": [lambda d: d["spec"].update(minAvailable=[1])],
    "PersistentVolumeClaim": [lambda d: d["spec"].update(accessMode=["ReadWriteMany"])],
    "ConfigMap": [lambda d: d["data"].update(TUNEYARD_PORT=8080)],
    "Role": [lambda d: d["rules"][0].pop("verbs")],
    "RoleBinding": [lambda d: d.pop("roleRef")],
    "ServiceAccount": [lambda d: d.update(automountServiceAccountToken="no")],
    "Ingress": [lambda d: d["spec"]["rules"][0]["http"]["paths"][0].pop("pathType")],
    "Namespace": [lambda d: d["metadata"].update(label={})],
}
CUSTOM: dict[str, list[Break]] = {
    "RayCluster": [
        lambda d: d["spec"]["workerGroupSpecs"][0].update(maxReplica=1),
        lambda d: d["spec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda d: d["spec"]["workerGroupSpecs"][0].update(replicas="two"),
        lambda d: d["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(imagePolicy="Always"),
        lambda d: d["spec"]["gcsFaultToleranceOptions"].update(address="redis:6379"),
        lambda d: d["spec"]["authOptions"].update(mode="password"),
    ],
    "ClusterQueue": [
        lambda d: d["spec"].update(cohort="all"),
        lambda d: d["spec"].update(queueingStrategy="Random"),
        lambda d: d["spec"]["resourceGroups"][0].pop("flavors"),
    ],
    "LocalQueue": [lambda d: d["spec"].update(clusterqueue="x"), lambda d: d["spec"].update(stopPolicy="Later")],
    "ResourceFlavor": [lambda d: d.setdefault("spec", {}).update(nodeLabels=["x"])],
    "Topology": [lambda d: d["spec"].update(levels=[{"label": "x"}])],
    "WorkloadPriorityClass": [lambda d: d.update(value="high")],
    "ServiceMonitor": [
        lambda d: d["spec"]["endpoints"][0].update(bearerToken="x"),
        lambda d: d["spec"]["endpoints"][0].update(interval="soon"),
        lambda d: d["spec"].pop("selector"),
        lambda d: d["spec"]["endpoints"][0]["authorization"].update(type="Basic"),
    ],
    "PrometheusRule": [
        lambda d: d["spec"]["groups"][0]["rules"][0].pop("expr"),
        lambda d: d["spec"]["groups"][0]["rules"][0].update(duration="1m"),
        lambda d: d["spec"]["groups"][0]["rules"][0].update({"for": 60}),
    ],
}
PROD = "overlays/prod-kueue"


def test_every_kind_has_a_violation(rendered: Render) -> None:
    kinds = {item["kind"] for subject in (PROD, "components/autoscaler") for item in rendered(subject)}
    assert kinds == set(CORE) | set(CUSTOM)


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, some in CORE.items() for n in range(len(some))])
def test_core_schemas_catch_faults(rendered: Render, kind: str, number: int) -> None:
    item = of_kind(rendered(PROD), kind)[0]
    CORE[kind][number](item)
    versions = {finding.rule for finding in schemas.check_core(PROD, [item])}
    assert versions == {f"kubernetes-{version}" for version in schemas.VERSIONS}


def test_the_pods_of_a_ray_group_are_checked_as_pods(rendered: Render) -> None:
    (item,) = of_kind(rendered(PROD), "RayCluster")
    item["spec"]["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicie="Never")
    (finding,) = schemas.check_core(PROD, [item], ("1.33",))
    assert "restartPolicie" in finding.message


def test_a_kind_that_there_is_not_is_told(rendered: Render) -> None:
    item = of_kind(rendered(PROD), "Deployment")[0]
    item["apiVersion"] = "apps/v1beta1"
    (finding,) = schemas.check_core(PROD, [item], ("1.33",))
    assert finding.message == "there is no Deployment in apps/v1beta1"


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, some in CUSTOM.items() for n in range(len(some))])
def test_schemas_of_custom_resources_catch_faults(rendered: Render, kind: str, number: int) -> None:
    item = of_kind(rendered(PROD), kind)[0]
    CUSTOM[kind][number](item)
    found, skipped = schemas.check_custom(PROD, [item])
    if skipped:
        pytest.skip(f"no schema of {kind} in {schemas.crd_dir()}; {schemas.CRD_ENV} names another directory")
    assert found


def test_a_version_that_the_schema_has_not_is_refused(rendered: Render) -> None:
    (item,) = of_kind(rendered(PROD), "RayCluster")
    item["apiVersion"] = "ray.io/v1alpha1"
    found, skipped = schemas.check_custom(PROD, [item])
    if skipped:
        pytest.skip(f"no schema of RayCluster in {schemas.crd_dir()}")
    assert found


def test_what_has_no_schema_is_said(rendered: Render, tmp_path: Path) -> None:
    found, skipped = schemas.check_custom(PROD, rendered(PROD), tmp_path)
    assert found == []
    assert skipped == {
        "RayCluster", "ClusterQueue", "LocalQueue", "ResourceFlavor", "Topology", "WorkloadPriorityClass",
    }  # fmt: skip
