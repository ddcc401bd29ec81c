"""Builders of jobs, nodes and exits: a test says only what matters to it."""

from __future__ import annotations

import json
from typing import Any

from launch.attempt import ExitCode
from launch.config import TrainSpec
from launch.contract import ExecutionPlan, RankError, RankExit
from launch.document import parse_document
from launch.provenance import BaseWeights, NodeUse, RunRecord, Surroundings
from orchestrator.cluster.model import Gpu, Node
from orchestrator.job.spec import AnyJob, load_job
from orchestrator.schedule.decide import Waiting


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
    )


def a_waiting(job_id: str, processes: int = 1, most: int | None = None, **changes: Any) -> Waiting:
    values: dict[str, Any] = {
        "job_id": job_id,
        "sequence": int("".join(c for c in job_id if c.isdigit()) or 0),
        "priority": 0,
        "min_processes": processes,
        "max_processes": most or processes,
        "accelerator": "any",
    }
    return Waiting(**(values | changes))


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
