"""`tuneyard checkpoint export | import | diff`: what needs tensors, and so runs in a process that has torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.checkpoint import Id, Target
from orchestrator.cli.output import Format, Output, out, print_json, size
from orchestrator.errors import SpecError

SHOWN = 20
"""Changed tensors that `diff` lists; -o json has all."""


def export(
    target: Target,
    id_: Id,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where it goes; must not exist.")],
    merge: bool = typer.Option(False, "--merge", help="Fold an adapter into the base's weights."),
    best: bool = typer.Option(False, "--best", help="The weights of the best evaluation so far (train.keep_best)."),
    dtype: str = typer.Option("float32", "--dtype", help="float32, bfloat16 or float16."),
    max_shard_gb: float = typer.Option(5.0, "--max-shard-gb", min=0.01, help="Most of one file, in 10^9 bytes."),
    output: Output = Format.TEXT,
) -> None:
    """Write a checkpoint as a directory that transformers, or peft for an adapter, loads.

    Needs no GPU, and no more memory than the largest file.
    """
    from orchestrator.cli.stores import locate, pick

    if dtype not in ("float32", "bfloat16", "float16"):
        raise SpecError(f"there is no dtype {dtype}", code="usage", hint="float32, bfloat16 or float16")
    catalogue = locate(target)
    found = pick(catalogue.listing(), id_)
    options = [*(["--merge"] if merge else []), *(["--best"] if best else [])]
    told = _run(
        "export", catalogue.storage.url, str(found), str(directory.absolute()), "--dtype", dtype,
        "--max-shard-bytes", str(int(max_shard_gb * 1e9)), *options,
    )  # fmt: skip
    if output == Format.JSON:
        print_json(told)
    else:
        text = f"{told['kind']} of {told['id']} in {told['directory']}: {told['tensors']} tensors, {size(told['size'])}"
        out.print(text, markup=False)


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What save_checkpoint or save_state wrote.")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where it goes; must not exist.")],
    model: str = typer.Option(..., "--model", help="The model that was trained: a directory or a hub id."),
    output: Output = Format.TEXT,
) -> None:
    """Make a model directory of a checkpoint of DeepSpeed or Accelerate, to begin a job with its weights.

    Name the directory as the job's `model.name_or_path`. The optimizer begins anew.
    """
    told = _run("stock", str(source.absolute()), str(directory.absolute()), "--model", model)
    if output == Format.JSON:
        print_json(told)
    else:
        out.print(f"weights of {told['kind']} in {told['directory']}: {told['tensors']} tensors", markup=False)


def diff(
    target: Target,
    first: Annotated[str, typer.Argument(metavar="ID")],
    second: Annotated[str, typer.Argument(metavar="ID")],
    other: Annotated[
        str | None, typer.Option("--with", metavar="JOB|DIRECTORY|URL", help="Where the second is, if elsewhere.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Tell what differs between two checkpoints: step, layout, and tensor by tensor. Exit 1 if a tensor does."""
    from orchestrator.cli.stores import locate, pick

    mine = locate(target)
    theirs = locate(other) if other is not None else mine
    ids = [str(pick(mine.listing(), first)), str(pick(theirs.listing(), second))]
    told = _run("diff", mine.storage.url, *ids, "--second-store", theirs.storage.url)
    if output == Format.JSON:
        print_json(told)
    else:
        _tell(told)
    if told["changed"] or told["reshaped"] or told["only_in_first"] or told["only_in_second"]:
        raise typer.Exit(1)


def _tell(told: dict[str, Any]) -> None:
    first, second = told["ids"]
    for name, (a, b) in told["facts"].items():
        out.print(f"{name}: {a} in {first}, {b} in {second}", markup=False)
    for key, words in (("only_in_first", f"only in {first}"), ("only_in_second", f"only in {second}")):
        for name in told[key]:
            out.print(f"{name}: {words}", markup=False)
    for name in told["reshaped"]:
        out.print(f"{name}: of another shape", markup=False)
    changed = told["changed"]
    if changed:
        table = Table("TENSOR", "LARGEST DIFFERENCE", "RELATIVE", box=None, pad_edge=False)
        for entry in changed[:SHOWN]:
            numbers = ["-" if entry[key] is None else f"{entry[key]:.3g}" for key in ("max_abs", "relative")]
            table.add_row(entry["name"], *numbers)
        out.print(table)
    more = f", of which {SHOWN} are shown" if len(changed) > SHOWN else ""
    out.print(f"{told['equal']} tensors are equal, {len(changed)} differ{more}")


def _run(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m launch.checkpoint.MODULE` answers, a line of JSON.

    Raises:
        SpecError: with the error's own code and hint; or the process failed without a word.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # DeepSpeed looks for GPUs otherwise
    done = subprocess.run(
        [sys.executable, "-m", f"launch.checkpoint.{module}", *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    try:
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        tail = done.stderr.strip().splitlines()[-1:] or ["no word"]
        raise SpecError(f"it failed: {tail[0]}", code=f"{module}-failed", hint="please report this") from None
    if "error" in told:
        error = told["error"]
        raise SpecError(error["message"], code=error["code"], field=error["field"], hint=error["hint"])
    return told
