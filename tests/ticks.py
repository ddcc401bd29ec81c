"""One tick of the controller, with plain objects."""

from __future__ import annotations

from typing import Any

from launch.contract import RunContract
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.job.spec import dump_job
from orchestrator.memory.plan import plan
from orchestrator.schedule.place import place
from orchestrator.store.rows import AttemptRow, JobRow
from tests.builders import a_command_job, a_node, looked

NODE = a_node("n0", slots=4)
OTHER = a_node("n1", slots=4)
POLICY = Policy(leash=10, leash_margin=2, stop_grace=60, pause_grace=600)
NOW = 1000.0


def a_row(job_id: str = "job-1", state: JobState = JobState.QUEUED, **changes: Any) -> JobRow:
    job = changes.pop("job", None) or a_command_job(2)
    values: dict[str, Any] = {
        "sequence": 1, "id": job_id, "name": "job", "queue": "default", "priority": 0, "spec": dump_job(job),
        "state": state, "reason": Reason(code=ReasonCode.SUBMITTED, sentence="s"), "attempts": 0,
        "cancel_requested": False, "not_before": None, "submitted_at": 0.0, "started_at": None, "finished_at": None,
        "error": None, "result": None,
    }  # fmt: skip
    return JobRow(**(values | changes))


def an_attempt(
    state: AttemptState = AttemptState.RUNNING, processes: int = 2, nodes: tuple = (NODE,), **changes: Any
) -> AttemptRow:
    placement = place(Capacity(nodes=nodes), processes, "any")
    assert isinstance(placement, Placement)
    contract = RunContract(
        run_id="job-1.1", job_id="job-1", attempt=1, plan=plan(a_command_job(processes), processes, "cpu"),
        nodes=placement.shares, main_port=1, run_dir="/nowhere", output_dir="/nowhere", checkpoint_dir="/nowhere",
        tracker_dir="/nowhere",
        command=("true",), leash_s=10,
    )  # fmt: skip
    values: dict[str, Any] = {
        "job_id": "job-1", "number": 1, "state": state, "contract": contract.model_dump_json(),
        "placement": placement.model_dump_json(), "created_at": NOW - 1, "started_at": None, "ended_at": None,
        "last_contact": NOW, "stop": None, "outcome": None, "progress": None,
    }  # fmt: skip
    return AttemptRow(**(values | changes))


def a_report(index: int = 0, **changes: Any) -> NodeReport:
    return NodeReport(**({"node_index": index, "reachable": True, "claimed": True, "begun": True} | changes))


def actions_for(
    job: JobRow, attempt: AttemptRow | None = None, *reports: NodeReport, nodes: tuple = (NODE,), now: float = NOW
) -> list[Any]:
    statuses = {attempt.run.run_id: AttemptStatus(reports=reports)} if attempt else {}
    state = State(jobs=[job], attempts=[attempt] if attempt else [])
    return looked(state, Facts(nodes=nodes, statuses=statuses), now, POLICY)


def running(**changes: Any) -> JobRow:
    return a_row(state=JobState.RUNNING, attempts=1, started_at=NOW - 1, **changes)
