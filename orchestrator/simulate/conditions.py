"""What a simulation takes for granted: what stops and starts cost, what fails, and who may have what."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from launch.config import validate
from launch.document import Document, apply_override, read_document
from launch.section import Section
from orchestrator.cluster.model import Gpu, Node
from orchestrator.cluster.spec import NodeKind
from orchestrator.errors import SpecError
from orchestrator.schedule.gang import HOUR_S, Queue, Rules


class Failure(Section):
    """A node fails, and takes its attempts along."""

    at_s: float = Field(ge=0)
    """After the first submission."""
    node: int | str
    """Its number, from 0, or its name."""
    repair_s: float | None = Field(None, ge=0)
    """Until it is back; Conditions.repair_s if not given. What dies alone and is started again: 0."""


@dataclass(frozen=True)
class Conditions:
    """Seconds."""

    preemption_cost_s: float = 60.0
    """Work that a job has to do again after it was stopped for another, or to be resized."""
    startup_s: float = 0.0
    """From each start to the first step, in which slots are held and no work is done."""
    checkpoint_s: float | None = None
    """Between two commits while a job works. None: only planned stops commit."""
    mtbf_s: float | None = None
    """Mean time between two failures of one node, exponential; None: none fails. Work since the last commit is lost."""
    repair_s: float = HOUR_S
    """From a node's failure to its return."""
    failures: tuple[Failure, ...] = ()
    """That happen at known times, beside those that are drawn."""
    speedup: float = 0.9
    """An elastic job on n ranks instead of num_gpus is (n / num_gpus) to this power as fast; 1 is perfect scaling."""
    seed: int = 0
    """Of the failures."""
    oracle: bool = False
    """Whether policies know how long jobs will run."""
    tenants_as_queues: bool = False
    """Else all tenants share one queue, and history tells them apart."""
    forecast_every: int = 20
    """Of the jobs that do not start when they are submitted, every so many-th is told when it will."""

    def speed(self, processes: int, num_gpus: int) -> float:
        """Beside that on num_gpus."""
        return 1.0 if processes == num_gpus else float((processes / num_gpus) ** self.speedup)


def alike_nodes(count: int, gpus: int) -> tuple[Node, ...]:
    """`count` nodes with `gpus` GPUs each."""
    return tuple(_node(f"n{number:05}", gpus, 0) for number in range(count))


def nodes_of(kinds: Iterable[NodeKind]) -> tuple[Node, ...]:
    """The nodes that a cluster file lists."""
    nodes = []
    for kind in kinds:
        for number in range(kind.count):
            gpus = kind.slots if kind.gpu is not None else 0
            name = kind.gpu.name if kind.gpu is not None else "GPU"
            nodes.append(_node(f"{kind.name}-{number:05}", gpus, kind.slots, name, kind.cores))
    return tuple(nodes)


def _node(name: str, gpus: int, slots: int, kind: str = "GPU", cores: int = 64) -> Node:
    cards = tuple(Gpu(index=index, type=kind) for index in range(gpus))
    return Node(id=name, name=name, address=name, cores=cores, cpu_slots=0 if gpus else slots, gpus=cards)


def accelerator_of(nodes: Sequence[Node]) -> str:
    """What jobs ask for: GPUs, or CPU slots on a cluster that has none."""
    return "gpu" if any(node.gpus for node in nodes) else "any"


# A file of queues.


class QueueSpec(Section):
    """What a queue is entitled to; see `tuneyard queues set`."""

    weight: float = Field(1.0, gt=0)
    guaranteed: int | None = Field(None, ge=0)
    ceiling: int | None = Field(None, ge=1)
    lendable: bool = True


class QueuesFile(Section):
    """All of a file of queues, by tenant."""

    queues: dict[str, QueueSpec]


def read_queues(path: Path) -> tuple[Queue, ...]:
    """Raises SpecErrors, SpecError."""
    named = validate(QueuesFile, read_document(path)).queues
    return tuple(Queue(name, **spec.model_dump()) for name, spec in named.items())


# A file of failures.


class FailuresFile(Section):
    """Failures that are known: of a record, or of a question."""

    failures: tuple[Failure, ...]


def read_failures(path: Path, nodes: Sequence[Node]) -> tuple[Failure, ...]:
    """Those in a file, for these nodes. Raises SpecErrors, SpecError."""
    failures = validate(FailuresFile, read_document(path)).failures
    for index, failure in enumerate(failures):
        if number_of(failure, nodes) is None:
            raise SpecError(
                f"there is no node {failure.node}",
                code="no-such-node",
                field=f"failures[{index}].node",
                file=path,
                hint=f"a number from 0 to {len(nodes) - 1}, or a name such as {nodes[0].name}",
            )
    return failures


def number_of(failure: Failure, nodes: Sequence[Node]) -> int | None:
    """The number of the node that fails; None if there is no such node."""
    if isinstance(failure.node, int):
        return failure.node if 0 <= failure.node < len(nodes) else None
    return next((number for number, node in enumerate(nodes) if node.name == failure.node), None)


# The policy's numbers.


def with_overrides(rules: Rules, overrides: Iterable[str]) -> Rules:
    """`rules` with each `rules.FIELD=VALUE`. Raises SpecError."""
    for override in overrides:
        document = Document(path=None, data={})
        apply_override(document, override)
        (head, inner), *_ = document.data.items()
        if head != "rules" or not isinstance(inner, dict) or len(inner) != 1:
            raise _bad(override, None, "only `rules.FIELD` can be set", "for example --set rules.min_run_s=600")
        ((name, value),) = inner.items()
        known = {one.name: getattr(rules, one.name) for one in dataclasses.fields(rules)}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean rules.{near[0]}?" if near else f"the fields are {', '.join(known)}"
            raise _bad(override, name, f"the rules have no {name}", hint)
        changes: dict[str, Any] = {name: _like(known[name], value, override, name)}
        rules = dataclasses.replace(rules, **changes)
    return rules


def _like(default: object, value: object, override: str, name: str) -> object:
    """`value` as what the field is."""
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(default, float) and math.isfinite(value):
            return float(value)
        if value == int(value):
            return int(value)
        wanted = "a whole number"
    else:
        wanted = "a number"
    raise _bad(override, name, f"it must be {wanted}", f"it is {default} if nothing is said")


def _bad(override: str, name: str | None, message: str, hint: str) -> SpecError:
    field = f"rules.{name}" if name else None
    return SpecError(f"--set {override}: {message}", code="bad-override", field=field, hint=hint)
