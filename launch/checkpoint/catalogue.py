"""Which checkpoints a store has, which of them count, and the steps by which one comes to count. Torch-free.

Fencing: an attempt first writes that it has begun, then looks which checkpoint it starts from, then claims it. What a
lower attempt commits afterwards is in nobody's lineage, so it is never loaded, whenever it lands. And a lower attempt
deletes only what it found superfluous before it saw that a higher one had begun, after a newer commit of its own: the
higher attempt has seen that commit.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from launch.checkpoint.manifest import (
    COMMITTED,
    MANIFEST,
    PINNED,
    QUARANTINED,
    CheckpointError,
    CheckpointId,
    Claim,
    Commit,
    Damaged,
    Manifest,
    Quarantine,
    Superseded,
    Unusable,
    hash_of,
    read_claim,
    read_commit,
    sealed,
)
from launch.checkpoint.storage import Storage

_BEGUN = re.compile(r"claims/attempt-(\d+)\.begun")
_CLAIM = re.compile(r"claims/attempt-(\d+)\.json")


@dataclass(frozen=True)
class Listing:
    """What the names in a store say; read once."""

    committed: tuple[CheckpointId, ...]
    """All of them, the newest step first, quarantined ones and those of no lineage included."""
    quarantined: frozenset[CheckpointId]
    pinned: frozenset[CheckpointId]
    unfinished: frozenset[CheckpointId]
    """Directories without a marker: being written, torn, or half deleted."""
    begun: int
    """The highest attempt that has begun; 0 if none has."""
    claims: Mapping[int, Claim]

    @property
    def last_attempt(self) -> int:
        """The highest that has left a trace; 0 if none has. Checkpoints that were copied here come without claims."""
        return max(self.begun, *(found.attempt for found in (*self.committed, *self.unfinished)), 0)

    def lineage(self) -> tuple[CheckpointId, ...]:
        """The committed checkpoints of the newest claim's lineage, the newest first; quarantined ones are not in it."""
        return tuple(found for found in self._counting() if found not in self.quarantined)

    def set_aside(self) -> tuple[CheckpointId, ...]:
        """Those that would be in the lineage, were they not quarantined."""
        return tuple(found for found in self._counting() if found in self.quarantined)

    def _counting(self) -> list[CheckpointId]:
        bounds = lineage(self.claims)
        return [found for found in self.committed if bounds is None or found.step <= bounds.get(found.attempt, -1)]


def lineage(claims: Mapping[int, Claim]) -> dict[int, float] | None:
    """Up to which step the commits of each attempt count; attempts that are not named have none that do.

    The newest claim's attempt counts without bound, the attempt of the checkpoint that it starts from up to that
    checkpoint, and so on. None without any claim: then every commit counts.
    """
    if not claims:
        return None
    attempt: int | None = max(claims)
    bounds: dict[int, float] = {}
    bound = float("inf")
    while attempt is not None and attempt not in bounds:
        bounds[attempt] = bound
        claim = claims.get(attempt)
        start = CheckpointId.parse(claim.starts_from) if claim is not None and claim.starts_from else None
        attempt, bound = (start.attempt, start.step) if start is not None else (None, -1)
    return bounds


class Catalogue:
    """The checkpoints in one store. Nothing is kept in memory: other processes write there, too."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def listing(self) -> Listing:
        names = self.storage.names("")
        directories: dict[CheckpointId, set[str]] = {}
        for name in names:
            folder, _, file = name.partition("/")
            found = CheckpointId.parse(folder)
            if found is not None:
                directories.setdefault(found, set()).add(file)

        def having(marker: str) -> frozenset[CheckpointId]:
            return frozenset(found for found, files in directories.items() if marker in files)

        committed = having(COMMITTED)
        begun = set(_attempts(_BEGUN, names))
        # An attempt commits after it has claimed: where there is a commit there is a claim, or one was lost.
        claimed = {*_attempts(_CLAIM, names), *(begun & {found.attempt for found in committed})}
        return Listing(
            committed=tuple(sorted(committed, reverse=True)),
            quarantined=having(QUARANTINED),
            pinned=having(PINNED) & committed,
            unfinished=frozenset(directories) - committed,
            begun=max(begun, default=0),
            claims={attempt: self._claim(attempt) for attempt in sorted(claimed)},
        )

    def manifest(self, found: CheckpointId) -> Manifest:
        """The manifest of a committed checkpoint, checked against its marker.

        Raises:
            Damaged: it is not what was committed, or half of it is missing.
        """
        try:
            marker = self.storage.read(f"{found}/{COMMITTED}")
            manifest = self.storage.read(f"{found}/{MANIFEST}")
        except FileNotFoundError as problem:
            raise Damaged(f"{found} lacks a file: {problem}") from problem
        return read_commit(str(found), marker, manifest)

    def begin(self, attempt: int) -> None:
        """From here on lower attempts change nothing any more.

        Raises:
            Superseded: this attempt, or a higher one, has begun already.
        """
        # With a name of its own, so that two processes of one attempt are told apart.
        beginner = json.dumps({"process": uuid.uuid4().hex}).encode()
        if not self.storage.create(f"claims/attempt-{attempt}.begun", beginner):
            raise Superseded(
                f"attempt {attempt} has begun already, in another process",
                hint="start the next attempt: its number is one more",
            )
        self.check_not_superseded(attempt)

    def check_not_superseded(self, attempt: int) -> None:
        """Raises Superseded if a higher attempt has begun."""
        highest = max(_attempts(_BEGUN, self.storage.names("claims")), default=0)
        if highest > attempt:
            raise Superseded(
                f"attempt {highest} of this job has begun, so attempt {attempt} has nothing more to say",
                hint="nothing is lost: what the newer attempt started from was chosen when it began",
            )

    def claim(self, attempt: int, starts_from: CheckpointId | None) -> None:
        """Say for good what `attempt`, which has begun, starts from."""
        claim = Claim(attempt=attempt, starts_from=None if starts_from is None else str(starts_from))
        if not self.storage.create(f"claims/attempt-{attempt}.json", sealed(claim)):
            raise Superseded(f"attempt {attempt} has a claim already, of another process")

    def commit(self, manifest: Manifest, passing: Callable[[str], None] = lambda _boundary: None) -> None:
        """Write the manifest and then the marker, exclusively: after this the checkpoint is one.

        Raises:
            Superseded: a higher attempt has begun, or this checkpoint is there already.
        """
        self.check_not_superseded(manifest.attempt)
        data = manifest.model_dump_json().encode()
        self.storage.write(f"{manifest.id}/{MANIFEST}", [memoryview(data)])
        passing("manifest-written")
        marker = Commit(manifest=hash_of(data)).model_dump_json().encode()
        if not self.storage.create(f"{manifest.id}/{COMMITTED}", marker):
            raise Superseded(f"{manifest.id} is committed already, by another process")

    def quarantine(self, found: CheckpointId, reason: str, by_attempt: int) -> None:
        """Never load it again, and keep it; the first reason stays."""
        why = Quarantine(reason=reason, by_attempt=by_attempt, at=time.time())
        self.storage.create(f"{found}/{QUARANTINED}", why.model_dump_json().encode())

    def quarantine_of(self, found: CheckpointId) -> Quarantine | None:
        try:
            return Quarantine.model_validate_json(self.storage.read(f"{found}/{QUARANTINED}"))
        except FileNotFoundError:
            return None
        except ValidationError:
            return Quarantine(reason="its quarantine note is torn", by_attempt=0, at=0.0)

    def pin(self, found: CheckpointId) -> None:
        """Keep it whatever the retention says.

        Raises:
            CheckpointError: there is no such committed checkpoint.
        """
        committed = self.listing().committed
        if found in committed:
            self.storage.create(f"{found}/{PINNED}", b"{}")
            if self.storage.exists(f"{found}/{COMMITTED}"):  # a running job may have deleted it meanwhile
                return
            self.unpin(found)
        raise no_such(found, committed)

    def unpin(self, found: CheckpointId) -> None:
        self.storage.delete(f"{found}/{PINNED}")

    def delete(self, found: CheckpointId) -> None:
        """The marker goes first: a half deleted checkpoint is an unfinished one."""
        self.storage.delete(f"{found}/{COMMITTED}")
        self.storage.delete_all(str(found))

    def _claim(self, attempt: int) -> Claim:
        name = f"claims/attempt-{attempt}.json"
        try:
            return read_claim(attempt, self.storage.read(name))
        except FileNotFoundError:
            how = "is missing"
        except Damaged as problem:
            how = problem.message
        raise Unusable(
            f"{name} in {self.storage.url} {how}: which checkpoints count cannot be known",
            code="claim-damaged",
            hint="restore that file; without it the claim before it would decide, with more or fewer of them",
        )


def no_such(found: CheckpointId | str, committed: Sequence[CheckpointId]) -> CheckpointError:
    names = ", ".join(str(one) for one in committed[:8]) or "none"
    return CheckpointError(
        f"there is no committed checkpoint {found}", code="no-such-checkpoint", hint=f"the newest are: {names}"
    )


def _attempts(pattern: re.Pattern[str], names: Iterable[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
