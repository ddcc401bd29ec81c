"""Jobs handed over to an emulated Kubernetes API server, by its unmodified client: no cluster has run any of this."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConflictError, NotFoundError, SpecError, YardError
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.outside.k8s import record
from orchestrator.outside.k8s.system import Kubernetes
from orchestrator.outside.protocol import Order
from orchestrator.outside.record import Status
from orchestrator.settings import Settings
from tests.builders import a_command_job
from tests.kubernetes.cluster import Cluster, beyond, rules_of, unused
from tests.kubernetes.operators import Operators
from tests.kubernetes.resources import CRDS, ROOT

QUEUED = ("queue=research",)
USERS = rules_of(ROOT / "k8s" / "users")


def asked_by_verbs(cluster: Cluster) -> list[Any]:
    return [one for one in cluster.asked("OpenAPI-Generator") if one["resource"] != "rayclusters"]


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Kubernetes]:
    """The backend; whatever a test has it ask of the server, the users' Role allows."""
    yield Kubernetes(Settings(home=tmp_path / "home"))
    assert beyond(asked_by_verbs(cluster), USERS) == []


@pytest.fixture
def operators(cluster: Cluster) -> Operators:
    return Operators(cluster)


def order(tmp_path: Path, *options: str, processes: int = 2, **keys: Any) -> Order:
    """A job whose directory is on the volume, which lies in the test's own."""
    volume = tmp_path / "volume"
    volume.mkdir(exist_ok=True)
    job = a_command_job(processes, working_dir=str(volume), **keys)
    return Order((job,), (None,), options=(f"mount={volume}", *options))


def tell(place: Kubernetes, job_id: str, tmp_path: Path, **changes: Any) -> None:
    """What a run of the job would write to the volume."""
    view = place.job(job_id).model_copy(update=changes)
    files = record.Files(tmp_path / "volume", job_id.rpartition("/")[2])
    files.folder.mkdir(parents=True, exist_ok=True)
    files.status.write_text(Status(job=view).model_dump_json())


def test_a_job_from_its_submit_to_its_end(
    place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path
) -> None:
    (view,) = place.submit(order(tmp_path, "nodes=2"))
    assert view.id.startswith("k8s:default/job-")
    assert view.state == JobState.STARTING
    name = view.id.rpartition("/")[2]
    operators.step()
    assert "pods" in place.job(view.id).reason.sentence
    operators.settle()
    view = place.job(view.id)
    assert (view.state, view.reason.code) == (JobState.RUNNING, ReasonCode.RUNNING)
    assert len(cluster.find("pods", f"{record.JOB_LABEL}={name}")) == 4  # head, two workers, submitter
    operators.running[name].code = 0
    operators.settle()
    assert place.job(view.id).state == JobState.SUCCEEDED
    assert cluster.find("rayclusters") == []
    cluster.delete("rayjobs", name)  # what has ended is told although it is gone
    assert place.job(view.id).state == JobState.SUCCEEDED
    assert [one.id for one in place.jobs()] == [view.id]


def test_kueue_lets_it_in_takes_it_out_and_lets_it_in_again(
    place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path
) -> None:
    (view,) = place.submit(order(tmp_path, *QUEUED, "priority_class=high"))
    name = view.id.rpartition("/")[2]
    assert cluster.get("rayjobs", name)["spec"]["suspend"] is True  # type: ignore[index]
    assert "Kueue has not looked at it yet" in place.job(view.id).reason.sentence
    operators.pods_quota = 0
    operators.step()
    waiting = place.job(view.id)
    assert (waiting.state, waiting.reason.code) == (JobState.QUEUED, ReasonCode.OVER_QUOTA)
    assert "insufficient quota for pods: 3 asked, 0 unused" in waiting.reason.sentence
    operators.pods_quota = 100
    operators.settle()
    assert place.job(view.id).state == JobState.RUNNING
    first = cluster.find("rayclusters")[0]["metadata"]["name"]
    operators.pods_quota = 0
    operators.preempt(name)
    operators.step()
    leaving = place.job(view.id)
    assert (leaving.state, leaving.reason.code) == (JobState.STOPPING, ReasonCode.PREEMPTED)
    assert "Preempted" in leaving.reason.sentence
    operators.settle()
    assert cluster.find("pods", "ray.io/node-type") == []
    out = place.job(view.id)
    assert (out.state, out.reason.code) == (JobState.QUEUED, ReasonCode.PREEMPTED)
    operators.pods_quota = 100
    operators.settle()
    assert place.job(view.id).state == JobState.RUNNING
    assert cluster.find("rayclusters")[0]["metadata"]["name"] != first


def test_what_its_run_tells_is_told(place: Kubernetes, operators: Operators, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    operators.settle()
    reason = view.reason.model_copy(update={"code": ReasonCode.BACKING_OFF, "sentence": "waits a moment"})
    tell(place, view.id, tmp_path, state=JobState.QUEUED, reason=reason, attempts=1)
    told = place.job(view.id)
    assert (told.state, told.reason.sentence, told.attempts) == (JobState.QUEUED, "waits a moment", 1)
    tell(place, view.id, tmp_path, state=JobState.PAUSED, attempts=1)
    assert place.job(view.id).state == JobState.STARTING  # that was the run before
    tell(place, view.id, tmp_path, state=JobState.FAILED, attempts=2)
    assert place.job(view.id).state == JobState.FAILED


def hook_of(pod: Any) -> list[str]:
    command: list[str] = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    return command


def test_an_eviction_of_a_worker_and_of_the_head(
    place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path
) -> None:
    stopped: list[str] = []
    operators.before_stop = lambda pod: stopped.append(
        pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    )
    (view,) = place.submit(order(tmp_path, "restarts=1"))
    name = view.id.rpartition("/")[2]
    operators.settle()
    worker = cluster.find("pods", "ray.io/node-type=worker")[0]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": worker}}
    cluster.ask("POST", cluster.path("pods", worker, "eviction"), eviction)
    operators.settle()
    assert stopped == ["orchestrator.execute.evacuate"]
    assert len(cluster.find("pods", "ray.io/node-type=worker")) == 1
    for _ in range(2):
        head = cluster.find("pods", "ray.io/node-type=head")[0]["metadata"]["name"]
        cluster.ask("POST", cluster.path("pods", head, "eviction"), {**eviction, "metadata": {"name": head}})
        operators.step()
        lost = place.job(view.id)
        if _ == 0:
            assert (lost.state, "lost 1 time" in lost.reason.sentence) == (JobState.STARTING, True)
        operators.settle()
    assert "orchestrator.serve.rayjob" in stopped
    failed = place.job(view.id)
    assert (failed.state, "AppFailed" in failed.reason.sentence) == (JobState.FAILED, True)
    assert cluster.get("rayjobs", name)["status"]["failed"] == 2  # type: ignore[index]


def test_why_pods_do_not_start(place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path) -> None:
    operators.room = 1
    (view,) = place.submit(order(tmp_path))
    operators.step()
    operators.step()
    told = place.job(view.id)
    assert (told.state, told.reason.code) == (JobState.STARTING, ReasonCode.INSUFFICIENT_FREE)
    assert "1 pod waits for a node: 0/1 nodes are available" in told.reason.sentence
    pod = cluster.find("pods", "ray.io/node-type=head")[0]["metadata"]["name"]
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    status = {"name": "ray-head", "ready": False, "restartCount": 0, "image": "x", "imageID": "", "state": waiting}
    cluster.status("pods", pod, phase="Pending", containerStatuses=[status])
    told = place.job(view.id)
    assert "ImagePullBackOff: no such image" in told.reason.sentence
    assert "--with image" in (told.reason.remedy or "")


def test_cancelling(place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    operators.settle()
    (leaving,) = place.cancel(view.id)
    assert (leaving.state, leaving.reason.code) == (JobState.STOPPING, ReasonCode.CANCELLED)
    assert record.CANCELLED in cluster.find("rayjobs")[0]["metadata"]["annotations"]
    assert [one.state for one in place.cancel(view.id)] == [JobState.STOPPING]  # twice is as once
    operators.settle()
    assert cluster.find("rayjobs") == cluster.find("pods") == []
    assert place.job(view.id).state == JobState.CANCELLED
    assert [one.state for one in place.cancel(view.id)] == [JobState.CANCELLED]


def test_what_has_ended_cannot_be_cancelled(place: Kubernetes, operators: Operators, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    operators.settle()
    operators.running[view.id.rpartition("/")[2]].code = 0
    operators.settle()
    with pytest.raises(ConflictError, match="succeeded already"):
        place.cancel(view.id)


def test_logs(place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    assert place.log(view.id, rank=None) == (b"", 0)
    operators.settle()
    pod = cluster.find("pods", f"job-name={view.id.rpartition('/')[2]}")[0]["metadata"]["name"]
    cluster.control("log", namespace="default", pod=pod, text="12:00:00 running: attempt 1 runs\n")
    data, offset = place.log(view.id, rank=None)
    assert data.decode() == "12:00:00 running: attempt 1 runs\n"
    assert place.log(view.id, rank=None, offset=offset) == (b"", offset)
    with pytest.raises(NotFoundError, match="is not in sight here"):
        place.log(view.id, rank=0)


def test_an_array(place: Kubernetes, operators: Operators, tmp_path: Path) -> None:
    from orchestrator.job.spec import ArrayElement

    one = order(tmp_path, processes=1)
    jobs = tuple(
        one.jobs[0].model_copy(update={"name": f"job-{index}", "array_of": ArrayElement(id="job-ab1cd", index=index)})
        for index in range(2)
    )
    views = place.submit(Order(jobs, (None, None), options=one.options))
    assert [view.id for view in views] == ["k8s:default/job-ab1cd-0", "k8s:default/job-ab1cd-1"]
    assert place.is_array("k8s:default/job-ab1cd")
    operators.settle()
    assert {view.state for view in place.jobs(array="k8s:default/job-ab1cd")} == {JobState.RUNNING}
    with pytest.raises(NotFoundError, match="is an array of 2 jobs"):
        place.job("k8s:default/job-ab1cd")
    place.cancel("k8s:default/job-ab1cd")
    operators.settle()
    assert {view.state for view in place.jobs(array="k8s:default/job-ab1cd")} == {JobState.CANCELLED}


def test_it_is_known_from_another_machine(place: Kubernetes, operators: Operators, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    other = Kubernetes(Settings(home=tmp_path / "other"))
    assert other.job(view.id).name == "job"
    assert other.jobs() == []
    with pytest.raises(NotFoundError):
        other.job("k8s:default/nobody")
    other.cancel(view.id)
    operators.settle()
    assert place.job(view.id).state == JobState.FAILED  # nobody here has cancelled it
    assert "was deleted" in place.job(view.id).reason.sentence


# An API server that does not do as it is asked.


def test_a_create_whose_answer_is_lost_is_not_doubled(place: Kubernetes, cluster: Cluster, tmp_path: Path) -> None:
    cluster.fail(verb="create", resource="rayjobs", drop=True, times=2)
    (view,) = place.submit(order(tmp_path))
    assert [one["metadata"]["name"] for one in cluster.find("rayjobs")] == [view.id.rpartition("/")[2]]
    creates = [one for one in cluster.asked() if one["verb"] == "create"]
    assert len(creates) >= 2


def test_the_name_of_another_is_not_taken(place: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.outside.k8s import system

    monkeypatch.setattr(system, "job_ids", lambda _: iter(["job-aaaaa"]))
    place.submit(order(tmp_path))
    with pytest.raises(ConflictError, match="already exists"):
        place.submit(order(tmp_path))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_it_asks_again(place: Kubernetes, cluster: Cluster, tmp_path: Path, status: int) -> None:
    cluster.fail(verb="create", resource="rayjobs", status=status, times=2, retry_after=1 if status == 429 else 0)
    began = time.monotonic()
    (view,) = place.submit(order(tmp_path))
    took = time.monotonic() - began
    assert place.job(view.id).state == JobState.STARTING
    assert len([one for one in cluster.asked() if one["verb"] == "create"]) == 3
    assert status != 429 or took >= 2  # as long as the server asks for


def test_it_does_not_ask_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    place = Kubernetes(Settings(home=tmp_path / "home", k8s_patience=0.5))
    cluster.fail(resource="rayjobs", status=503, times=1000)
    with pytest.raises(Exception, match="as a test asked for"):
        place.submit(order(tmp_path))
    cluster.control("faults", "DELETE")
    cluster.control("away", seconds=2)
    with pytest.raises(YardError, match="has not answered for"):
        place.jobs()
    cluster_is_back(cluster)


def cluster_is_back(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            for fault in cluster.control("faults", "GET"):
                assert fault
            return
        except (OSError, json.JSONDecodeError):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_it_does_not_allow_is_told(place: Kubernetes, cluster: Cluster, tmp_path: Path) -> None:
    cluster.fail(verb="create", resource="rayjobs", status=403)
    with pytest.raises(Exception, match="Kubernetes: as a test asked for") as caught:
        place.submit(order(tmp_path))
    assert "k8s/users" in (getattr(caught.value, "hint", "") or "")
    cluster.fail(verb="create", resource="rayjobs", status=422)
    with pytest.raises(SpecError, match="Kubernetes refuses it"):
        place.submit(order(tmp_path))
    assert [view.state for view in place.jobs()] == [JobState.FAILED, JobState.FAILED]  # neither has arrived


def test_a_submit_that_was_cut_off(
    place: Kubernetes, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the server had it, and after it but before that was written down."""
    real = Kubernetes._create

    def before(*_: Any) -> Any:
        raise KeyboardInterrupt

    def after(*arguments: Any) -> Any:
        real(*arguments)
        raise KeyboardInterrupt

    for cut, state in ((before, JobState.FAILED), (after, JobState.STARTING)):
        monkeypatch.setattr(Kubernetes, "_create", cut)
        with pytest.raises(KeyboardInterrupt):
            place.submit(order(tmp_path))
        assert place.jobs()[-1].state == state
    assert len(cluster.find("rayjobs")) == 1


def test_wait_follows_to_the_end(place: Kubernetes, operators: Operators, tmp_path: Path) -> None:
    (view,) = place.submit(order(tmp_path))
    states = []
    for seen in place.follow(view.id, timeout=60):
        states.append(seen.state)
        operators.step()
        if seen.state == JobState.RUNNING:
            for entrypoint in operators.running.values():
                entrypoint.code = 0
    assert (states[0], states[-1]) == (JobState.STARTING, JobState.SUCCEEDED)


# kubectl


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_sees_and_applies_the_same(
    place: Kubernetes, cluster: Cluster, operators: Operators, tmp_path: Path
) -> None:
    wanted = order(tmp_path, *QUEUED)
    text = place.render(wanted)
    assert "created" in cluster.kubectl("apply", "-f", "-", stdin=text)
    assert "unchanged" in cluster.kubectl("apply", "-f", "-", stdin=text)
    name = cluster.find("rayjobs")[0]["metadata"]["name"]
    assert name in cluster.kubectl("get", "rayjobs")
    operators.settle()
    told = json.loads(cluster.kubectl("get", "rayjob", name, "-o", "json"))
    assert told["status"]["jobDeploymentStatus"] == "Running"
    assert place.job(f"k8s:default/{name}").state == JobState.RUNNING  # by its annotations: no home has it
    cluster.kubectl("delete", "rayjob", name, "--wait=false")
    operators.settle()
    assert cluster.find("rayjobs") == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.skipif(not (CRDS / "ray.io_rayjobs.json").is_file(), reason=f"no RayJob schema in {CRDS}")
def test_a_field_that_there_is_not_is_refused(place: Kubernetes, cluster: Cluster, tmp_path: Path) -> None:
    broken = place.render(order(tmp_path)).replace("shutdownAfterJobFinishes", "shutdownAfterwards")
    assert "shutdownAfterwards" in cluster.kubectl("apply", "-f", "-", stdin=broken, check=False)
    assert cluster.find("rayjobs") == []


def test_the_role_of_users_is_no_wider_than_what_verbs_do(
    place: Kubernetes, operators: Operators, cluster: Cluster, tmp_path: Path
) -> None:
    operators.pods_quota = 0
    (view,) = place.submit(order(tmp_path, *QUEUED))
    operators.settle()
    place.job(view.id)  # queued: what does its Workload say?
    operators.pods_quota = 100
    operators.step()
    place.job(view.id)  # starting: what do its pods and events say?
    operators.settle()
    name = view.id.rpartition("/")[2]
    submitter = cluster.find("pods", f"job-name={name}")[0]["metadata"]["name"]
    cluster.control("log", namespace="default", pod=submitter, text="hello")
    place.log(view.id, rank=None)
    Kubernetes(Settings(home=tmp_path / "another")).job(view.id)  # by what the RayJob itself tells
    place.cancel(view.id)
    mine = asked_by_verbs(cluster)
    assert unused(mine, USERS) == []
    for number, rule in enumerate(USERS):
        for verb in rule["verbs"]:  # a Role without any one of them is too narrow
            less = {**rule, "verbs": [one for one in rule["verbs"] if one != verb]}
            (missed,) = beyond(mine, [*USERS[:number], less, *USERS[number + 1 :]])
            assert missed.startswith(f"{verb} ")
