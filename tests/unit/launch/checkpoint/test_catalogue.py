"""Which checkpoints of a store count: by hand on both kinds of store, and in any order of events in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from launch.checkpoint.catalogue import Catalogue, Listing, lineage
from launch.checkpoint.manifest import (
    COMMITTED,
    MANIFEST,
    CheckpointError,
    CheckpointId,
    Claim,
    Damaged,
    Superseded,
)
from launch.checkpoint.retention import Retention, superfluous
from launch.checkpoint.storage import Storage
from tests.stores import MemoryStorage, a_manifest, a_store, begin, commit


def test_an_empty_store_has_nothing(storage: Storage) -> None:
    listing = Catalogue(storage).listing()
    assert (listing.committed, listing.lineage(), listing.begun) == ((), (), 0)
    assert listing.unfinished == frozenset()


def test_a_store_with_a_checkpoint_in_every_state(storage: Storage) -> None:
    made = a_store(storage)
    listing = Catalogue(storage).listing()
    assert [str(found) for found in listing.committed] == [
        "step-40.attempt-1", "step-30.attempt-2", "step-30.attempt-1", "step-20.attempt-1", "step-10.attempt-1",
    ]  # fmt: skip
    assert listing.lineage() == (made["newest"], made["parent"], made["pinned"])
    assert listing.quarantined == {made["quarantined"]}
    assert listing.pinned == {made["pinned"]}
    assert listing.unfinished == {made["left"], made["writing"]}
    assert listing.begun == 2


def test_a_committed_checkpoint_is_read_and_a_damaged_one_is_not(storage: Storage) -> None:
    catalogue = Catalogue(storage)
    found = commit(storage, 3)
    assert catalogue.manifest(found) == a_manifest(3)[0]
    data = storage.read(f"{found}/{MANIFEST}")
    storage.write(f"{found}/{MANIFEST}", [memoryview(data[:-1])])
    with pytest.raises(Damaged):
        catalogue.manifest(found)
    storage.delete(f"{found}/{MANIFEST}")
    with pytest.raises(Damaged, match="lacks a file"):
        catalogue.manifest(found)


def test_an_attempt_begins_once_and_after_no_higher_one(storage: Storage) -> None:
    catalogue = Catalogue(storage)
    catalogue.begin(2)
    with pytest.raises(Superseded, match="in another process"):
        catalogue.begin(2)
    with pytest.raises(Superseded, match="attempt 2 of this job has begun"):
        catalogue.begin(1)
    catalogue.begin(10)
    with pytest.raises(Superseded):
        catalogue.check_not_superseded(9)
    assert catalogue.listing().begun == 10


def test_a_claim_is_made_once(storage: Storage) -> None:
    begin(storage, 1)
    with pytest.raises(Superseded):
        Catalogue(storage).claim(1, CheckpointId(5, 1))
    assert Catalogue(storage).listing().claims == {1: Claim(attempt=1, starts_from=None)}


def test_a_superseded_attempt_commits_nothing(storage: Storage) -> None:
    begin(storage, 1)
    commit(storage, 1)
    begin(storage, 2, CheckpointId(1, 1))
    with pytest.raises(Superseded):
        commit(storage, 2)
    assert not storage.exists(f"step-2.attempt-1/{MANIFEST}")


def test_a_checkpoint_is_committed_once(storage: Storage) -> None:
    begin(storage, 1)
    commit(storage, 1)
    with pytest.raises(Superseded, match="committed already"):
        commit(storage, 1, created=5.0)


def test_the_marker_comes_last_and_goes_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(storage)
    seen: list[str] = []

    def look(boundary: str) -> None:
        seen.append(boundary)
        assert storage.exists("step-1.attempt-1/MANIFEST.json")
        assert not storage.exists("step-1.attempt-1/COMMITTED")

    catalogue.commit(a_manifest(1)[0], look)
    assert seen == ["manifest-written"]

    def crash(prefix: str) -> None:
        seen.append(prefix)
        assert not storage.exists("step-1.attempt-1/COMMITTED")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete_all", crash)
        with pytest.raises(KeyboardInterrupt):
            catalogue.delete(CheckpointId(1, 1))
    assert catalogue.listing().unfinished == {CheckpointId(1, 1)}
    catalogue.delete(CheckpointId(1, 1))
    assert storage.names("") == []


def test_the_first_reason_for_a_quarantine_stays(storage: Storage) -> None:
    catalogue = Catalogue(storage)
    found = commit(storage, 1)
    assert catalogue.quarantine_of(found) is None
    catalogue.quarantine(found, "rank-0 differs", by_attempt=2)
    catalogue.quarantine(found, "another", by_attempt=3)
    why = catalogue.quarantine_of(found)
    assert why is not None
    assert (why.reason, why.by_attempt) == ("rank-0 differs", 2)
    storage.write(f"{found}/QUARANTINED.json", [memoryview(b"{")])
    torn = catalogue.quarantine_of(found)
    assert torn is not None
    assert "torn" in torn.reason


def test_pinning(storage: Storage) -> None:
    catalogue = Catalogue(storage)
    found = commit(storage, 1)
    for _ in range(2):
        catalogue.pin(found)
        assert catalogue.listing().pinned == {found}
    for _ in range(2):
        catalogue.unpin(found)
        assert catalogue.listing().pinned == frozenset()
    with pytest.raises(CheckpointError) as told:
        catalogue.pin(CheckpointId(2, 1))
    assert told.value.code == "no-such-checkpoint"
    assert "step-1.attempt-1" in (told.value.hint or "")
    assert storage.names("step-2.attempt-1") == []


def test_what_is_deleted_while_it_is_pinned_is_told(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(storage)
    found = commit(storage, 1)
    create = storage.create

    def deleting(name: str, data: bytes) -> bool:
        catalogue.delete(found)
        return create(name, data)

    monkeypatch.setattr(storage, "create", deleting)
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        catalogue.pin(found)
    assert storage.names("") == []


def test_a_torn_claim_is_told_with_its_name(storage: Storage) -> None:
    storage.create("claims/attempt-1.json", b"{")
    with pytest.raises(CheckpointError) as told:
        Catalogue(storage).listing()
    assert told.value.code == "claim-damaged"
    assert "claims/attempt-1.json" in told.value.message


def claims(*starts: str | None) -> dict[int, Claim]:
    return {number: Claim(attempt=number, starts_from=start) for number, start in enumerate(starts, start=1)}


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        (claims(), None),
        (claims(None), {1: float("inf")}),
        (claims(None, "step-20.attempt-1"), {2: float("inf"), 1: 20}),
        (claims(None, "step-20.attempt-1", "step-30.attempt-2"), {3: float("inf"), 2: 30, 1: 20}),
        (claims(None, "step-20.attempt-1", "step-10.attempt-1"), {3: float("inf"), 1: 10}),
        (claims(None, "step-20.attempt-1", None), {3: float("inf")}),
        (claims(None, "nonsense"), {2: float("inf")}),
        ({7: Claim(attempt=7, starts_from="step-5.attempt-4")}, {7: float("inf"), 4: 5}),
        ({2: Claim(attempt=2, starts_from="step-5.attempt-2")}, {2: float("inf")}),
    ],
)
def test_bounds_of_a_lineage(given: dict[int, Claim], bounds: dict[int, float] | None) -> None:
    assert lineage(given) == bounds


def test_without_any_claim_all_that_is_committed_counts() -> None:
    found = (CheckpointId(2, 1), CheckpointId(1, 3))
    listing = Listing(found, frozenset({found[1]}), frozenset(), frozenset(), 0, {})
    assert listing.lineage() == found[:1]


@dataclass
class Attempt:
    """What one attempt's rank 0 knows."""

    number: int
    stage: str = "allotted"  # begun, chosen, claimed, saving; ended
    starts_from: CheckpointId | None = None
    head: CheckpointId | None = None
    """Its last commit, or what it starts from."""
    saving: CheckpointId | None = None
    """Has passed every check; its marker is on its way."""


def in_stage(*stages: str) -> Callable[[Fencing], bool]:
    return lambda world: any(attempt.stage in stages for attempt in world.attempts)


class Fencing(RuleBasedStateMachine):
    """Attempts that begin, claim, commit, stall anywhere, and are superseded meanwhile.

    What should be loadable is worked out from parent pointers, the catalogue's answer comes from claims.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self.catalogue = Catalogue(self.storage)
        self.attempts: list[Attempt] = []
        self.parents: dict[CheckpointId, CheckpointId | None] = {}
        self.landed: dict[CheckpointId, int] = {}
        self.claimed_at: dict[int, int] = {}
        self.now = 0

    def one(self, data: st.DataObject, *stages: str) -> Attempt:
        """Any attempt that is so far, the newest ones first: simpler worlds have few that lag behind."""
        return data.draw(st.sampled_from([one for one in self.attempts[::-1] if one.stage in stages]))

    @rule(
        stalls=st.sampled_from(["no", "saving", "chosen", "begun", "allotted"]),
        damaged=st.integers(0, 1),
        saves=st.integers(0, 2),
    )
    def starts(self, stalls: str, damaged: int, saves: int) -> None:
        """The yard starts the next attempt, which saves so many times, or stalls on the way or in one save more."""
        attempt = Attempt(len(self.attempts) + 1)
        self.attempts.append(attempt)
        for act in (self.begin, lambda attempt: self.choose(attempt, damaged), self.claim):
            if attempt.stage == stalls:
                return
            act(attempt)
        for number in range(saves + (stalls == "saving")):
            self.save(attempt, steps=2, stalls=number == saves)

    @precondition(in_stage("allotted", "begun", "chosen"))
    @rule(data=st.data(), damaged=st.integers(0, 1))
    def goes_on(self, data: st.DataObject, damaged: int) -> None:
        """One that stalled takes its next step."""
        attempt = self.one(data, "allotted", "begun", "chosen")
        if attempt.stage == "allotted":
            self.begin(attempt)
        elif attempt.stage == "begun":
            self.choose(attempt, damaged)
        else:
            self.claim(attempt)

    def begin(self, attempt: Attempt) -> None:
        higher = self.catalogue.listing().begun > attempt.number
        try:
            self.catalogue.begin(attempt.number)
            assert not higher
            attempt.stage = "begun"
        except Superseded:
            assert higher
            attempt.stage = "ended"

    def choose(self, attempt: Attempt, damaged: int) -> None:
        """The newest, after setting aside so many that cannot be read."""
        found = list(self.catalogue.listing().lineage())
        for bad in found[:damaged]:
            self.catalogue.quarantine(bad, "damaged", attempt.number)
        attempt.starts_from = attempt.head = next(iter(found[damaged:]), None)
        attempt.stage = "chosen"

    def claim(self, attempt: Attempt) -> None:
        self.catalogue.claim(attempt.number, attempt.starts_from)
        attempt.stage = "claimed"
        self.now += 1
        self.claimed_at[attempt.number] = self.now

    @precondition(in_stage("claimed"))
    @rule(data=st.data(), steps=st.integers(1, 3), stalls=st.booleans())
    def saves(self, data: st.DataObject, steps: int, stalls: bool) -> None:
        """All but the marker, which may be on its way to the store for as long as it likes."""
        self.save(self.one(data, "claimed"), steps, stalls)

    def save(self, attempt: Attempt, steps: int, stalls: bool) -> None:
        if attempt.stage != "claimed":
            return
        found = CheckpointId((attempt.head.step if attempt.head else 0) + steps, attempt.number)
        superseded = self.catalogue.listing().begun > attempt.number
        parent = None if attempt.head is None else str(attempt.head)
        try:
            self._commit_without_marker(found, parent)
            assert not superseded
        except Superseded:
            assert superseded
            attempt.stage = "ended"
            return
        self.parents[found] = attempt.head
        attempt.saving, attempt.stage = found, "saving"
        if not stalls:
            self.land(attempt, keep_last=3)

    def _commit_without_marker(self, found: CheckpointId, parent: str | None) -> None:
        real = self.storage.create
        self.storage.create = lambda name, data: name.endswith(COMMITTED) or real(name, data)  # type: ignore[method-assign]
        try:
            self.catalogue.commit(a_manifest(*found, parent=parent)[0])
        finally:
            self.storage.create = real  # type: ignore[method-assign]

    @precondition(in_stage("saving"))
    @rule(data=st.data(), keep_last=st.integers(1, 3))
    def lands(self, data: st.DataObject, keep_last: int) -> None:
        self.land(self.one(data, "saving"), keep_last)

    def land(self, attempt: Attempt, keep_last: int) -> None:
        """The marker arrives, the attempt hears of it and tidies up."""
        found = attempt.saving
        assert found is not None
        self.storage.create(f"{found}/{COMMITTED}", b"{}")
        self.now += 1
        self.landed[found] = self.now
        attempt.head, attempt.stage = found, "claimed"
        listing = self.catalogue.listing()
        if listing.begun > attempt.number:
            return
        first = listing.lineage()[0]
        for old in superfluous(listing.lineage(), Retention(keep_last), listing.pinned):
            assert old != first
            self.catalogue.delete(old)

    @precondition(lambda self: self.landed)
    @rule(data=st.data())
    def somebody_sets_one_aside(self, data: st.DataObject) -> None:
        committed = self.catalogue.listing().committed
        if committed:
            self.catalogue.quarantine(data.draw(st.sampled_from(committed)), "by hand", 0)

    @invariant()
    def what_is_loadable_is_the_chain_of_the_newest_claim(self) -> None:
        listing = self.catalogue.listing()
        if not self.claimed_at:
            return
        found = self.attempts[max(self.claimed_at) - 1].head
        chain = []
        while found is not None:
            chain.append(found)
            found = self.parents[found]
        left = [one for one in chain if one in listing.committed and one not in listing.quarantined]
        assert list(listing.lineage()) == left

    @invariant()
    def nothing_that_landed_after_a_higher_claim_is_loadable(self) -> None:
        for found in self.catalogue.listing().lineage():
            for number, at in self.claimed_at.items():
                assert number <= found.attempt or at > self.landed[found]


Fencing.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestFencing = Fencing.TestCase
