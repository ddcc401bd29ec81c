"""The RayJob of a job: what it asks for, and that it is as Kubernetes, KubeRay, Kueue and Pod Security want it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.errors import ImpossibleGangError, SpecError
from orchestrator.outside.k8s import record
from orchestrator.outside.k8s.record import RunOrder
from orchestrator.outside.k8s.system import Kubernetes
from orchestrator.outside.protocol import Order
from orchestrator.outside.record import job_of
from orchestrator.settings import Settings
from tests.builders import a_command_job, a_training_job
from tests.kubernetes.operators import misfit
from tests.kubernetes.resources import CRDS, RESOURCES, faults

Object = dict[str, Any]
VOLUME = "/var/lib/tuneyard"


def rendered(*options: str, job: Any = None, sizing: str | None = None, outside: Any = None) -> Object:
    job = job or a_command_job(2, working_dir=f"{VOLUME}/code")
    settings = Settings(home=Path("/nowhere"), outside={"k8s": outside or {}})
    text = Kubernetes(settings).render(Order((job,), (sizing,), options=options))
    (found,) = YAML(typ="safe", pure=True).load_all(text)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def worker(item: Object) -> Object:
    return item["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]  # type: ignore[no-any-return]


def head(item: Object) -> Object:
    return item["spec"]["rayClusterSpec"]["headGroupSpec"]  # type: ignore[no-any-return]


def templates(item: Object) -> Iterator[Object]:
    yield head(item)["template"]
    yield worker(item)["template"]
    yield item["spec"]["submitterPodTemplate"]


def on(accelerator: str, processes: int) -> Any:
    resources = {"num_processes": processes, "accelerator": accelerator}
    return a_command_job(working_dir=VOLUME, **{"resources": resources})  # type: ignore[arg-type]


# Rules: each returns what breaks it.


def pods_are_restricted(item: Object) -> list[str]:
    wrong = []
    for template in templates(item):
        spec = template["spec"]
        pod = spec["securityContext"]
        if pod.get("runAsNonRoot") is not True or pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            wrong.append("pod")
        if spec.get("automountServiceAccountToken") is not False:
            wrong.append("token")
        for container in spec["containers"]:
            context = container["securityContext"]
            if context.get("allowPrivilegeEscalation") is not False or context["capabilities"] != {"drop": ["ALL"]}:
                wrong.append(container["name"])
    return wrong


def requests_are_limits(item: Object) -> list[str]:
    return [
        container["name"]
        for template in templates(item)
        for container in template["spec"]["containers"]
        if container["resources"]["requests"] != container["resources"]["limits"]
    ]


def it_is_one_gang(item: Object) -> list[str]:
    group = worker(item)
    wrong = [] if group["replicas"] == group["minReplicas"] == group["maxReplicas"] else ["replicas"]
    if head(item)["rayStartParams"].get("num-cpus") != "0":
        wrong.append("the head runs ranks")
    return wrong + (["one group"] if len(item["spec"]["rayClusterSpec"]["workerGroupSpecs"]) != 1 else [])


def it_can_be_suspended(item: Object) -> list[str]:
    queued = record.QUEUE_LABEL in item["metadata"]["labels"]
    wrong = [] if item["spec"].get("suspend", False) is queued else ["suspend"]
    return wrong + ([problem] if (problem := misfit(item)) else [])


def going_away_saves(item: Object) -> list[str]:
    wrong = []
    for template, module in ((head(item)["template"], "rayjob"), (worker(item)["template"], "evacuate")):
        command = (
            template["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        )
        grace = template["spec"]["terminationGracePeriodSeconds"]
        if not command or not any(word.endswith(module) for word in command):
            wrong.append(f"no {module}")
        elif int(command[command.index("--grace") + 1]) >= grace:
            wrong.append(f"{module} takes all of the grace")
    return wrong


def shared_memory_is_there(item: Object) -> list[str]:
    wrong = []
    for template in [head(item)["template"], worker(item)["template"]]:
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        mounts = {one["mountPath"]: volumes[one["name"]] for one in template["spec"]["containers"][0]["volumeMounts"]}
        if mounts.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
            wrong.append("shm")
    return wrong


def the_order_is_found(item: Object) -> list[str]:
    template = head(item)["template"]
    (volume,) = [one for one in template["spec"]["volumes"] if one["name"] == "order"]
    path = volume["downwardAPI"]["items"][0]["fieldRef"]["fieldPath"]
    name = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)
    text = template["metadata"].get("annotations", {}).get(name[1] if name else "")
    mounted = [one["mountPath"] for one in template["spec"]["containers"][0]["volumeMounts"] if one["name"] == "order"]
    at_place = f"{mounted[0] if mounted else ''}/order.json" in item["spec"]["entrypoint"]
    return [] if text and at_place and RunOrder.model_validate_json(text) else ["order"]


Rule = Callable[[Object], list[str]]
RULES: tuple[Rule, ...] = (
    pods_are_restricted, requests_are_limits, it_is_one_gang, it_can_be_suspended, going_away_saves,
    shared_memory_is_there, the_order_is_found,
)  # fmt: skip


def first(template: Object) -> Object:
    return template["spec"]["containers"][0]  # type: ignore[no-any-return]


VIOLATIONS: tuple[tuple[Rule, Callable[[Object], object]], ...] = (
    (pods_are_restricted, lambda o: first(worker(o)["template"])["securityContext"].update(capabilities={})),
    (pods_are_restricted, lambda o: o["spec"]["submitterPodTemplate"]["spec"]["securityContext"].clear()),
    (pods_are_restricted, lambda o: head(o)["template"]["spec"].pop("automountServiceAccountToken")),
    (requests_are_limits, lambda o: first(worker(o)["template"])["resources"]["requests"].update(cpu="1m")),
    (it_is_one_gang, lambda o: worker(o).update(minReplicas=0)),
    (it_is_one_gang, lambda o: head(o)["rayStartParams"].clear()),
    (it_can_be_suspended, lambda o: o["spec"].pop("suspend")),
    (it_can_be_suspended, lambda o: o["spec"].pop("shutdownAfterJobFinishes")),
    (it_can_be_suspended, lambda o: o["metadata"].update(name="j" * 48)),
    (going_away_saves, lambda o: first(worker(o)["template"]).pop("lifecycle")),
    (going_away_saves, lambda o: head(o)["template"]["spec"].update(terminationGracePeriodSeconds=5)),
    (shared_memory_is_there, lambda o: first(worker(o)["template"])["volumeMounts"].pop()),
    (the_order_is_found, lambda o: head(o)["template"]["metadata"]["annotations"].clear()),
    (the_order_is_found, lambda o: o["spec"].update(entrypoint="python -m orchestrator.serve.rayjob /x")),
)


@pytest.mark.parametrize("options", [(), ("queue=q",), ("nodes=2", "secret=keys")], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_is_kept(rule: Rule, options: tuple[str, ...]) -> None:
    assert rule(rendered(*options)) == []


@pytest.mark.parametrize(
    ("rule", "violate"), VIOLATIONS, ids=[f"{r.__name__}-{n}" for n, (r, _) in enumerate(VIOLATIONS)]
)
def test_the_rule_catches_its_violation(rule: Rule, violate: Callable[[Object], object]) -> None:
    item = rendered("queue=q")
    violate(item)
    assert rule(item) != []


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _ in VIOLATIONS} == set(RULES)


@pytest.mark.skipif(not (CRDS / "ray.io_rayjobs.json").is_file(), reason=f"no RayJob schema in {CRDS}")
@pytest.mark.parametrize(
    ("options", "job"),
    [((), None), (("queue=q", "keep=1d", "secret=s"), None), ((), on("H100", 16))],
    ids=["plain", "queued", "gpus"],
)
def test_the_published_schema_takes_it(options: tuple[str, ...], job: Any) -> None:
    rayjob = next(one for one in RESOURCES if one.plural == "rayjobs")
    pods = next(one for one in RESOURCES if one.plural == "pods")
    item = rendered(*options, job=job)
    assert faults(rayjob, item) == []
    for template in templates(item):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        assert faults(pods, pod) == []
    broken = copy.deepcopy(item)
    broken["spec"]["shutDownAfterJobFinishes"] = True
    assert faults(rayjob, broken) != []


def test_what_gpus_are_asked_for() -> None:
    kinds = {"H100": {"gpus": 8, "cpus": 96, "memory_gb": 960.0, "selector": {"gpu": "h100"}}}
    item = rendered(job=on("H100", 16), outside={"*": {"kinds": kinds}})
    group = worker(item)
    assert (group["replicas"], group["labels"]) == (2, {"ray.io/accelerator-type": "H100"})
    limits = first(group["template"])["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("8", "96")
    assert limits["memory"] == f"{960 * 10**9 // 2**20 + 1}Mi"
    assert group["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert group["template"]["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    half = worker(rendered(job=on("H100", 4), outside={"*": {"kinds": kinds}}))
    limits = first(half["template"])["resources"]["limits"]
    assert (half["replicas"], limits["nvidia.com/gpu"], limits["cpu"]) == (1, "4", "48")
    with pytest.raises(ImpossibleGangError) as caught:
        rendered(job=on("A100", 1), outside={"*": {"kinds": kinds}})
    assert "kinds" in (caught.value.hint or "")


def test_cpu_ranks_are_rays_cpus() -> None:
    group = worker(rendered("nodes=2", job=a_command_job(4, working_dir=VOLUME)))
    assert group["rayStartParams"] == {"num-cpus": "2"}
    assert "labels" not in group
    assert "tolerations" not in group["template"]["spec"]


def test_a_run_finds_its_job_again() -> None:
    item = rendered(job=a_command_job(2, working_dir=VOLUME, queue="lab"))
    order = RunOrder.model_validate_json(head(item)["template"]["metadata"]["annotations"][record.ORDER])
    assert order.task.job_id == item["metadata"]["name"]
    assert job_of(order.task).queue == "lab"
    assert (order.nodes, order.root) == (1, VOLUME)


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (a_command_job(1, working_dir="/home/me"), "working_dir"),
        (a_training_job(1, data={"train": "/home/me/x.csv"}), "data.train"),
        (a_command_job(1, working_dir=VOLUME, after=["other-abcde"]), "after"),
    ],
)
def test_what_pods_would_not_find_is_refused(job: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        rendered(job=job)
    assert caught.value.field == field
    assert caught.value.hint


def test_a_job_that_is_too_large_is_refused() -> None:
    with pytest.raises(SpecError, match="travel with a RayJob"):
        rendered(job=a_command_job(1, working_dir=VOLUME, env={"X": "y" * 250_000}))


def test_names() -> None:
    assert record.object_name("job-abcde") == "job-abcde"
    assert record.object_name("7b-abcde") == "j-7b-abcde"
    long = record.object_name(f"{'x' * 60}-abcde-12")
    assert len(long) <= record.MAX_NAME
    assert long.endswith("x-abcde-12")
    for wrong in ("k8s:default", "k8s:../x", "k8s:a/../b", "k8s:A/b", "k8s:a/b/c"):
        with pytest.raises(Exception, match="is no id of a RayJob"):
            record.parse_id(wrong)
