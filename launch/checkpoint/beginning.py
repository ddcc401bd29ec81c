"""How an attempt begins: it fences the older ones, chooses what to go on from, says so, and loads it.

That is the newest good checkpoint of the lineage, or, if the ranks before have left copies of a later step (copies.py),
the checkpoint that is made of those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from launch.checkpoint import rescue
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.loading import Loaded, load_into
from launch.checkpoint.manifest import CheckpointError, CheckpointId, Damaged, Manifest, Unusable
from launch.checkpoint.ranks import Ranks
from launch.checkpoint.state import TrainingState
from launch.contract import CheckpointNote

Accept = Callable[[Manifest], Mapping[str, torch.Tensor]]


class Beginning:
    """Of one attempt; all ranks make one."""

    def __init__(
        self,
        state: TrainingState,
        catalogue: Catalogue,
        ranks: Ranks,
        attempt: int | None,
        assets: Callable[[], str | None],
        url: str | None = None,
    ) -> None:
        """`attempt` None is the one after the highest that has begun; `url` None: nobody leaves copies."""
        self._state, self._catalogue, self._ranks, self._assets, self._url = state, catalogue, ranks, assets, url
        self._attempt = attempt
        self._claimed = False
        self.loaded: Loaded | None = None
        self.notes: list[CheckpointNote] = []

    @property
    def known_attempt(self) -> int | None:
        return self._attempt

    @property
    def attempt(self) -> int:
        """Known once `run` was called."""
        assert self._attempt is not None, "run() begins the attempt"
        return self._attempt

    def run(self, accept: Accept) -> Manifest | None:
        """Raises as Checkpoints.resume."""
        self._attempt, lineage, aside = self._ranks.by_main(self._begin)
        rescued = self._rescue(lineage)
        for found in [*([rescued] if rescued is not None else []), *lineage]:
            manifest = self._load(found, accept)
            if manifest is not None:
                self._ranks.by_main(functools.partial(self._go_on_from, found))
                assert self.loaded is not None
                self.notes.append(
                    CheckpointNote(
                        id=manifest.id, step=manifest.step, outcome="resumed", bytes=self.loaded.read_bytes,
                        source="memory" if found == rescued else None,
                    )
                )  # fmt: skip
                return manifest
        if lineage or aside:
            # Also when an earlier attempt has found them so: nobody wants a long run to begin again unasked.
            url = self._catalogue.storage.url
            raise Unusable(
                f"each of the {len(lineage) + aside} checkpoints of this job is damaged",
                code="no-good-checkpoint",
                hint=f"`tuneyard checkpoint verify {url} --all` says how; to start from scratch, "
                "`tuneyard checkpoint prune --quarantined`, or a new job",
            )
        self._ranks.by_main(lambda: self._go_on_from(None))
        return None

    def go_back(self, before: int, accept: Accept) -> Manifest | None:
        """After `run`: load the newest good checkpoint of less than `before` steps; None if there is none. What this
        attempt has saved from there on is deleted: nobody may go on from it. All ranks call it.

        Raises:
            Superseded: a higher attempt has begun.
        """
        for found in self._ranks.by_main(functools.partial(self._before, before)):
            manifest = self._load(found, accept)
            if manifest is not None:
                return manifest
        return None

    def _before(self, step: int) -> list[CheckpointId]:
        self._catalogue.check_not_superseded(self.attempt)
        lineage = self._catalogue.listing().lineage()
        for found in lineage:
            if found.step >= step and found.attempt == self.attempt:
                self._catalogue.delete(found)
            elif found.step >= step:  # of an attempt before, which this one goes on from
                self._catalogue.quarantine(found, f"the loss exploded at step {step}", self.attempt)
        return [found for found in lineage if found.step < step]

    def _begin(self) -> tuple[int, list[CheckpointId], int]:
        """Which attempt this is, what it may start from, and how many more were set aside."""
        attempt = self._catalogue.listing().last_attempt + 1 if self._attempt is None else self._attempt
        self._catalogue.begin(attempt)
        listing = self._catalogue.listing()
        return attempt, list(listing.lineage()), len(listing.set_aside())

    def _rescue(self, lineage: list[CheckpointId]) -> CheckpointId | None:
        """The checkpoint that was made of copies, if there were any of use."""
        if self._url is None:
            return None
        newest = lineage[0] if lineage else None
        copies = rescue.gather(self._ranks, self._catalogue, self._url, self.attempt, newest)
        if not copies:
            return None
        # An attempt commits after it has claimed. What it commits goes on from `newest`.
        self._ranks.by_main(lambda: self._claim(newest))
        return rescue.commit(self._ranks, self._catalogue, self.attempt, copies, newest, self._assets)

    def _go_on_from(self, found: CheckpointId | None) -> None:
        self._claim(found)
        if self._url is not None:
            rescue.discard(self._catalogue.storage)

    def _claim(self, starts_from: CheckpointId | None) -> None:
        """Once: the first word counts, and what is older than that is of the same lineage."""
        if self._claimed:
            return
        self._catalogue.claim(self.attempt, starts_from)
        self._claimed = True
        for left in self._catalogue.listing().unfinished:
            if left.attempt < self.attempt:  # nobody will finish it: a commit of it would not count
                clear(self._catalogue, left)

    def _load(self, found: CheckpointId, accept: Accept) -> Manifest | None:
        """Load `found` on all ranks; None if it is damaged, which is then noted for good."""
        try:
            manifest = self._ranks.by_main(lambda: self._catalogue.manifest(found))
            self.loaded = load_into(self._state, self._catalogue.storage, manifest, self._ranks, accept(manifest))
        except Damaged as problem:
            self._ranks.by_main(functools.partial(self._set_aside, found, problem.message))
            return None
        return manifest

    def _set_aside(self, found: CheckpointId, reason: str) -> None:
        self._catalogue.quarantine(found, reason, self.attempt)
        print(f"checkpoint {found} is set aside: {reason}", flush=True)
        self.notes.append(
            CheckpointNote(id=str(found), step=found.step, outcome="quarantined", code=Damaged.code, message=reason)
        )


def clear(catalogue: Catalogue, unfinished: CheckpointId) -> None:
    """Free its room. What cannot be deleted is in nobody's way: it has no marker."""
    try:
        catalogue.delete(unfinished)
    except CheckpointError as problem:
        print(f"what is unfinished of {unfinished} could not be deleted: {problem.message}", flush=True)
