"""A store of checkpoints as a person asks about it: where it is, what is in it, which one is meant, what may go.

Imported when a verb needs it: the other verbs need neither fsspec nor hashes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.checkpoint.catalogue import Catalogue, Listing
from launch.checkpoint.manifest import COMMITTED, CheckpointId, Damaged, Manifest
from launch.checkpoint.retention import Retention, superfluous
from launch.checkpoint.storage import LocalStorage, open_storage
from orchestrator.errors import NotFoundError, SpecError
from orchestrator.outside.protocol import System

READERS = 8
LATEST = "latest"


class State(enum.StrEnum):
    """What a checkpoint counts for."""

    LINEAGE = "in lineage"
    OUTSIDE = "not in lineage"  # of an attempt that was superseded: never loaded
    QUARANTINED = "quarantined"
    DAMAGED = "damaged"  # its manifest is; the next attempt sets it aside
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Seen:
    """A checkpoint in a store."""

    id: CheckpointId
    state: State
    pinned: bool = False
    reason: str | None = None
    """Of a quarantine or a damage."""
    manifest: Manifest | None = None


def locate(target: str) -> Catalogue:
    """The store that `target` names: a URL, a directory, or else a job by its id or its name.

    Raises:
        NotFoundError: no such job or directory, several jobs of that name, or a job that never started.
        CheckpointError: no such kind of store.
        YardError: a job is meant, and no yard answers.
    """
    outside = target.partition(":")[0] in set(System)  # k8s:NAMESPACE/NAME has a slash, too
    is_path = not outside and ("://" in target or "/" in target or Path(target).is_dir())
    url = target if is_path else _directory_of_job(target)
    storage = open_storage(str(Path(url).expanduser()) if "://" not in url else url)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise NotFoundError(
            f"there is no directory {storage.root}" if is_path else f"job {target} has no checkpoint in {storage.root}",
            code="no-such-store",
            hint="it is made by the first save; a directory of another machine is looked at there",
        )
    return Catalogue(storage)


def _directory_of_job(name: str) -> str:
    from orchestrator.cli.yard import holder

    with holder(name) as place:
        try:
            job = place.job(name).id
        except NotFoundError as problem:
            named = [view.id for view in place.jobs(limit=10_000) if view.name == name]
            if not named:
                hint = "see `tuneyard ls`; a directory is written with a slash: ./checkpoints"
                raise NotFoundError(problem.message, field="target", hint=hint) from problem
            if len(named) > 1:
                raise NotFoundError(
                    f"{len(named)} jobs have the name {name}",
                    code="ambiguous-job",
                    hint=f"say which: {_few(named[::-1])}",
                ) from problem
            job = named[0]
        attempts = place.attempts(job)
    if not attempts or attempts[-1].checkpoint_dir is None:
        raise NotFoundError(
            f"job {job} has not started yet, so it has no checkpoints", code="no-such-store", hint="see `tuneyard ls`"
        )
    return attempts[-1].checkpoint_dir


def look(catalogue: Catalogue, listing: Listing) -> list[Seen]:
    """All that is in the store, the newest first."""
    everything = sorted({*listing.committed, *listing.unfinished}, reverse=True)
    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(lambda found: see(catalogue, listing, found), everything))
    # What cannot be read may have been deleted since it was listed.
    return [one for one in seen if one.state != State.DAMAGED or catalogue.storage.exists(f"{one.id}/{COMMITTED}")]


def see(catalogue: Catalogue, listing: Listing, found: CheckpointId) -> Seen:
    """What there is to say of `found`, which is listed. Raises CheckpointError if the store does not work."""
    if found in listing.unfinished:
        return Seen(found, State.UNFINISHED)
    state, reason, manifest = State.LINEAGE if found in listing.lineage() else State.OUTSIDE, None, None
    try:
        manifest = catalogue.manifest(found)
    except Damaged as problem:
        state, reason = State.DAMAGED, problem.message
    why = catalogue.quarantine_of(found) if found in listing.quarantined else None
    if why is not None:
        state, reason = State.QUARANTINED, why.reason
    return Seen(found, state, found in listing.pinned, reason, manifest)


def pick(listing: Listing, text: str) -> CheckpointId:
    """The committed checkpoint that `text` means: `latest`, a step, or a whole id.

    Raises:
        NotFoundError: there is none, or several; the hint names some.
        SpecError: `text` is none of the three.
    """
    whole = CheckpointId.parse(text)
    if text == LATEST:
        meant = list(listing.lineage()[:1])
    elif whole is not None:
        meant = [found for found in listing.committed if found == whole]
    elif text.isascii() and text.isdigit():
        meant = [found for found in listing.committed if found.step == int(text)]
    else:
        raise SpecError(
            f"`{text}` is not the name of a checkpoint", code="bad-checkpoint-id", field="id",
            hint="write latest, a step such as 120, or all of it: step-120.attempt-1",
        )  # fmt: skip
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise NotFoundError(
            f"several checkpoints are of step {text}", code="ambiguous-checkpoint", field="id",
            hint=f"say which: {_few(meant)}",
        )  # fmt: skip
    if whole in listing.unfinished:
        raise NotFoundError(
            f"{whole} is unfinished: it was never committed, or is being deleted",
            code="checkpoint-unfinished",
            field="id",
            hint="see `tuneyard checkpoint ls`",
        )
    raise NotFoundError(
        "no checkpoint is in the lineage" if text == LATEST else f"there is no committed checkpoint {text}",
        code="no-such-checkpoint",
        field="id",
        hint=f"the newest are: {_few(listing.committed)}" if listing.committed else "none is committed yet",
    )


def parents(catalogue: Catalogue, manifest: Manifest) -> list[str]:
    """The checkpoints before it in its run, the nearest first; the last one may be deleted since."""
    found: list[str] = []
    while manifest.parent is not None and manifest.parent not in found:
        found.append(manifest.parent)
        before = CheckpointId.parse(manifest.parent)
        if before is None:
            break
        try:
            manifest = catalogue.manifest(before)
        except Damaged:
            break
    return found


def may_go(
    listing: Listing, good: Sequence[CheckpointId], retention: Retention | None, *, unfinished: bool, quarantined: bool
) -> Mapping[CheckpointId, str]:
    """What `prune` deletes, and why: with `retention` what it leaves over of `good`, and what is in no lineage.

    Never the newest of `good`, which is the lineage without those that cannot be read; nor what is pinned; nor what the
    highest attempt that has begun may be writing.
    """
    gone: dict[CheckpointId, str] = {}
    committed = set(listing.committed)
    lineage = listing.lineage()
    if retention is not None:
        gone |= dict.fromkeys(superfluous(good, retention, listing.pinned), "superfluous")
        outside = committed - set(lineage) - listing.quarantined - listing.pinned
        gone |= dict.fromkeys(outside, State.OUTSIDE.value)
    if quarantined:
        gone |= dict.fromkeys((committed & listing.quarantined) - listing.pinned, State.QUARANTINED.value)
    if unfinished:
        left = (found for found in listing.unfinished if found.attempt < listing.begun)
        gone |= dict.fromkeys(left, State.UNFINISHED.value)
    return dict(sorted(gone.items(), reverse=True))


def _few(names: Sequence[object]) -> str:
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(str(name) for name in names[:5]) + more
