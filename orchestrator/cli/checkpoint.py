"""`tuneyard checkpoint`: a look at the checkpoints of a job or a directory, and care for them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.output import Format, Output, age, out, print_json, size
from orchestrator.cli.status import JOB_FAILED
from orchestrator.errors import NotFoundError, SpecError

if TYPE_CHECKING:
    from launch.checkpoint.catalogue import Catalogue
    from launch.checkpoint.manifest import CheckpointId, Manifest
    from launch.checkpoint.verify import Finding
    from orchestrator.cli.stores import Seen

app = typer.Typer(
    help="Look at the checkpoints of a job, verify them, and keep or delete them.", no_args_is_help=True,
    rich_markup_mode="markdown",
)  # fmt: skip

Target = Annotated[
    str, typer.Argument(metavar="JOB|DIRECTORY|URL", help="A job by id or name, or a store itself; that needs no yard.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="`latest`, a step, or all of `step-120.attempt-1`.")]


@app.command()
def ls(target: Target, output: Output = Format.TEXT) -> None:
    """List checkpoints, the newest first, and what each counts for."""
    from orchestrator.cli.stores import locate, look

    catalogue = locate(target)
    seen = look(catalogue, catalogue.listing())
    if output == Format.JSON:
        print_json([_row(one) for one in seen])
        return
    if not seen:
        out.print(f"no checkpoints in {catalogue.storage.url}{_nearby(catalogue)}", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("CHECKPOINT", no_wrap=True)  # it says step and attempt
    for heading in ("AGE", "SIZE", "LAYOUT", "METRICS", "STATE"):
        table.add_column(heading, overflow="fold")
    for one in seen:
        manifest = one.manifest
        known = (
            [age(manifest.created), size(manifest.size), _layout(manifest), _metrics(manifest)] if manifest else None
        )
        table.add_row(str(one.id), *(known or ["-"] * 4), escape(_state(one)))
    out.print(table)


@app.command()
def show(target: Target, id_: Id, output: Output = Format.TEXT) -> None:
    """Tell what a checkpoint is: of which step and layout, from where, and what is in it."""
    from orchestrator.cli.stores import locate, parents, pick, see

    catalogue = locate(target)
    listing = catalogue.listing()
    found = pick(listing, id_)
    manifest = catalogue.manifest(found)
    seen = see(catalogue, listing, found)
    kinds, chain = _kinds(manifest), parents(catalogue, manifest)
    if output == Format.JSON:
        shards = [
            {"file": shard.file, "size": shard.size, "blocks": len(shard.blocks), "fragments": len(shard.fragments)}
            for shard in manifest.shards
        ]
        plan = manifest.plan.model_dump(mode="json")
        told = {"job": manifest.job, "samples": manifest.samples, "plan": plan, "scalars": manifest.scalars}
        print_json(_row(seen) | told | {"parents": chain, "tensors": kinds, "shards": shards})
        return
    plan_ = manifest.plan
    out.print(f"[bold]{found}[/bold] of {escape(manifest.job)}: {escape(_state(seen))}")
    out.print(f"  saved      {age(manifest.created)} ago, at step {manifest.step}, after {manifest.samples} samples")
    out.print(f"  layout     {_layout(manifest)} on {plan_.device}, {plan_.precision}, offload {plan_.offload}")
    out.print(f"  lineage    {' ← '.join([str(found), *chain])}")
    if manifest.metrics:
        out.print(f"  metrics    {_metrics(manifest)}")
    for name, value in sorted(manifest.scalars.items()):
        out.print(f"  {name:<10} {value:g}", markup=False)
    for kind, held in kinds.items():
        out.print(f"  {kind:<10} {held['tensors']} tensors, {held['elements']} elements, {size(held['bytes'])}")
    for shard in manifest.shards:
        out.print(f"  {shard.file}  {size(shard.size)} in {len(shard.blocks)} blocks, {len(shard.fragments)} fragments")
    out.print(f"  in all     {size(manifest.size)}, in {catalogue.storage.url}/{found}", markup=False)


@app.command()
def verify(
    target: Target,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Which; all of the lineage if none.")
    ] = None,
    all_: bool = typer.Option(False, "--all", help="Every committed one, in the lineage or not."),
    quarantine: bool = typer.Option(False, "--quarantine", help="Set damaged ones aside: no attempt loads them."),
    output: Output = Format.TEXT,
) -> None:
    """Read every byte of checkpoints and compare it with its hash; exit 1 if one is damaged."""
    from launch.checkpoint.manifest import COMMITTED
    from launch.checkpoint.verify import verify as read
    from orchestrator.cli.stores import locate, pick

    if ids and all_:
        raise SpecError("`--all` and single checkpoints exclude each other", code="usage", hint="leave one of them out")
    catalogue = locate(target)
    listing = catalogue.listing()
    wanted = [pick(listing, one) for one in ids or ()] or list(listing.committed if all_ else listing.lineage())
    if not wanted:
        raise NotFoundError(
            f"there is nothing to verify in {catalogue.storage.url}",
            code="no-such-checkpoint",
            hint="--all looks at those that are in no lineage, too" if listing.committed else "none is committed yet",
        )
    findings = []
    for found in dict.fromkeys(wanted):
        finding = read(catalogue.storage, found)
        if finding.faults and not catalogue.storage.exists(f"{found}/{COMMITTED}"):
            continue  # it was deleted meanwhile
        aside = bool(finding.faults) and quarantine
        if aside:
            catalogue.quarantine(found, str(finding.faults[0]), by_attempt=0)
        findings.append(finding)
        if output == Format.TEXT:
            _tell(finding, aside=aside)
    if output == Format.JSON:
        print_json([_finding(finding) for finding in findings])
    if any(finding.faults for finding in findings):
        raise typer.Exit(JOB_FAILED)


@app.command()
def pin(target: Target, id_: Id, output: Output = Format.TEXT) -> None:
    """Keep a checkpoint, whatever the job's retention or `prune` say."""
    from orchestrator.cli.stores import locate, pick

    catalogue = locate(target)
    found = pick(catalogue.listing(), id_)
    catalogue.pin(found)
    _pinned(found, pinned=True, output=output)


@app.command()
def unpin(target: Target, id_: Id, output: Output = Format.TEXT) -> None:
    """Let a checkpoint go when its turn comes."""
    from orchestrator.cli.stores import locate, pick

    catalogue = locate(target)
    found = pick(catalogue.listing(), id_)
    catalogue.unpin(found)
    _pinned(found, pinned=False, output=output)


@app.command()
def prune(
    target: Target,
    keep_last: int | None = typer.Option(None, "--keep-last", min=1, help="Keep the newest so many of the lineage."),
    keep_every: int | None = typer.Option(None, "--keep-every", min=1, help="Also those of every so many steps."),
    unfinished: bool = typer.Option(False, "--unfinished", help="Delete what ended attempts left unfinished."),
    quarantined: bool = typer.Option(False, "--quarantined", help="Delete what was set aside."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would go, and delete nothing."),
    yes: bool = typer.Option(False, "--yes", help="Delete without asking."),
    output: Output = Format.TEXT,
) -> None:
    """Delete checkpoints. With `--keep-last` or `--keep-every` also those that are in no lineage.

    Never deleted: the newest good one, pinned ones, and what the newest attempt may be writing.
    """
    from launch.checkpoint.retention import Retention
    from orchestrator.cli.stores import State, locate, look, may_go

    keeps = keep_last is not None or keep_every is not None
    if not (keeps or unfinished or quarantined):
        raise SpecError(
            "nothing says what may go",
            code="usage",
            hint="give --keep-last N, --keep-every M, --unfinished or --quarantined",
        )
    retention = Retention(keep_last=keep_last or 1, keep_every=keep_every) if keeps else None
    catalogue = locate(target)

    def plan() -> tuple[Mapping[CheckpointId, str], dict[CheckpointId, Manifest]]:
        listing = catalogue.listing()
        seen = look(catalogue, listing)
        good = [one.id for one in seen if one.state == State.LINEAGE]
        known = {one.id: one.manifest for one in seen if one.manifest is not None}
        return may_go(listing, good, retention, unfinished=unfinished, quarantined=quarantined), known

    gone, known = plan()
    if output == Format.TEXT:
        for found, why in gone.items():
            held = f", {size(known[found].size)}" if found in known else ""
            out.print(f"{'would delete' if dry_run else 'to delete'} {found}: {why}{held}", markup=False)
        if not gone:
            out.print("nothing to delete")
    if gone and not dry_run:
        if not yes:
            _confirm(len(gone), asks=output == Format.TEXT)
            still, _ = plan()  # attempts went on while somebody thought
            gone = {found: why for found, why in gone.items() if found in still}
        for found in gone:
            catalogue.delete(found)
        if output == Format.TEXT:
            out.print(f"deleted {len(gone)}, {size(sum(known[found].size for found in gone if found in known))}")
    if output == Format.JSON:
        rows = [
            {"id": str(found), "reason": why, "size": known[found].size if found in known else None}
            for found, why in gone.items()
        ]
        print_json({"deleted": [] if dry_run else rows, "would_delete": rows if dry_run else []})


def _confirm(count: int, *, asks: bool) -> None:
    """Raises SpecError where nobody can be asked, and typer.Abort for a no."""
    if not asks or not sys.stdin.isatty():
        raise SpecError(
            f"{count} checkpoints would be deleted, and nobody can be asked",
            code="not-confirmed",
            hint="look with --dry-run, then say --yes",
        )
    typer.confirm(f"Delete {count} checkpoints?", abort=True)


def _row(seen: Seen) -> dict[str, Any]:
    manifest = seen.manifest
    return {
        "id": str(seen.id),
        "step": seen.id.step,
        "attempt": seen.id.attempt,
        "state": seen.state.value,
        "pinned": seen.pinned,
        "reason": seen.reason,
        "created": manifest.created if manifest else None,
        "size": manifest.size if manifest else None,
        "engine": manifest.plan.engine if manifest else None,
        "world_size": manifest.plan.world_size if manifest else None,
        "metrics": manifest.metrics if manifest else None,
    }


def _state(seen: Seen) -> str:
    text = f"{seen.state}: {seen.reason}" if seen.reason else str(seen.state)
    return f"{text}, pinned" if seen.pinned else text


def _layout(manifest: Manifest) -> str:
    return f"{manifest.plan.engine} × {manifest.plan.world_size}"


def _metrics(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted((manifest.metrics or {}).items())) or "-"


def _kinds(manifest: Manifest) -> dict[str, dict[str, int]]:
    """How much there is of weights, of what the optimizer keeps of them, and so on."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in manifest.tensors.items():
        kind = re.sub(r"-\d+$", "", name.partition("/")[0])  # the ranks' random states are of one kind
        held = found.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0})
        bits = re.search(r"\d+", tensor.dtype)  # bool has none, and takes a byte
        held["tensors"] += 1
        held["elements"] += tensor.numel
        held["bytes"] += tensor.numel * (int(bits[0]) if bits else 8) // 8
    return found


def _finding(finding: Finding) -> dict[str, Any]:
    faults = [
        {"file": fault.file, "start": fault.start, "end": fault.end, "message": fault.what} for fault in finding.faults
    ]
    return {"id": str(finding.checkpoint), "good": not faults, "read": finding.read, "faults": faults}


def _tell(finding: Finding, *, aside: bool) -> None:
    if not finding.faults:
        out.print(f"{finding.checkpoint} [green]good[/green], {size(finding.read)} read")
        return
    out.print(f"{finding.checkpoint} [red]damaged[/red]{', and set aside now' if aside else ''}")
    for fault in finding.faults:
        out.print(f"  {fault}", markup=False)


def _pinned(found: CheckpointId, *, pinned: bool, output: Format) -> None:
    if output == Format.JSON:
        print_json({"id": str(found), "pinned": pinned})
    else:
        out.print(f"{found} is {'pinned' if pinned else 'not pinned any more'}")


def _nearby(catalogue: Catalogue) -> str:
    """A hint at jobs' folders one level down, which is what a job file's checkpoint.directory has."""
    folders = {name.partition("/")[0] for name in catalogue.storage.names("") if "/step-" in name}
    return f"; there are some in {', '.join(sorted(folders)[:5])} below it" if folders else ""
