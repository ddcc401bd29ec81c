"""`tuneyard run`: a job from start to end in this process, no yard needed."""

from __future__ import annotations

import typer

from launch.contract import Origin
from launch.git import git_state
from orchestrator.cli.files import JobFile, Overrides, read_job, read_sizing, told_where
from orchestrator.cli.output import Format, Output, job_json, print_json
from orchestrator.cli.progress import follow, summary
from orchestrator.cli.status import of_job
from orchestrator.cluster.capacity import Capacity
from orchestrator.schedule.explain import check_possible
from orchestrator.settings import Settings


def run(
    file: JobFile,
    set_: Overrides = None,
    output: Output = Format.TEXT,
    quiet: bool = typer.Option(False, "-q", "--quiet", help="No progress on stderr."),
) -> None:
    """Run a job file on this machine to its end, and print what came of it.

    Needs no yard and no Ray: the controller lives in this process and ends the job with it. Ctrl-C asks the ranks
    to stop at their next step; a second one ends them at once.
    """
    # Imported late: the other verbs need neither database nor executor.
    from orchestrator.cli.embedded import run_here
    from orchestrator.control.wishes import gang_of_new
    from orchestrator.execute.local import LocalExecutor

    job, document = read_job(file, set_)
    sizing = read_sizing(job)
    settings = Settings()
    executor = LocalExecutor(settings.cpu_slots, owned=True, memory_gb=settings.memory_gb)
    nodes = tuple(executor.nodes())
    with told_where(document):
        check_possible(Capacity(nodes), gang_of_new("run", job, sizing=sizing, nodes=nodes))
    view = follow(run_here(job, Origin(git=git_state(file)), settings, executor, sizing), quiet=quiet)
    if output == Format.JSON:
        print_json(job_json(view))
    else:
        summary(view)
    raise typer.Exit(of_job(view.state))
