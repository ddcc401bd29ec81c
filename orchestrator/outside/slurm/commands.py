"""Slurm's own commands: what is asked, and what their words mean. Parsing is pure."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster.gpus import KNOWN, gpu_type
from orchestrator.cluster.model import HOST_SHARE, Gpu, Node
from orchestrator.errors import ExecutorError, YardError

PATIENCE_S = 60.0
UNIX_TIMES = {"SLURM_TIME_FORMAT": "%s"}
MIB = 1 << 20
NODE_FORMAT = "%P|%l|%L|%N|%T|%c|%m|%G"
QUEUE_FORMAT = "%i|%A|%T|%S|%V|%D|%P|%N|%r"
GRES_LABEL = "slurm/gres"
GONE = frozenset(
    {"down", "drained", "draining", "fail", "failing", "unknown", "future", "perfctrs", "reserved", "maint"}
)
"""States of nodes on which nothing starts."""
UNREACHABLE = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "Zero Bytes were")
NOT_KNOWN = "Invalid job id"


@dataclass(frozen=True)
class Queued:
    """A job, or an element of an array, as squeue tells of it."""

    id: str
    """1234, or 1234_5 of an array."""
    raw_id: str
    """Under which the element of an array runs."""
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    start: float | None
    """When it began, or is expected to, in unix time."""
    submitted: float | None
    nodes: int
    partition: str
    where: str
    reason: str


@dataclass(frozen=True)
class Partition:
    """Nodes that are up, and how long a job may hold them, in seconds; None for as long as it likes."""

    name: str
    nodes: tuple[Node, ...]
    limit_s: float | None
    default_s: float | None
    """The limit of a job that says nothing."""


def ask(*argv: str, text: str | None = None) -> str:
    """What a command of Slurm's answers; `text` is its standard input.

    Raises:
        YardError: Slurm is not installed here, or its controller does not answer.
        ExecutorError: it refused, in its own words.
    """
    try:
        done = subprocess.run(
            argv, input=text, env={**os.environ, **UNIX_TIMES}, capture_output=True, text=True, check=False,
            timeout=PATIENCE_S,
        )  # fmt: skip
    except FileNotFoundError as problem:
        raise YardError(
            f"there is no `{argv[0]}` here", code="no-slurm", hint="run this where Slurm's commands are: a login node"
        ) from problem
    except subprocess.TimeoutExpired as problem:
        raise _unreachable(f"`{argv[0]}` took longer than {PATIENCE_S:.0f} s") from problem
    if done.returncode == 0:
        return done.stdout
    told = re.sub(rf"^{argv[0]}: (error|fatal): ", "", (done.stderr or done.stdout).strip(), flags=re.MULTILINE)
    if any(sign in told for sign in UNREACHABLE):
        raise _unreachable(" ".join(told.splitlines()))
    raise ExecutorError(f"`{argv[0]}` refused: {' '.join(told.splitlines())}", code="slurm-refused")


def _unreachable(message: str) -> YardError:
    return YardError(
        f"Slurm does not answer: {message}", code="slurm-unreachable", hint="is slurmctld up? `scontrol ping` tells"
    )


def partition(name: str | None) -> Partition:
    """The named partition, or the default one. Raises as `ask`, and ExecutorError where there is none of that name."""
    argv = ["sinfo", "--noheader", "--Node", f"--format={NODE_FORMAT}"]
    found = parse_partitions(ask(*argv, *([f"--partition={name}"] if name is not None else [])), name)
    if found is None:
        raise ExecutorError(
            f"Slurm has no partition {name}" if name is not None else "Slurm has no default partition",
            code="no-partition",
            hint="`sinfo` lists them; name one: --with partition=NAME",
        )
    return found


def parse_partitions(answer: str, name: str | None) -> Partition | None:
    """The partition `name`, or the one that a star marks as the default, from rows of NODE_FORMAT."""
    rows = [line.split("|", 3) for line in answer.splitlines()]
    mine = [row for row in rows if (row[0].endswith("*") if name is None else row[0].rstrip("*") == name)]
    if not mine:
        return None
    called, limit, default, _ = mine[0]
    nodes = tuple(node for *_, row in mine if (node := parse_node(row)) is not None)
    limit_s = parse_time(limit)
    return Partition(called.rstrip("*"), nodes, limit_s, parse_time(default) or limit_s)


def parse_node(row: str) -> Node | None:
    """Name, state, CPUs, memory in MiB and gres of a node; None for one on which nothing starts."""
    name, state, cpus, memory, gres = row.split("|", 4)
    if re.sub(r"[^a-z].*", "", state.lower()) in GONE:
        return None
    return Node(
        id=name,
        name=name,
        address=name,
        cores=int(cpus.rstrip("+")),
        cpu_slots=int(cpus.rstrip("+")),
        memory_bytes=int(int(memory.rstrip("+")) * MIB * HOST_SHARE),
        gpus=tuple(
            Gpu(index=index, type=kind, memory_bytes=known.memory_bytes if (known := gpu_type(kind)) else None)
            for index, kind in enumerate(parse_gres(gres))
        ),
        labels={GRES_LABEL: gres},
    )


_GRES = re.compile(r"gpu(?::(?P<type>[^:(),\s]+))??:(?P<count>\d+)")


def parse_gres(text: str) -> list[str]:
    """`gpu:h100:2(S:0-1),gpu:a100:1` as the types of its GPUs, in the words of job files."""
    found = []
    for match in _GRES.finditer(text):
        found += [gpu_word(match["type"])] * int(match["count"])
    return found


def gpu_word(gres_type: str | None) -> str:
    """`nvidia_h100_80gb_hbm3` as `H100`: the type that job files call so; one that is not known as it is."""
    if gres_type is None:
        return "GPU"
    words = re.split(r"[_-]", gres_type)
    whole = gpu_type(gres_type.replace("_", "-"))
    if whole is not None:
        return whole.name
    return next((KNOWN[word.lower()].name for word in words if word.lower() in KNOWN), gres_type)


def gres_type(gres: str, word: str) -> str | None:
    """The name that Slurm has for GPUs that job files call `word`, in a node's `gres`; None if it has none."""
    return next((match["type"] for match in _GRES.finditer(gres) if gpu_word(match["type"]) == word), None)


def gres_of(node: Node, kind: str | None, count: int) -> str | None:
    """How so many GPUs of a kind are asked for of a node like this, by the name that Slurm has for them."""
    if kind is None:
        return None
    name = gres_type(node.labels.get(GRES_LABEL, ""), kind)
    return f"gpu:{name}:{count}" if name is not None else f"gpu:{count}"


def queue(ids: Sequence[str] = ()) -> dict[str, Queued]:
    """What Slurm still knows of jobs, by id, elements of arrays one by one; those that it does not know are left out.
    Without `ids` all that it knows of this user's."""
    argv = ["squeue", "--noheader", "--array", "--states=all", f"--format={QUEUE_FORMAT}"]
    try:
        answer = ask(*argv, f"--jobs={','.join(ids)}" if ids else "--me")
    except ExecutorError as problem:
        if NOT_KNOWN in problem.message:
            return {}
        raise
    return {row.id: row for row in map(parse_queued, answer.splitlines())}


def parse_queued(row: str) -> Queued:
    """A row of QUEUE_FORMAT."""
    job, raw, state, start, submitted, nodes, name, where, reason = row.split("|", 8)
    return Queued(
        id=job,
        raw_id=raw,
        state=state,
        start=parse_moment(start),
        submitted=parse_moment(submitted),
        nodes=int(nodes),
        partition=name,
        where=where,
        reason=reason.strip(),
    )


def parse_moment(text: str) -> float | None:
    """A time as UNIX_TIMES has Slurm write it; None for one that nobody knows."""
    return float(text) if text.isdigit() else None


def parse_time(text: str) -> float | None:
    """A time limit in seconds: `30:00`, `1:00:00`, `2-00:00:00`; None for `infinite` and what else is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def time_text(seconds: float) -> str:
    """`2-03:00:00`, rounded up to whole minutes, as Slurm counts."""
    minutes = max(1, -(-int(seconds) // 60))
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00" if days else f"{rest // 60:02}:{rest % 60:02}:00"


def fields_of(record: str) -> dict[str, str]:
    """A record that `scontrol --oneliner show` prints; values with spaces are cut at the first."""
    return dict(word.partition("=")[::2] for word in record.split() if "=" in word)


def kill_wait() -> float:
    """Seconds between Slurm's SIGTERM and its SIGKILL."""
    match = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config"), flags=re.MULTILINE)
    return float(match[1]) if match else 30.0


def addresses(nodes: str) -> dict[str, str]:
    """Name → address of the nodes of a list such as `n[1-4]`, in its order."""
    names = ask("scontrol", "show", "hostnames", nodes).split()
    rows = [fields_of(row) for row in ask("scontrol", "--oneliner", "show", "node", nodes).splitlines()]
    known = {row["NodeName"]: row.get("NodeAddr", row["NodeName"]) for row in rows if "NodeName" in row}
    return {name: known.get(name, name) for name in names}


def end_of(job: str) -> float | None:
    """When Slurm will end a running job, in unix time; None where it has no time limit."""
    record = fields_of(ask("scontrol", "--oneliner", "show", "job", job))
    return parse_moment(record.get("EndTime", "")) if record.get("TimeLimit") != "UNLIMITED" else None
