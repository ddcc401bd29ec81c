"""The verbs, gathered."""

from __future__ import annotations

import typer

from launch import __version__
from orchestrator.cli import (
    cancel,
    checkpoint,
    cordon,
    data,
    describe,
    doctor,
    goodput,
    init,
    logs,
    ls,
    node,
    nodes,
    pause,
    plan,
    priority,
    probe,
    queue,
    queues,
    render,
    reproduce,
    run,
    schema,
    simulate,
    submit,
    unit,
    up,
    wait,
    weights,
)

app = typer.Typer(
    name="tuneyard",
    help="Queue, place and run fine-tuning jobs on the GPUs of a cluster, or on one CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit statuses: 0 done, 1 the job failed, 2 bad input, 3 no yard answers, 4 not possible now, "
    "5 cancelled, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and end.", callback=_version, is_eager=True
    ),
) -> None:
    pass


app.command("init")(init.init)
app.command("data")(data.data)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("reproduce")(reproduce.reproduce)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("unit")(unit.unit)
app.command("submit")(submit.submit)
app.command("render")(render.render)
app.command("ls")(ls.ls)
app.command("describe")(describe.describe)
app.command("logs")(logs.logs)
app.command("wait")(wait.wait)
app.command("pause")(pause.pause)
app.command("resume")(pause.resume)
app.command("cancel")(cancel.cancel)
# A priority may be below zero, which is no option.
app.command("priority", context_settings={"ignore_unknown_options": True})(priority.priority)
app.add_typer(queues.app, name="queues")
checkpoint.app.command("export")(weights.export)
checkpoint.app.command("import")(weights.import_)
checkpoint.app.command("diff")(weights.diff)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("nodes")(nodes.nodes)
app.add_typer(node.app, name="node")
app.command("queue")(queue.queue)
app.command("why")(queue.why)
app.command("goodput")(goodput.goodput)
app.command("cordon")(cordon.cordon)
app.command("drain")(cordon.drain)
app.command("uncordon")(cordon.uncordon)
app.command("probe")(probe.probe)
app.command("simulate")(simulate.simulate)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
