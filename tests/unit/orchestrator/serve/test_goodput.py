"""The API tells where time went."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from launch.contract import CheckpointNote, NodeShare, ProgressLine, StopRequest
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import Energy, Slots, Spent
from orchestrator.control.loop import Controller
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.settings import Settings
from orchestrator.store.transaction import NewAttempt, Transaction
from tests.builders import a_training_job
from tests.unit.orchestrator.store.test_store import a_start

WHY = Reason(code=ReasonCode.RUNNING, sentence="because")
T0 = 1_700_000_000.0


def move(write: Transaction, state: JobState, at: float) -> None:
    write.set_job("a-1", state, WHY, at)


def attempt(write: Transaction, number: int, at: float) -> None:
    """On two of the eight GPUs of a node."""
    contract, _ = a_start("a-1", number)
    placement = Placement(device="cuda", shares=(NodeShare(node="n0", address="h", processes=2, gpus=(4, 5)),))
    contract = contract.model_copy(update={"nodes": placement.shares, "spec": a_training_job(2).train_spec()})
    write.add_attempts([NewAttempt(contract, placement)], at)
    move(write, JobState.STARTING, at)


@pytest.fixture
def told(controller: Controller, http: TestClient) -> TestClient:
    """A job of two H100s that was pre-empted after 20 steps, and whose second attempt was killed by a signal."""
    store = controller.store
    store.add_job("a-1", a_training_job(2), T0)
    lease = store.acquire_lease("me", T0, 1e12)
    assert lease is not None
    controller.lease = lease
    note = CheckpointNote(id="step-20.attempt-1", step=20, outcome="committed", spent={"load": 10, "step": 20})
    first = Spent(began_at=T0 + 10, seconds={"load": 10, "step": 20, "save": 5}, phase="done", step=20, from_step=0)
    second = Spent(
        began_at=T0 + 60, seconds={"load": 10, "step": 25}, phase="step", step=45, from_step=20, failed_at=T0 + 100
    )
    with store.acting(lease) as write:
        write.add_inventory({"n0": Slots(name="x", kind="H100", slots=8)}, T0 - 10)
        attempt(write, 1, T0 + 10)
        write.set_attempt("a-1", 1, AttemptState.RUNNING, T0 + 20, started_at=T0 + 20)
        write.note_checkpoints("a-1", 1, [ProgressLine(time=T0 + 44, phase="save", checkpoint=note)], 10, "/c")
        write.set_stop("a-1", 1, StopRequest(reason="preempted", deadline=T0 + 99), T0 + 40, preempted_by="b-1")
        write.end_attempt("a-1", 1, T0 + 46, "stopped", first, [Energy(gpu_j=7.2e6, cpu_j=1.0)])
        move(write, JobState.QUEUED, T0 + 46)
        attempt(write, 2, T0 + 60)
        write.event("a-1", 2, T0 + 101, "attempt-error", {"message": "killed by SIGKILL"})
        write.end_attempt("a-1", 2, T0 + 101, "killed", second, [Energy()])
        move(write, JobState.FAILED, T0 + 101)
    return http


def test_a_job_is_accounted_for(told: TestClient, controller: Controller) -> None:
    controller.settings = Settings(home=controller.settings.home, prices={"h100": 3600.0}, currency="EUR")
    view = told.get("/v1/jobs/a-1/goodput").json()
    assert {name: seconds for name, seconds in view["seconds"].items() if seconds} == pytest.approx(
        {"queued": 24, "starting": 20, "training": 20, "saving": 5, "lost": 30, "stopping": 2}
    )
    assert view["wall_s"] == pytest.approx(101)
    assert math.fsum(view["seconds"].values()) == pytest.approx(view["wall_s"])
    assert view["goodput"] == pytest.approx(20 / 91)
    assert (view["lost_to_failures_slot_s"], view["lost_to_preemption_slot_s"]) == (60, 0)
    assert view["slot_hours"] == {"H100": pytest.approx(2 * 77 / 3600)} == {"H100": pytest.approx(view["gpu_hours"])}
    assert (view["cost"], view["currency"]) == (pytest.approx(2 * 77), "EUR")
    assert [(one["ended"], one["kinds"]) for one in view["attempts"]] == [
        ("preempted for b-1", {"H100": 2}), ("killed: killed by SIGKILL", {"H100": 2}),
    ]  # fmt: skip
    steps = [(one["from_step"], one["step"], one["kept_step"]) for one in view["attempts"]]
    assert steps == [(0, 20, None), (20, 45, 20)]
    # Of the processors nobody knows: it held two of eight slots.
    assert view["energy"] == {"gpu_kwh": pytest.approx(2.0), "cpu_kwh": None, "measured": 1, "ended": 2}
    spans = [span["until"] - span["since"] for span in view["spans"]]
    assert math.fsum(spans) == pytest.approx(101)


def test_without_prices_there_is_no_cost(told: TestClient) -> None:
    view = told.get("/v1/jobs/a-1/goodput").json()
    assert (view["cost"], view["currency"]) == (None, None)


def test_the_cluster_is_accounted_for_by_queue(told: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.serve.goodput.time", SimpleNamespace(time=lambda: T0 + 90))
    view = told.get("/v1/goodput", params={"last_s": 100, "bins": 10}).json()
    (queue,) = view["queues"]
    assert (queue["queue"], queue["jobs"]) == ("default", 1)
    assert queue["slot_seconds"] == view["total"]["slot_seconds"]
    held = math.fsum(queue["slot_seconds"].values())
    assert held == pytest.approx(2 * (36 + 30))
    assert view["known_since"] == T0 - 10
    assert view["offered_slot_s"] == {"H100": pytest.approx(800)}
    assert view["idle_slot_s"] == {"H100": pytest.approx(800 - held)}
    assert len(view["bins"]) == 10
    assert view["bins"][0] == {"since": T0 - 10, "until": T0, "slot_seconds": {}, "offered_slot_s": 80}
    assert math.fsum(seconds for one in view["bins"] for seconds in one["slot_seconds"].values()) == pytest.approx(held)


def test_an_empty_cluster(http: TestClient) -> None:
    view = http.get("/v1/goodput").json()
    assert (view["queues"], view["known_since"], view["idle_slot_s"]) == ([], None, {})
    assert set(view["total"]["seconds"].values()) == {0.0}


@pytest.mark.parametrize("query", ["last_s=0", "last_s=nan", "last_s=inf", "last_s=1e12", "bins=-1", "bins=99999"])
def test_a_time_that_cannot_be_is_refused(http: TestClient, query: str) -> None:
    answer = http.get(f"/v1/goodput?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad-request")


def test_of_no_job_there_is_nothing_to_tell(http: TestClient) -> None:
    assert http.get("/v1/jobs/nobody/goodput").status_code == 404
    assert http.get("/v1/jobs/no%20body/goodput").status_code == 404


def test_a_time_with_too_many_jobs_is_refused_and_none_is_left_out(
    told: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.serve.goodput.time", SimpleNamespace(time=lambda: T0 + 90))
    monkeypatch.setattr("orchestrator.serve.goodput.MOST_JOBS", 0)
    answer = told.get("/v1/goodput")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too-many")
