"""Every overlay and component: it renders, its objects are valid, it keeps our rules, and it is what it says.

Valid means by published schemas: nothing here talks to a cluster.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k8s.check import render, schemas
from k8s.check.__main__ import main
from k8s.check.model import Object, Objects, environment, of_kind, pods
from k8s.check.policy import check_policy
from k8s.check.ray import requested
from k8s.check.references import SECRETS
from orchestrator.yard.record import RAY_WAITS

ROOT = Path(__file__).resolve().parents[3]
OVERLAYS = ["dev-cpu", "prod-gpu", "prod-kueue", "single-node"]
Render = Callable[[str], Objects]


def cluster(objects: Objects) -> Object:
    (found,) = of_kind(objects, "RayCluster")
    return found


def groups(objects: Objects) -> dict[str, Object]:
    return {group["groupName"]: group for group in cluster(objects)["spec"]["workerGroupSpecs"]}


def test_the_overlays_are_found() -> None:
    assert render.overlays() == OVERLAYS
    assert "components/autoscaler" in render.subjects()


@pytest.mark.parametrize("subject", render.subjects())
def test_it_keeps_our_rules(rendered: Render, subject: str) -> None:
    assert list(map(str, check_policy(subject, rendered(subject)))) == []


def test_core_objects_are_valid(rendered: Render) -> None:
    """Of all overlays together: what they have in common is looked at once."""
    different = {str(item): item for subject in render.subjects() for item in rendered(subject)}
    assert len(different) > 50
    assert list(map(str, schemas.check_core("all", list(different.values())))) == []


@pytest.mark.parametrize("subject", render.subjects())
def test_custom_resources_are_valid(rendered: Render, subject: str) -> None:
    found, skipped = schemas.check_custom(subject, rendered(subject))
    assert list(map(str, found)) == []
    if skipped:
        pytest.skip(
            f"no schemas of {sorted(skipped)} in {schemas.crd_dir()}; {schemas.CRD_ENV} names another directory"
        )


def test_groups_of_gpus_are_the_first_group_with_gpus(rendered: Render) -> None:
    found = groups(rendered("overlays/prod-gpu"))
    assert sorted(found) == ["cpu-workers", "gpu-rack-1", "gpu-rack-2"]
    for rack in ("rack-1", "rack-2"):
        group = found[f"gpu-{rack}"]
        template, (container,) = group["template"], group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert container["image"] == "tuneyard:0.1.0-cuda"
        assert group["labels"]["tuneyard.io/rack"] == template["spec"]["nodeSelector"]["tuneyard.io/rack"] == rack
        assert template["metadata"]["labels"]["tuneyard.io/gpu"] == "h100"
        assert {"secretRef": {"name": "tuneyard-s3"}} in container["envFrom"]
    assert "nvidia.com/gpu" not in found["cpu-workers"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_ray_is_as_patient_in_pods_as_on_plain_machines(rendered: Render) -> None:
    objects = rendered("overlays/single-node")
    (patience,) = (one for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"].startswith("tuneyard-ray"))
    assert patience["data"] == RAY_WAITS
    told = {"configMapRef": {"name": patience["metadata"]["name"]}}
    for pod in pods(objects):
        if pod.owner.startswith("RayCluster/"):
            assert told in pod.spec["containers"][0]["envFrom"]


def test_production_has_two_controllers_and_a_redis(rendered: Render) -> None:
    objects = rendered("overlays/prod-gpu")
    replicas = {item["metadata"]["name"]: item["spec"]["replicas"] for item in of_kind(objects, "Deployment")}
    assert replicas == {"tuneyard-controller": 2, "tuneyard-redis": 1}
    assert cluster(objects)["spec"]["gcsFaultToleranceOptions"]["redisAddress"] == "tuneyard-redis:6379"


def test_a_yard_to_try_is_small_and_needs_no_database_server(rendered: Render) -> None:
    objects = rendered("overlays/dev-cpu")
    total = requested(cluster(objects))
    assert total["cpu"] <= 3
    assert total["memory"] <= 16 * 2**30
    (controller,) = (pod for pod in pods(objects) if pod.owner.startswith("Deployment/"))
    variables = environment(controller.spec["containers"][0], objects)
    assert "TUNEYARD_DATABASE_URL" not in variables
    assert "TUNEYARD_TOKEN" in variables


def test_kueue_adds_to_production_and_changes_nothing(rendered: Render) -> None:
    with_kueue, without = rendered("overlays/prod-kueue"), rendered("overlays/prod-gpu")
    assert {item["kind"] for item in with_kueue} - {item["kind"] for item in without} == {
        "ClusterQueue", "LocalQueue", "ResourceFlavor", "Topology", "WorkloadPriorityClass",
    }  # fmt: skip
    assert cluster(with_kueue)["spec"] == cluster(without)["spec"]
    assert cluster(with_kueue)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tuneyard"


def test_the_autoscaler_alone_has_a_token(rendered: Render) -> None:
    spec = cluster(rendered("components/autoscaler"))["spec"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["automountServiceAccountToken"] is False
    assert "token" not in {mount["name"] for mount in head["containers"][0]["volumeMounts"]}


def test_the_page_tells_to_create_every_secret() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    for name, keys in SECRETS.items():
        assert f"`{name}`" in text, name
        for key in keys:
            assert key in text, f"{name}: {key}"


def test_the_page_names_overlays_and_components_that_there_are() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    for name in re.findall(r"k8s/((?:overlays|components)/[\w-]+)", text):
        assert (ROOT / "k8s" / name / "kustomization.yaml").is_file(), name
    for name in (*render.overlays(), *render.components()):
        assert f"`{name}`" in text, name


def test_the_command_finds_nothing_in_one_overlay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rendered: Render
) -> None:
    monkeypatch.setattr(render, "render", rendered)
    assert main(["overlays/dev-cpu"]) == 0
    assert capsys.readouterr().out.endswith("1 rendered, 0 images, 0 findings\n")


def test_the_command_tells_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rendered: Render
) -> None:
    objects = rendered("overlays/dev-cpu")
    of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["image"] = "tuneyard:latest"
    monkeypatch.setattr(render, "render", lambda _subject: objects)
    assert main(["overlays/dev-cpu"]) == 1
    told = capsys.readouterr().out
    assert "k8s/base/controller.yaml" in told
    assert "Deployment/tuneyard-controller/controller: images-have-a-tag: image 'tuneyard:latest'" in told
    assert "name a version" in told


def test_the_command_refuses_what_there_is_not() -> None:
    argv = [sys.executable, "-m", "k8s.check", "overlays/none"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no overlays/none" in done.stderr
