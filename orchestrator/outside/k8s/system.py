"""Kubernetes as a system that queues jobs: a RayJob each, with KubeRay, and with Kueue where a LocalQueue is named."""

from __future__ import annotations

import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from launch.attempt import AttemptFiles
from orchestrator.cluster.gpus import gpu_type
from orchestrator.cluster.model import Gpu, Node
from orchestrator.errors import ConflictError, NotFoundError, SpecError
from orchestrator.execute.protocol import read_bytes
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import AnyJob, TrainingJob
from orchestrator.outside.k8s import record
from orchestrator.outside.k8s.manifest import Object, rayjob_of
from orchestrator.outside.k8s.options import Kind, KubernetesOptions
from orchestrator.outside.k8s.reasons import Seen
from orchestrator.outside.k8s.record import CANCELLED, HANDED, JOB_LABEL, KEY, OURS, OWN, Files, Handed, RunOrder
from orchestrator.outside.k8s.state import view_of
from orchestrator.outside.options import read_options
from orchestrator.outside.protocol import MAX_JOBS, Order, Outside, System
from orchestrator.outside.record import Patience, Status, job_ids, task_of
from orchestrator.outside.shape import Shape, Words, shape_of
from orchestrator.settings import Settings
from orchestrator.views import AttemptView, EventView, JobView

if TYPE_CHECKING:
    from orchestrator.outside.k8s.api import Api

RAYJOBS = "rayjobs"
MAX_LOG = 1 << 20
CPU = "cpu"
GPU_KIND = Kind(gpus=8, cpus=64, memory_gb=512.0)
CPU_KIND = Kind(cpus=8, memory_gb=32.0, tolerations=())
SUBMITTER_LABEL = "job-name"
"""Of the pod that KubeRay's submitter, a Job named as the RayJob, has."""


class Kubernetes(Outside):
    """The cluster that this machine's kubeconfig, or a pod's ServiceAccount, names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def render(self, order: Order) -> str:
        yaml, text = YAML(), io.StringIO()
        yaml.width = 200
        yaml.dump_all([body for _, body in self._bodies(order)], text)
        return text.getvalue()

    def submit(self, order: Order) -> list[JobView]:
        views = []
        for handed, body in self._bodies(order):
            record.keep(self._settings.root, handed)
            made = self._create(handed, body)
            handed = handed.model_copy(update={"created": True})
            record.keep(self._settings.root, handed)
            views.append(view_of(handed, None, Seen(made)))
        return views

    def _create(self, handed: Handed, body: Object) -> Object:
        """It is there once, however often the server was asked."""
        server = self._api(handed)
        try:
            return server.create(RAYJOBS, handed.namespace, body)
        except ConflictError:
            found = server.get(RAYJOBS, handed.namespace, handed.name)
            if (found["metadata"].get("annotations") or {}).get(KEY) != handed.key:
                raise
            return found

    def _bodies(self, order: Order) -> Iterator[tuple[Handed, Object]]:
        for job in order.jobs:
            _check(job)
        now = time.time()
        for job_id, job, sizing in zip(job_ids(order.jobs), order.jobs, order.sizings, strict=True):
            options = read_options(KubernetesOptions, self._settings, System.KUBERNETES, job.queue, order.options)
            _check_paths(job, options.mount)
            kinds = _kinds(job, options)
            shape = _shape(job, sizing, kinds, options)
            name = record.object_name(job_id)
            handed = Handed(
                namespace=options.namespace,
                name=name,
                context=options.context,
                job_name=job.name,
                queue=job.queue,
                priority=job.priority,
                root=options.mount,
                key=record.new_key(),
                array=None if job.array_of is None else record.object_name(job.array_of.id),
                index=0 if job.array_of is None else job.array_of.index,
                submitted_at=now,
            )
            said = self._settings
            run = RunOrder(
                root=options.mount,
                nodes=shape.nodes,
                processes=shape.processes,
                grace_s=options.grace,
                patience=Patience(
                    leash=said.leash, leash_margin=said.leash_margin, stop_grace=said.stop_grace, tick=said.tick
                ),
                task=task_of(name, job, sizing, order.git),
            )
            yield handed, rayjob_of(handed, run, shape, kinds[shape.kind or CPU], options)

    def jobs(self, limit: int = MAX_JOBS, array: str | None = None) -> list[JobView]:
        every = record.recall_all(self._settings.root) if array is None else self._elements(array)
        return self._views(list(every)[-limit:])

    def job(self, job_id: str) -> JobView:
        return self._views([self._recall(job_id)])[0]

    def attempts(self, job_id: str) -> list[AttemptView]:
        status = self._status(self._recall(job_id))
        return list(status.attempts) if status is not None else []

    def events(self, job_id: str) -> list[EventView]:
        handed = self._recall(job_id)
        status = self._status(handed)
        if status is not None:
            return list(status.events)
        told = self._api(handed).events(handed.namespace, "RayJob", handed.name)
        return [
            EventView(id=number, attempt=None, time=_unix(event), kind=event.get("reason", "event").lower(), data=data)
            for number, event in enumerate(told, start=1)
            for data in [{"message": event.get("message", ""), "type": event.get("type", "")}]
        ]

    def log(self, job_id: str, *, rank: int | None, attempt: int | None = None, offset: int = 0) -> tuple[bytes, int]:
        handed = self._recall(job_id)
        status = self._status(handed)
        if status is None and rank is None:
            data = self._submitter_log(handed)[offset : offset + MAX_LOG]
            return data, offset + len(data)
        attempts = status.attempts if status is not None else ()
        number = attempt or max((one.number for one in attempts), default=0)
        if number not in {one.number for one in attempts}:
            if status is not None and rank is None and attempt is None:
                data = self._submitter_log(handed)[offset : offset + MAX_LOG]
                return data, offset + len(data)
            where = "" if status is not None else f", or {handed.root}, where it is, is not in sight here"
            raise NotFoundError(
                f"job {job_id} has no attempt {number or 1} yet{where}",
                field="attempt",
                hint="`tuneyard logs --launcher` shows what its controller prints",
            )
        files = AttemptFiles(Files(handed.root, handed.name).folder / f"attempt-{number}")
        data = read_bytes(files.launcher_log(0) if rank is None else files.log(rank), offset, MAX_LOG)
        return data, offset + len(data)

    def _submitter_log(self, handed: Handed) -> bytes:
        """What the job's controller printed, of its newest run."""
        server = self._api(handed)
        pods = server.pods(handed.namespace, f"{SUBMITTER_LABEL}={handed.name}")
        if not pods:
            return b""
        newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        return server.log(handed.namespace, newest["metadata"]["name"])

    def cancel(self, job_id: str) -> list[JobView]:
        some = self._elements(job_id) if self.is_array(job_id) else [self._recall(job_id)]
        before = self._views(some)
        live = [one for one, view in zip(some, before, strict=True) if not view.state.final]
        if not live and all(view.state == JobState.CANCELLED for view in before):
            return before  # doing so twice is the same as once
        if not live:
            raise ConflictError(f"{job_id} has {before[0].state} already", hint="nothing to cancel")
        for handed in live:
            record.keep(self._settings.root, handed.model_copy(update={"cancelled": True}))
            files = Files(handed.root, handed.name)
            with contextlib.suppress(OSError):  # not in sight here
                files.cancelled.touch()
            server = self._api(handed)
            with contextlib.suppress(NotFoundError):
                note = {"metadata": {"annotations": {CANCELLED: f"{time.time():.0f}"}}}
                server.patch(RAYJOBS, handed.namespace, handed.name, note)
            server.delete(RAYJOBS, handed.namespace, handed.name)
        return self._views([self._known(one) for one in some])

    def is_array(self, job_id: str) -> bool:
        namespace, name = record.parse_id(job_id)
        return any((one.namespace, one.array) == (namespace, name) for one in record.recall_all(self._settings.root))

    def _elements(self, array: str) -> list[Handed]:
        namespace, name = record.parse_id(array)
        found = [
            one for one in record.recall_all(self._settings.root) if (one.namespace, one.array) == (namespace, name)
        ]
        if not found:
            raise NotFoundError(f"no array {array} was handed over from {self._settings.root}", field="job")
        return found

    def _recall(self, job_id: str) -> Handed:
        """What was handed over, from this home or, as the RayJob itself tells, from another."""
        namespace, name = record.parse_id(job_id)
        try:
            return record.recall(self._settings.root, namespace, name)
        except NotFoundError as unknown:
            if self.is_array(job_id):
                elements = self._elements(job_id)
                raise NotFoundError(
                    f"{job_id} is an array of {len(elements)} jobs",
                    field="job",
                    hint=f"name one of them: {elements[0].id} to {elements[-1].id}",
                ) from None
            options = read_options(KubernetesOptions, self._settings, System.KUBERNETES, "default", ())
            try:
                found = self._server(options.context).get(RAYJOBS, namespace, name)
                told = found["metadata"].get("annotations", {})[HANDED]
            except (NotFoundError, KeyError):
                raise unknown from None
            return Handed.model_validate_json(told).model_copy(update={"created": True, "context": options.context})

    def _known(self, handed: Handed) -> Handed:
        try:
            return record.recall(self._settings.root, handed.namespace, handed.name)
        except NotFoundError:
            return handed

    def _views(self, handed: Sequence[Handed]) -> list[JobView]:
        seen = self._look([one for one in handed if one.ended is None])
        return [self._view(one, seen.get(one.id)) for one in handed]

    def _view(self, handed: Handed, seen: Seen | None) -> JobView:
        if handed.ended is not None:
            return JobView.model_validate_json(handed.ended)
        view = view_of(handed, self._status(handed), seen)
        if view.state.final:  # a RayJob that has ended is deleted some day
            with contextlib.suppress(OSError):
                record.keep(self._settings.root, handed.model_copy(update={"ended": view.model_dump_json()}))
        return view

    def _look(self, handed: Sequence[Handed]) -> dict[str, Seen]:
        """What the API server has of them, by id: a few questions for each namespace, however many they are."""
        places = defaultdict[tuple[str | None, str], list[Handed]](list)
        for one in handed:
            places[one.context, one.namespace].append(one)
        found: dict[str, Seen] = {}
        for (context, namespace), some in places.items():
            server = self._server(context)
            names = {one.name: one.id for one in some}
            single = some[0].name if len(some) == 1 else None
            rayjobs = server.find(RAYJOBS, namespace, f"{JOB_LABEL}={single}" if single else f"{OWN}={OURS}")
            mine = [one for one in rayjobs if one["metadata"]["name"] in names]
            queued = any(one["spec"].get("suspend") for one in mine)
            workloads = {_owner(one): one for one in server.workloads(namespace)} if queued else {}
            starting = [one for one in mine if _starts(one)]
            pods = defaultdict[str, list[Object]](list)
            if starting:
                for pod in server.pods(namespace, f"{JOB_LABEL}={single}" if single else JOB_LABEL):
                    pods[pod["metadata"]["labels"][JOB_LABEL]].append(pod)
            for rayjob in mine:
                name, uid = rayjob["metadata"]["name"], rayjob["metadata"]["uid"]
                events = server.events(namespace, "RayJob", name) if single and rayjob in starting else []
                found[names[name]] = Seen(rayjob, workloads.get(uid), tuple(pods[name]), tuple(events))
        return found

    def _status(self, handed: Handed) -> Status | None:
        return Files(handed.root, handed.name).read_status()

    def _api(self, handed: Handed) -> Api:
        return self._server(handed.context)

    def _server(self, context: str | None) -> Api:
        from orchestrator.outside.k8s.api import api

        return api(context, self._settings.k8s_patience)


def _owner(workload: Object) -> str:
    return next((str(one["uid"]) for one in workload["metadata"].get("ownerReferences") or ()), "")


def _starts(rayjob: Object) -> bool:
    deployment = (rayjob.get("status") or {}).get("jobDeploymentStatus") or ""
    return not rayjob["spec"].get("suspend") and deployment not in ("Running", "Complete", "Failed")


def _unix(event: Object) -> float:
    from datetime import datetime

    text = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp")
    return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp() if text else 0.0


def _check(job: AnyJob) -> None:
    """Raises SpecError for what a yard does and a RayJob does not."""
    if job.after:
        raise SpecError(
            "`after` names jobs of a yard, and this job goes to Kubernetes",
            code="not-in-kubernetes",
            field="after",
            hint="leave it out, and submit it when the others have ended: `tuneyard wait k8s:NAMESPACE/NAME`",
        )
    if job.array_of is not None and job.array_of.at_once is not None:
        raise SpecError(
            "`array_at_once` bounds an array on a yard; RayJobs do not know of each other",
            code="not-in-kubernetes",
            field="array_at_once",
            hint="leave it out: the quota of a queue of Kueue's bounds how many run, --with queue=NAME",
        )


def _check_paths(job: AnyJob, mount: str) -> None:
    """Raises SpecError for what pods would not find."""
    named: list[tuple[str, str | None]] = [("checkpoint.directory", job.checkpoint.directory)]
    if isinstance(job, TrainingJob):
        named += [("model.name_or_path", job.model.name_or_path), ("data.chat_template", job.data.chat_template)]
        named += [
            (f"data.{part}", path) for part in ("train", "validation", "test") for path in getattr(job.data, part) or ()
        ]
        named += [("output_dir", job.output_dir)]
    else:
        named += [("working_dir", job.working_dir)]
    for field, path in named:
        if path is not None and path.startswith("/") and not PurePosixPath(path).is_relative_to(mount):
            raise SpecError(
                f"pods have the volume at {mount} alone, and not {path}",
                code="not-on-the-volume",
                field=field,
                hint=f"put it there, or say where the volume is: --with mount={PurePosixPath(path).parent}",
            )


def _kinds(job: AnyJob, options: KubernetesOptions) -> dict[str, Kind]:
    """The nodes that there may be: as was said of them, else of the one kind that the job asks for."""
    if options.kinds:
        return options.kinds
    wanted = job.resources.accelerator
    if wanted in ("any", CPU):
        return {CPU: CPU_KIND}
    return {"GPU" if wanted == "gpu" else wanted: GPU_KIND}


def _shape(job: AnyJob, sizing: str | None, kinds: dict[str, Kind], options: KubernetesOptions) -> Shape:
    count = options.nodes or min(job.resources.bounds[1], 256)
    nodes = [_node(f"{name}-{number}", name, kind) for name, kind in kinds.items() for number in range(count)]
    words = Words(
        where="the cluster, as it was described,",
        none="say what nodes there are: --with kinds.H100.gpus=8, or TUNEYARD_OUTSIDE",
        few="say what more there is: --with kinds.NAME.gpus=N",
    )
    return shape_of(job, sizing, nodes, options, words)


def _node(node_id: str, name: str, kind: Kind) -> Node:
    known = gpu_type(name)
    return Node(
        id=node_id,
        name=node_id,
        address=node_id,
        cores=kind.cpus,
        cpu_slots=kind.cpus,
        memory_bytes=int(kind.memory_gb * 10**9),
        gpus=tuple(
            Gpu(index=index, type=name, memory_bytes=known.memory_bytes if known is not None else None)
            for index in range(kind.gpus)
        ),
    )
