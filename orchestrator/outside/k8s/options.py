"""What Kubernetes alone is told of a job: by TUNEYARD_OUTSIDE for a queue, by `--with` for one job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from launch.errors import Refused
from launch.section import Section
from orchestrator.job.fields import Duration

LABEL = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
VOLUME = "/var/lib/tuneyard"


class Toleration(Section):
    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Kind(Section):
    """Nodes of one kind, as a pod may have them whole: a pod takes the share of its ranks."""

    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    cpus: Annotated[int, Field(ge=1, le=1024)] = 8
    memory_gb: Annotated[float, Field(gt=0)] = 32.0
    """What a pod may ask for, in 10^9 bytes."""
    resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$")] = "nvidia.com/gpu"
    """What the device plugin calls a GPU."""
    selector: dict[str, str] = {}
    """Labels of the nodes, such as nvidia.com/gpu.product; with Kueue its flavors may say it instead."""
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu", effect="NoSchedule"),)


class KubernetesOptions(Section):
    """A RayJob that KubeRay runs, and Kueue lets in where a LocalQueue is named."""

    namespace: Annotated[str, Field(pattern=LABEL)] = "default"
    context: str | None = None
    """Of the kubeconfig; null for the current one. In a pod with a ServiceAccount it is that account."""
    image: Annotated[str, Field(pattern=r"^[^\s:]+(:\d+/[^\s:]+)?(:[\w.-]+|@sha256:[0-9a-f]{64})$")] = "tuneyard:0.1.0"
    """With Tuneyard installed, and Python on the PATH; by tag or digest."""
    queue: Name | None = None
    """A LocalQueue of Kueue's; null where KubeRay starts it at once."""
    priority_class: Name | None = None
    """A WorkloadPriorityClass of Kueue's."""
    service_account: Name = "default"
    """Of its pods, which get no token of it."""
    secret: Name | None = None
    """A Secret whose keys become variables of the ranks' pods, for what a job takes `from_env`."""
    claim: Name = "tuneyard-home"
    """A PersistentVolumeClaim that many nodes may write to at once, for models, data, runs and checkpoints."""
    mount: str = VOLUME
    """Where pods have that volume. Best where this machine has it, too."""
    nodes: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Worker pods over which the processes are spread; null for as few as hold them."""
    cpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPUs of a process; null for its GPU's share of the node's, and one where there is no GPU."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a worker pod, in 10^9 bytes; null for twice what the plan needs, else its share of the node's."""
    kinds: dict[str, Kind] = {}
    """The nodes that there are, by the GPU's type as job files say it, or cpu."""
    head_cpus: Annotated[int, Field(ge=1, le=64)] = 2
    """Of the pod with Ray's head and the job's controller, which has no ranks."""
    head_memory_gb: Annotated[float, Field(ge=2)] = 6.0
    shm_gb: Annotated[float, Field(gt=0)] = 4.0
    """Of /dev/shm in each pod, of the pod's memory: Ray's objects, NCCL, and copies of the state."""
    grace: Duration = 120.0
    """How long a pod that is to go may take to save."""
    restarts: Annotated[int, Field(ge=0, le=100)] = 3
    """How many lost heads it survives: each takes a new Ray cluster. What Kueue suspends does not count."""
    keep: Duration | None = None
    """How long a RayJob that has ended is kept; null for until somebody deletes it."""

    @field_validator("mount")
    @classmethod
    def _is_absolute(cls, path: str) -> str:
        if not path.startswith("/") or not path.isprintable() or path == "/":
            raise Refused(f"`{path}` is not an absolute path", hint=f"such as {VOLUME}")
        return path.rstrip("/")
