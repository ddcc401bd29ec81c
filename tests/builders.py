"""Builders of jobs, nodes and exits: a test says only what matters to it."""

from __future__ import annotations

import json
from typing import Any

from launch.attempt import ExitCode
from launch.config import TrainSpec
from launch.contract import Device, ExecutionPlan, RankError, RankExit
from launch.document import parse_document
from launch.provenance import BaseWeights, NodeUse, RunRecord, Surroundings
from orchestrator.cluster.capacity import RACK_LABEL, SPINE_LABEL, Capacity
from orchestrator.cluster.model import UNKNOWN_NEED, Gpu, Need, Node, Option
from orchestrator.control.actions import Action
from orchestrator.control.board import Board
from orchestrator.control.dispatch import dispatch
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.control.reconcile import reconcile
from orchestrator.job.spec import AnyJob, load_job
from orchestrator.schedule.gang import Gang, Held
from orchestrator.schedule.place import room_for
from orchestrator.schedule.yard import Yard


def a_command_job(processes: int | str = 1, **keys: Any) -> AnyJob:
    """A job that runs a command; `keys` are keys of the job file."""
    data = {"name": "job", "run": ["true"], "resources": {"num_processes": processes}} | keys
    return load_job(parse_document(json.dumps(data)))


def a_training_job(processes: int = 1, **keys: Any) -> AnyJob:
    """A job that trains; `keys` are keys of the job file."""
    data = {
        "name": "job",
        "model": {"name_or_path": "org/model", "task": "sequence-classification"},
        "data": {"train": "train.csv"},
        "train": {"max_steps": 10},
        "resources": {"num_processes": processes},
    } | keys
    return load_job(parse_document(json.dumps(data)))


def a_node(
    name: str = "n0",
    slots: int = 4,
    gpus: int = 0,
    gpu_type: str = "H100",
    cores: int = 8,
    memory_gib: float | None = None,
    gpu_memory_gib: float | None = None,
    rack: str | None = None,
    spine: str | None = None,
    bf16: bool = False,
) -> Node:
    gpu_bytes = None if gpu_memory_gib is None else int(gpu_memory_gib * 2**30)
    return Node(
        id=name,
        name=name,
        address=f"10.0.0.{abs(hash(name)) % 250}",
        cores=cores,
        cpu_slots=slots,
        memory_bytes=None if memory_gib is None else int(memory_gib * 2**30),
        gpus=tuple(Gpu(index=index, type=gpu_type, memory_bytes=gpu_bytes) for index in range(gpus)),
        bf16=bf16,
        labels={label: name for label, name in ((RACK_LABEL, rack), (SPINE_LABEL, spine)) if name is not None},
    )


def a_gang(job_id: str, processes: int = 1, most: int | None = None, **changes: Any) -> Gang:
    """Its number is its place in the order of submission."""
    values: dict[str, Any] = {
        "job_id": job_id,
        "sequence": int("".join(c for c in job_id if c.isdigit()) or 0),
        "priority": 0,
        "min_processes": processes,
        "max_processes": most or processes,
        "accelerator": "any",
    }
    return Gang(**(values | changes))


def an_option(processes: int = 1, host: float = 1, device: float = 0) -> Option:
    """A way to run that needs so many GiB a rank; on GPUs if any of theirs."""
    where: Device = "cuda" if device else "cpu"
    plan = ExecutionPlan(
        engine="ddp", world_size=processes, device=where, micro_batch_size=1, gradient_accumulation_steps=1
    )
    return Option(processes, where, Need(device_bytes=int(device * 2**30), host_bytes=int(host * 2**30)), plan)


def hold(yard: Yard, gang: Gang, *nodes: str, processes: int | None = None, **changes: Any) -> Held:
    """`gang` holds slots of the yard from now on, of these nodes alone if any are named; as many as it may have."""
    room = yard.capacity
    if nodes:
        taken = (held.placement for held in yard.running.values())
        room = Capacity.of(room.nodes, taken, closed=(node.id for node in room.nodes if node.id not in nodes))
    found = room_for(room, gang, processes or gang.most)
    assert found is not None, f"no room for {gang.job_id}"
    where, option = found
    placement = room.placement(where, gang.accelerator, option.need if option is not None else UNKNOWN_NEED)
    held = Held(gang, placement, **({"since": 0.0} | changes))
    yard.hold(held)
    return held


def looked(state: State, facts: Facts, now: float, policy: Policy) -> list[Action]:
    """What a controller does about attempts, and then about the queue, of which it knows nothing newer."""
    return [*reconcile(state, facts, now, policy), *dispatch(state, facts, now, policy, Board(policy.rules))]


def an_exit(
    rank: int = 0,
    code: ExitCode = ExitCode.DONE,
    time: float = 1.0,
    message: str | None = None,
    cause: str = "oops",
    **told: Any,
) -> RankExit:
    """`cause` is its RankError's code, `told` are more fields of that."""
    error = RankError(code=cause, message=message or "", **told) if message or told else None
    return RankExit(rank=rank, code=code, time=time, error=error)


def a_record(**changes: Any) -> RunRecord:
    """The record of a run on two processes of one node."""
    spec = {
        "name": "small",
        "model": {"name_or_path": "org/model", "task": "sequence-classification"},
        "data": {"train": "org/data"},
        "train": {"max_steps": 1},
    }
    values: dict[str, Any] = {
        "job": "small-1",
        "spec": TrainSpec.model_validate_json(json.dumps(spec)),
        "seed": 0,
        "plan": ExecutionPlan(
            engine="zero2", world_size=2, device="cpu", micro_batch_size=3, gradient_accumulation_steps=3
        ),
        "nodes": (NodeUse(processes=2, threads=1),),
        "threads": (1, 1),
        "data": {"train": "f1"},
        "base": BaseWeights(),
        "job_file": None,
        "surroundings": Surroundings(versions={"torch": "1"}, python="3", system="Linux", cpu="a CPU"),
        "attempts": 1,
        "command": "tuneyard reproduce small",
    }
    return RunRecord(**(values | changes))
