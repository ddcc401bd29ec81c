"""The entrypoint of a RayJob on a real Ray of this machine: what KubeRay would start, and end, again and again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import AttemptFiles
from launch.document import read_document
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.job.spec import AnyJob, load_job
from orchestrator.outside.k8s import record
from orchestrator.outside.k8s.record import Files, RunOrder
from orchestrator.outside.k8s.system import Kubernetes
from orchestrator.outside.protocol import Order
from orchestrator.outside.record import Patience, Status, task_of
from orchestrator.serve.rayjob import DONE, FAILED, LEFT
from orchestrator.settings import Settings
from tests.builders import a_command_job
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.operators import Operators
from tests.kubernetes.resources import ROOT
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard
from tests.yards import until as until_soon

STEPS = 120
until = partial(until_soon, seconds=600)
"""On a loaded machine everything takes long."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[Yard, dict[str, str]]]:
    """A Ray cluster of one node without a controller, and the environment of its drivers."""
    with a_yard(cpu_slots="2", leash="5", leash_margin="1") as yard:
        address, env = yard.without_controller()
        yield yard, {**env, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> AnyJob:
    folder = tmp_path_factory.mktemp("world")
    job = {
        "name": "small",
        "model": {
            "name_or_path": str(write_bert(folder / "bert")), "task": "sequence-classification", "dropout": 0.0,
        },
        "data": {"train": str(write_messages(folder / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
        "train": {"max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-3},
        "strategy": "single",
        "resources": {"num_processes": 1},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(json.dumps(job))
    return load_job(read_document(path, ()))


class Pod:
    """Where runs of one job are started, one after the other; the volume is a directory."""

    def __init__(self, folder: Path, job: AnyJob, name: str, env: dict[str, str], nodes: int = 1) -> None:
        self.order = folder / f"{name}.json"  # the same for whoever looks at it again
        patience = Patience(leash=5, leash_margin=1, stop_grace=30, tick=0.1)
        order = RunOrder(
            root=str(folder),
            nodes=nodes,
            processes=1,
            grace_s=60,
            patience=patience,
            task=task_of(name, job, None, None),
        )
        self.order.write_text(order.model_dump_json())
        self.files, self.env = Files(folder, name), env

    def start(self, *more: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "orchestrator.serve.rayjob", str(self.order), *more]
        return subprocess.Popen(argv, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    @property
    def status(self) -> Status:
        found = self.files.read_status()
        assert found is not None
        return found

    def losses(self, attempt: int) -> dict[int, float]:
        path = AttemptFiles(self.files.folder / f"attempt-{attempt}").progress(0)
        if not path.exists():
            return {}
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return {one["step"]: one["loss"] for one in lines if one["phase"] == "train" and one.get("loss") is not None}


def finished(run: subprocess.Popen[str], code: int) -> str:
    out, _ = run.communicate(timeout=600)
    assert run.returncode == code, out
    return out


class Entrypoint:
    """What KubeRay would start on the head of a RayJob's Ray cluster, and what a kubelet does before that goes."""

    def __init__(self, rayjob: Any, env: dict[str, str], folder: Path) -> None:
        spec = rayjob["spec"]
        self.template, self.env = spec["rayClusterSpec"]["headGroupSpec"]["template"], env
        self.order = folder / f"{rayjob['metadata']['name']}-order.json"
        self.order.write_text(self.template["metadata"]["annotations"][record.ORDER])
        self.process = self._start(spec["entrypoint"].split())

    def _start(self, argv: list[str]) -> subprocess.Popen[str]:
        here = {"python": sys.executable, f"{record.ORDER_FILE}/order.json": str(self.order)}
        command = [here.get(word, word) for word in argv]
        return subprocess.Popen(command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        hook = self.template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert self._start(hook).wait(600) == DONE
        self.out = finished(self.process, LEFT)


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on_as_if_it_had_not_been(
    ray: tuple[Yard, dict[str, str]], training: AnyJob, cluster: Cluster, tmp_path: Path
) -> None:
    _, env = ray
    volume = Path(training.model.name_or_path).parent  # type: ignore[union-attr]
    whole = Pod(volume, training, "whole-aaaaa", env)
    finished(whole.start(), DONE)
    assert whole.status.job.state == JobState.SUCCEEDED

    place = Kubernetes(Settings(home=tmp_path, leash=5, leash_margin=1))
    options = (f"mount={volume}", "queue=research", "kinds.cpu.cpus=2")
    (view,) = place.submit(Order((training,), (None,), options=options))
    started: list[Entrypoint] = []

    def start(rayjob: Any) -> Entrypoint:
        started.append(Entrypoint(rayjob, env, tmp_path))
        return started[-1]

    operators = Operators(cluster, start=start)
    operators.settle()
    pod = Pod(volume, training, view.id.rpartition("/")[2], env)
    until(lambda: max(pod.losses(1), default=0) >= 5)
    assert place.job(view.id).state == JobState.RUNNING
    assert place.job(view.id).progress is not None

    operators.pods_quota = 0
    operators.preempt(pod.files.folder.name)
    operators.settle()
    out = place.job(view.id)
    assert (out.state, out.reason.code, out.attempts) == (JobState.QUEUED, ReasonCode.PREEMPTED, 1)
    assert "Kubernetes takes this run's pods: it waits for another run" in started[0].out
    assert out.checkpoint is not None
    saved = out.checkpoint.step
    assert 5 <= saved < STEPS
    assert f"saved at step {saved}" in out.reason.sentence

    operators.pods_quota = 100
    operators.settle()
    until(lambda: started[1].poll() is not None)
    operators.settle()
    last = place.job(view.id)
    assert (last.state, last.attempts, last.failures) == (JobState.SUCCEEDED, 2, 0)
    assert min(pod.losses(2)) == saved + 1  # no step is lost, and none is done twice
    both = pod.losses(1) | pod.losses(2)
    for step, loss in whole.losses(1).items():
        assert both[step] == pytest.approx(loss, rel=1e-5), step
    assert metrics(pod.status) == pytest.approx(metrics(whole.status), rel=1e-5)
    data, _ = place.log(view.id, rank=0, attempt=2)
    assert data

    again = pod.start()  # as after a lost head, of a job that has ended
    assert "succeeded" in finished(again, DONE)
    assert pod.status.job.attempts == 2


def metrics(status: Status) -> Any:
    assert status.job.result is not None
    return {key: value for key, value in status.job.result["metrics"].items() if isinstance(value, float)}


def test_a_job_that_fails_fails_again_at_once(ray: tuple[Yard, dict[str, str]], tmp_path: Path) -> None:
    _, env = ray
    job = a_command_job(1, run=["false"], working_dir=str(tmp_path), retry={"max_restarts": 0})
    pod = Pod(tmp_path, job, "bad-ccccc", env)
    finished(pod.start(), FAILED)
    assert pod.status.job.state == JobState.FAILED
    attempts = pod.status.job.attempts
    assert "failed" in finished(pod.start(), FAILED)
    assert pod.status.job.attempts == attempts


def test_a_gang_waits_for_its_nodes_and_leaves_when_told(ray: tuple[Yard, dict[str, str]], tmp_path: Path) -> None:
    _, env = ray
    pod = Pod(tmp_path, a_command_job(1, working_dir=str(tmp_path)), "wide-ddddd", env, nodes=2)
    run = pod.start()
    until(lambda: pod.files.status.exists())
    assert pod.status.job.reason.sentence == "1 of 2 nodes of its Ray cluster are there"
    run.terminate()
    finished(run, LEFT)
    assert pod.status.job.attempts == 0
