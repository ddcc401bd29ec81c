"""What a job leaves behind, put together from what its ranks told. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.contract import ExitCode, RankExit, RunContract
from orchestrator.cluster.status import AttemptStatus, Spent
from orchestrator.recover.classify import Verdict


def job_result(contract: RunContract, exits: Sequence[RankExit]) -> dict[str, Any]:
    """The result of an attempt that succeeded; lists are by rank. Of a user's own command little is known."""
    plan = contract.plan
    told = [end.result for end in sorted(exits, key=lambda end: end.rank) if end.result is not None]
    result: dict[str, Any] = {
        "engine": plan.engine,
        "zero_stage": plan.zero_stage,
        "world_size": plan.world_size,
        "output_dir": contract.output_dir,
    }
    if told:
        # What the ranks found themselves running, not what was planned; they refuse to differ.
        result |= {"engine": told[0].engine, "zero_stage": told[0].zero_stage, "world_size": told[0].world_size}
        result["metrics"] = told[0].metrics or {}
        result["train"] = told[0].train.model_dump(mode="json") if told[0].train else None
        for name in ("peak_bytes", "moment_bytes", "master_bytes"):
            result[name] = [getattr(one, name) for one in told]
        result["output_dir"] = told[0].output_dir or contract.output_dir
    return result


def job_error(verdict: Verdict, contract: RunContract) -> dict[str, Any]:
    """Why an attempt failed: the first failing rank, in its own words."""
    first = verdict.first
    if first is None:
        nodes = ", ".join(share.node for share in contract.nodes)
        return {
            "code": verdict.outcome.value,
            "message": f"a node of the gang was lost ({nodes})",
            "hint": "see `tuneyard describe`; the job is started again while retry.max_restarts allows it",
            "rank": None,
        }
    error = first.error
    return {
        "code": error.code if error else verdict.outcome.value,
        "message": error.message if error else f"rank {first.rank} ended with {first.code.name}",
        "field": error.field if error else None,
        "hint": (error.hint if error else None)
        or f"the whole log: tuneyard logs {contract.job_id} --rank {first.rank}",
        "traceback": error.traceback if error else None,
        "rank": first.rank,
        "exit_code": int(first.code),
        "signal": first.signal,
    }


def metrics_sentence(exits: Sequence[RankExit]) -> str:
    """`f1_macro 0.966, accuracy 0.985`, or how many ranks ended well."""
    for end in exits:
        if end.result is not None and end.result.metrics:
            return ", ".join(f"{name} {value:.4g}" for name, value in sorted(end.result.metrics.items()))
    return f"{sum(end.code == ExitCode.DONE for end in exits)} ranks ended well"


def last_spent(verdict: Verdict, status: AttemptStatus | None, before: Spent | None) -> Spent | None:
    """Where the time of an attempt went that has ended, and when it failed, if that is known."""
    spent = (status.spent if status is not None else None) or before
    if spent is None or verdict.first is None:
        return spent
    return spent.model_copy(update={"failed_at": verdict.first.time})
