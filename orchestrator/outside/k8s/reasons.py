"""Why Kubernetes says that a job waits, runs or has ended, in a yard's words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.k8s.record import QUEUE_LABEL

Object = dict[str, Any]
Told = tuple[JobState, Reason]
MAX_MESSAGE = 300
CANNOT_START = {
    "ImagePullBackOff": "look at the image: --with image=NAME:TAG",
    "ErrImagePull": "look at the image: --with image=NAME:TAG",
    "InvalidImageName": "look at the image: --with image=NAME:TAG",
    "CreateContainerConfigError": "something that the pod names is not there: --with secret=..., claim=...",
    "CrashLoopBackOff": "`kubectl logs` of that pod tells why",
}


@dataclass(frozen=True)
class Seen:
    """What the API server has of a job."""

    rayjob: Object
    workload: Object | None = None
    """Kueue's."""
    pods: tuple[Object, ...] = ()
    events: tuple[Object, ...] = field(default=())
    """Of the RayJob, oldest first."""


def told_by(seen: Seen) -> Told:
    """State and reason as far as Kubernetes knows them, apart from what the job's own runs say."""
    status = seen.rayjob.get("status") or {}
    deployment = status.get("jobDeploymentStatus") or ""
    if seen.rayjob["metadata"].get("deletionTimestamp"):
        return JobState.STOPPING, _reason(ReasonCode.CANCELLED, "is being deleted: its pods save and end")
    match deployment:
        case "Complete":
            return JobState.SUCCEEDED, _reason(ReasonCode.DONE, "its run has succeeded")
        case "Failed" | "ValidationFailed":
            return JobState.FAILED, _failed(status)
        case "Suspending":
            return JobState.STOPPING, _reason(ReasonCode.PREEMPTED, f"is being suspended{_why_evicted(seen)}: it saves")
        case "Running" if not seen.rayjob["spec"].get("suspend"):
            return JobState.RUNNING, _reason(ReasonCode.RUNNING, "runs on its Ray cluster")
    if seen.rayjob["spec"].get("suspend"):
        return _suspended(seen)
    return _starting(seen, status)


def _suspended(seen: Seen) -> Told:
    queue = seen.rayjob["metadata"].get("labels", {}).get(QUEUE_LABEL)
    if queue is None:
        sentence = "somebody has suspended it"
        remedy = 'kubectl patch rayjob {name} --type merge -p \'{{"spec":{{"suspend":false}}}}\' lets it go on'.format(
            name=seen.rayjob["metadata"]["name"]
        )
        return JobState.PAUSED, _reason(ReasonCode.PAUSED, sentence, remedy)
    if seen.workload is None:
        sentence = f"Kueue has not looked at it yet (queue {queue})"
        return JobState.QUEUED, _reason(ReasonCode.SUBMITTED, sentence, f"`kubectl describe localqueue {queue}`")
    conditions = _conditions(seen.workload)
    if (seen.workload.get("spec") or {}).get("active") is False:
        return JobState.QUEUED, _reason(
            ReasonCode.HELD, "its Workload was put on hold", "whoever did that lets it go on"
        )
    quota, evicted = conditions.get("QuotaReserved"), conditions.get("Evicted")
    message = _said(quota)
    if quota is not None and quota.get("status") == "True":
        return JobState.STARTING, _reason(ReasonCode.STARTING, "Kueue has let it in; it is about to be started")
    if quota is not None and quota.get("reason") == "Inadmissible":
        return JobState.QUEUED, _reason(
            ReasonCode.HELD, f"Kueue cannot let it in by the queue {queue}: {message}", "--with queue=OTHER"
        )
    before = (
        f"evicted by Kueue{_why_evicted(seen)}; " if evicted is not None and evicted.get("status") == "True" else ""
    )
    code = ReasonCode.PREEMPTED if before else ReasonCode.OVER_QUOTA
    sentence = f"{before}waits for quota in the queue {queue}" + (f": {message}" if message else "")
    return JobState.QUEUED, _reason(code, sentence, "starts when others of the queue end; nothing to do")


def _why_evicted(seen: Seen) -> str:
    evicted = _conditions(seen.workload).get("Evicted") if seen.workload is not None else None
    if evicted is None or evicted.get("status") != "True":
        return ""
    return f" ({evicted.get('reason', 'evicted')})"


def _starting(seen: Seen, status: Mapping[str, Any]) -> Told:
    for pod in seen.pods:
        name = pod["metadata"]["name"]
        for container in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in CANNOT_START:
                sentence = f"pod {name} cannot start: {waiting['reason']}: {_short(waiting.get('message'))}"
                return JobState.STARTING, _reason(ReasonCode.HELD, sentence, CANNOT_START[waiting["reason"]])
    unplaced = [pod for pod in seen.pods if _conditions(pod).get("PodScheduled", {}).get("status") == "False"]
    if unplaced:
        message = _said(_conditions(unplaced[0])["PodScheduled"])
        count = "1 pod waits" if len(unplaced) == 1 else f"{len(unplaced)} of {len(seen.pods)} pods wait"
        sentence = f"{count} for a node: {message}"
        remedy = "starts when there is room; what it asks for: `tuneyard render k8s FILE`"
        return JobState.STARTING, _reason(ReasonCode.INSUFFICIENT_FREE, sentence, remedy)
    warned = [event for event in seen.events if event.get("type") == "Warning"]
    if warned and not seen.pods:
        return JobState.STARTING, _reason(ReasonCode.NOT_TOLD, f"KubeRay says: {_short(warned[-1].get('message'))}")
    again = int(status.get("failed") or 0)
    if again:
        sentence = f"its Ray cluster was lost {again} time{'s' if again > 1 else ''}; the next one is being made"
        return JobState.STARTING, _reason(ReasonCode.STARTING, sentence)
    ready = sum(_conditions(pod).get("Ready", {}).get("status") == "True" for pod in seen.pods)
    told = f"{ready} of {len(seen.pods)} pods are ready" if seen.pods else "KubeRay has not made its pods yet"
    return JobState.STARTING, _reason(ReasonCode.STARTING, told)


def _failed(status: Mapping[str, Any]) -> Reason:
    why = ": ".join(part for part in (status.get("reason"), _short(status.get("message"))) if part)
    return _reason(
        ReasonCode.FAILED,
        f"KubeRay has given it up{f': {why}' if why else ''}",
        "`tuneyard logs ID --launcher` shows what its runs printed; submit it again",
    )


def _conditions(of: Object) -> dict[str, Object]:
    found: Iterable[Object] = (of.get("status") or {}).get("conditions") or ()
    return {one["type"]: one for one in found}


def _said(condition: Object | None) -> str:
    return _short(condition.get("message")) if condition is not None else ""


def _short(message: str | None) -> str:
    text = " ".join((message or "").split())
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"


def _reason(code: ReasonCode, sentence: str, remedy: str | None = None) -> Reason:
    return Reason(code=code, sentence=sentence, remedy=remedy)
