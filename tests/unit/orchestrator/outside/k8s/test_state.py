"""What is told of a job, by what Kubernetes has of it, what its runs have said, and what was kept here."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.k8s.reasons import Seen
from orchestrator.outside.k8s.record import CANCELLED, QUEUE_LABEL, Handed
from orchestrator.outside.k8s.state import view_of
from orchestrator.outside.record import Status
from orchestrator.views import JobView

HANDED = Handed(
    namespace="lab", name="sms-x1y2z", job_name="sms", queue="default", priority=0, root="/v", key="k",
    submitted_at=1.0, created=True,
)  # fmt: skip


def seen(deployment: str = "", suspend: bool = False, queue: str | None = None, **more: Any) -> Seen:
    metadata: dict[str, Any] = {"name": "sms-x1y2z", "labels": {QUEUE_LABEL: queue} if queue else {}, "annotations": {}}
    metadata |= more.pop("metadata", {})
    status = {"jobDeploymentStatus": deployment, **more.pop("status", {})}
    return Seen({"metadata": metadata, "spec": {"suspend": suspend}, "status": status}, **more)


def said(state: JobState, told_to_end: bool = False, **changes: Any) -> Status:
    reason = Reason(code=ReasonCode.RUNNING, sentence="so it said", remedy="`tuneyard logs sms-x1y2z`")
    view = JobView(
        id="sms-x1y2z", name="sms", queue="default", priority=0, state=state, reason=reason, attempts=1,
        submitted_at=2.0, **changes,
    )  # fmt: skip
    return Status(job=view, told_to_end=told_to_end)


def workload(active: bool = True, **conditions: tuple[str, str, str]) -> Any:
    told = [
        {"type": kind, "status": status, "reason": reason, "message": message}
        for kind, (status, reason, message) in conditions.items()
    ]
    return {"spec": {"active": active}, "status": {"conditions": told}}


PENDING = workload(QuotaReserved=("False", "Pending", "no quota"))
EVICTED = workload(QuotaReserved=("False", "Pending", ""), Evicted=("True", "Preempted", "others first"))
INADMISSIBLE = workload(QuotaReserved=("False", "Inadmissible", "no such flavor"))
ADMITTED = workload(QuotaReserved=("True", "QuotaReserved", ""))


@pytest.mark.parametrize(
    ("what", "state", "code", "words"),
    [
        (seen(), JobState.STARTING, ReasonCode.STARTING, "KubeRay has not made its pods yet"),
        (seen("Running"), JobState.RUNNING, ReasonCode.RUNNING, "runs on"),
        (seen("Complete"), JobState.SUCCEEDED, ReasonCode.DONE, "succeeded"),
        (seen("Failed", status={"message": "oops"}), JobState.FAILED, ReasonCode.FAILED, "oops"),
        (seen("ValidationFailed"), JobState.FAILED, ReasonCode.FAILED, "given it up"),
        (seen("Suspending", suspend=True), JobState.STOPPING, ReasonCode.PREEMPTED, "it saves"),
        (seen("Suspended", suspend=True), JobState.PAUSED, ReasonCode.PAUSED, "somebody has suspended it"),
        (seen("Suspended", suspend=True, queue="q"), JobState.QUEUED, ReasonCode.SUBMITTED, "not looked at it"),
        (seen("Suspended", True, "q", workload=PENDING), JobState.QUEUED, ReasonCode.OVER_QUOTA, "no quota"),
        (seen("Suspended", True, "q", workload=EVICTED), JobState.QUEUED, ReasonCode.PREEMPTED, "(Preempted)"),
        (seen("Suspended", True, "q", workload=INADMISSIBLE), JobState.QUEUED, ReasonCode.HELD, "no such flavor"),
        (seen("Suspended", True, "q", workload=ADMITTED), JobState.STARTING, ReasonCode.STARTING, "let it in"),
        (seen("", True, "q", workload=workload(active=False)), JobState.QUEUED, ReasonCode.HELD, "on hold"),
        (seen("Retrying", status={"failed": 2}), JobState.STARTING, ReasonCode.STARTING, "lost 2 times"),
        (
            seen(events=({"type": "Warning", "message": "cannot make it"},)),
            JobState.STARTING, ReasonCode.NOT_TOLD, "cannot make it",
        ),
        (seen("Running", metadata={"deletionTimestamp": "now"}), JobState.STOPPING, ReasonCode.CANCELLED, "deleted"),
        (
            seen("Running", metadata={"annotations": {CANCELLED: "1"}}),
            JobState.STOPPING, ReasonCode.CANCELLED, "cancelled",
        ),
    ],
)  # fmt: skip
def test_what_kubernetes_tells(what: Seen, state: JobState, code: ReasonCode, words: str) -> None:
    view = view_of(HANDED, None, what)
    assert (view.state, view.reason.code) == (state, code)
    assert words in view.reason.sentence
    assert view.id == "k8s:lab/sms-x1y2z"


@pytest.mark.parametrize(
    ("status", "what", "state"),
    [
        (said(JobState.RUNNING), seen("Running"), JobState.RUNNING),
        (said(JobState.QUEUED), seen("Running"), JobState.QUEUED),
        (said(JobState.PAUSED), seen("Running"), JobState.STARTING),
        (said(JobState.RUNNING, told_to_end=True), seen("Running"), JobState.STARTING),
        (said(JobState.RUNNING), seen("Initializing"), JobState.STARTING),
        (said(JobState.RUNNING), seen("Failed"), JobState.FAILED),
        (said(JobState.FAILED), seen("Running"), JobState.FAILED),  # which KubeRay does not know yet
        (said(JobState.SUCCEEDED), seen("Retrying"), JobState.SUCCEEDED),
        (said(JobState.SUCCEEDED), None, JobState.SUCCEEDED),
        (said(JobState.RUNNING), None, JobState.FAILED),
    ],
)
def test_what_its_runs_have_said(status: Status, what: Seen | None, state: JobState) -> None:
    view = view_of(HANDED, status, what)
    assert view.state == state
    assert view.submitted_at == 1.0
    if view.reason.sentence == "so it said":
        assert view.reason.remedy == "`tuneyard logs k8s:lab/sms-x1y2z`"


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, JobState.FAILED, "was deleted, not by"),
        ({"created": False}, JobState.FAILED, "cut off"),
        ({"cancelled": True}, JobState.CANCELLED, "by its user"),
        ({"created": False, "cancelled": True}, JobState.CANCELLED, "by its user"),
    ],
)
def test_what_the_server_does_not_have(changes: dict[str, Any], state: JobState, words: str) -> None:
    view = view_of(HANDED.model_copy(update=changes), None, None)
    assert (view.state, words in view.reason.sentence) == (state, True)
