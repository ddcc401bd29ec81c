"""Rows as views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.execute.request import launch_files
from orchestrator.store.rows import AttemptRow, JobRow
from orchestrator.views import AttemptView, JobView


def job_view(row: JobRow, attempts: Sequence[AttemptRow] = ()) -> JobView:
    """A job; with its attempts also its newest plan and progress, and its spec."""
    data = row.model_dump(exclude={"spec"})
    if not attempts:
        return JobView.model_validate(data)
    newest = attempts[-1]
    return JobView.model_validate(
        data | {"plan": newest.plan, "progress": newest.progress, "spec": json.loads(row.spec)}
    )


def attempt_view(row: AttemptRow) -> AttemptView:
    """An attempt, with the very configuration that its launcher was given."""
    run = row.run
    return AttemptView(
        number=row.number,
        state=row.state,
        plan=run.plan,
        nodes=run.nodes,
        run_dir=run.run_dir,
        checkpoint_dir=run.checkpoint_dir,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        outcome=row.outcome,
        progress=row.progress,
        launch={Path(path).name: text for path, text in launch_files(run, 0).items()},
    )
