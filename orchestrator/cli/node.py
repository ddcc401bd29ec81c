"""`tuneyard node`: this machine as a node of a yard elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.output import Format, Output, err, out, print_json
from orchestrator.errors import SpecError

app = typer.Typer(help="Let this machine be a node of a yard elsewhere.", no_args_is_help=True)

TOKEN = "The yard's token is read from this file; else from TUNEYARD_TOKEN."


@app.command()
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="The yard's API, as `tuneyard up` printed it.")],
    token_file: Annotated[Path | None, typer.Option("--token-file", help=TOKEN)] = None,
    token_stdin: Annotated[bool, typer.Option("--token-stdin", help="The token comes from standard input.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="Of the node; the host's if none is given.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Of this machine, where other nodes reach it; else found out.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="For placement, such as tuneyard.io/rack=r7. Repeatable."),
    ] = None,
    block: Annotated[bool, typer.Option("--block", help="Stay in the foreground, as a service does.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Let this machine take ranks of a yard's jobs, until `tuneyard node leave`.

    Ray is kept up here: when the yard or the network was away, the node comes back by itself.
    """
    from orchestrator.settings import Settings
    from orchestrator.yard import joined

    settings = Settings()
    token = _token(settings.token.get_secret_value() if settings.token else None, token_file, stdin=token_stdin)
    labels = dict(_pair(text) for text in label or ())
    record = joined.prepare(settings, url, token, name=name, address=address, labels=labels)
    if block:
        joined.keep(settings)
        return
    with err.status(f"joining {url}"):
        record = joined.join(settings, record)
    if output == Format.JSON:
        print_json(record.model_dump(mode="json"))
        return
    log = settings.root / "logs" / "node.log"
    out.print(f"{record.name} ({record.address}) is a node of {record.url}; its log is {log}")
    if not joined.sees_home(settings, record):
        out.print(
            "→ [yellow]this machine does not see the yard's directory[/yellow]: jobs that run here need models, data "
            "and `checkpoint.directory` on storage that all nodes see (NFS, s3://...)"
        )


@app.command()
def leave(
    force: Annotated[bool, typer.Option("--force", help="At once: what runs here goes on elsewhere.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Leave the yard: what runs here saves first and goes on elsewhere, then Ray ends."""
    from orchestrator.settings import Settings
    from orchestrator.yard import joined

    settings = Settings()
    with err.status("leaving"):
        record = joined.leave(settings, force=force)
    if output == Format.JSON:
        print_json({"left": record is not None})
    else:
        out.print(f"{record.name} has left {record.url}" if record else "this machine is no node of a yard")


def _token(setting: str | None, file: Path | None, *, stdin: bool) -> str:
    if stdin:
        token = sys.stdin.readline().strip()
    elif file is not None:
        try:
            token = file.read_text().strip()
        except OSError as problem:
            raise SpecError(
                f"cannot read {file}: {problem.strerror}", code="file-unreadable", field="token-file", hint="check it"
            ) from None
    else:
        token = setting or ""
    if not token:
        raise SpecError(
            "a yard's token is needed to join it",
            code="no-token",
            field="token",
            hint="copy TUNEYARD_HOME/token of the yard's machine here, and give --token-file",
        )
    return token


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key or not value or "," in text:
        raise SpecError(
            f"--label {text} is no KEY=VALUE", code="bad-label", field="label", hint="such as tuneyard.io/rack=r7"
        )
    return key, value
