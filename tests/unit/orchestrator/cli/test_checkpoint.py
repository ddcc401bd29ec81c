"""`tuneyard checkpoint` on stores made by hand: in a directory, on S3, and by the name of a yard's job."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.checkpoint.catalogue import Catalogue, Listing
from launch.checkpoint.manifest import BLOCK, CheckpointId, Claim
from launch.checkpoint.retention import Retention
from launch.checkpoint.storage import Storage, open_storage
from orchestrator.cli.stores import may_go, pick
from orchestrator.errors import NotFoundError, SpecError
from tests import stores
from tests.builders import a_command_job
from tests.served import TOKEN, a_controller, listening
from tests.stores import a_store, begin, commit, damage

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def directory(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def asked(tuneyard: Call, *arguments: str, status: int = 0) -> Any:
    """What `tuneyard checkpoint ARGUMENTS -o json` prints."""
    code, out, err = tuneyard("checkpoint", *arguments, "-o", "json")
    assert code == status, (out, err)
    (line,) = out.splitlines()
    return json.loads(line)


def error_of(tuneyard: Call, *arguments: str, status: int) -> Any:
    (error,) = asked(tuneyard, *arguments, status=status)["errors"]
    assert error["hint"]
    return error


# ls


def test_ls_says_what_each_checkpoint_counts_for(tuneyard: Call, storage: Storage) -> None:
    a_store(storage)
    rows = asked(tuneyard, "ls", storage.url)
    assert [(row["id"], row["state"], row["pinned"]) for row in rows] == [
        ("step-60.attempt-2", "unfinished", False), ("step-50.attempt-1", "unfinished", False),
        ("step-40.attempt-1", "not in lineage", False), ("step-30.attempt-2", "in lineage", False),
        ("step-30.attempt-1", "quarantined", False), ("step-20.attempt-1", "in lineage", False),
        ("step-10.attempt-1", "in lineage", True),
    ]  # fmt: skip
    newest = rows[3]
    assert (newest["step"], newest["attempt"], newest["created"]) == (30, 2, stores.CREATED + 30)
    assert (newest["size"], newest["engine"], newest["world_size"]) == (8000, "ddp", 4)
    assert newest["metrics"] == {"loss": 0.125}
    assert rows[4]["reason"] == "rank-0 differs"
    status, out, err = tuneyard("checkpoint", "ls", storage.url)
    assert (status, err) == (0, "")
    assert re.search(r"step-30\.attempt-2 .*7\.8 KiB *ddp × 4 *loss 0\.125 *in lineage", out)
    assert "in lineage, pinned" in out.replace("\n", " ")


def test_ls_shows_a_manifest_that_is_damaged(tuneyard: Call, directory: Storage) -> None:
    made = a_store(directory)
    damage(Path(directory.url) / str(made["newest"]) / "MANIFEST.json", 5)
    row = next(row for row in asked(tuneyard, "ls", directory.url) if row["id"] == str(made["newest"]))
    assert (row["state"], row["size"]) == ("damaged", None)
    assert "its hash differs" in row["reason"]
    assert tuneyard("checkpoint", "ls", directory.url)[0] == 0


def test_ls_of_an_empty_store_points_at_stores_below(tuneyard: Call, tmp_path: Path) -> None:
    assert asked(tuneyard, "ls", str(tmp_path)) == []
    commit(open_storage(str(tmp_path / "job-1")), 1)
    assert "there are some in job-1" in tuneyard("checkpoint", "ls", str(tmp_path))[1]


def test_a_directory_without_slash_is_one_if_it_is_there(
    tuneyard: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit(open_storage("store"), 1)
    assert len(asked(tuneyard, "ls", "store")) == 1
    assert len(asked(tuneyard, "ls", f"file://{tmp_path}/store")) == 1
    assert error_of(tuneyard, "ls", "stores", status=3)["code"] == "yard-unreachable"  # a job, then


def test_stores_that_are_none(tuneyard: Call, tmp_path: Path) -> None:
    assert error_of(tuneyard, "ls", f"{tmp_path}/none", status=4)["code"] == "no-such-store"
    assert error_of(tuneyard, "ls", "s4://bucket/x", status=4)["code"] == "unknown-storage"


# Which one is meant.


def a_listing(*names: str, unfinished: str = "step-9.attempt-9") -> Listing:
    found = tuple(sorted((CheckpointId.parse(name) or CheckpointId(0, 0) for name in names), reverse=True))
    left = CheckpointId.parse(unfinished)
    assert left is not None
    return Listing(found, frozenset(), frozenset(), frozenset({left}), 9, {})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("latest", "step-30.attempt-2"), ("20", "step-20.attempt-1"), ("step-30.attempt-1", "step-30.attempt-1"),
        ("030", None), ("30", NotFoundError), ("9", NotFoundError), ("40", NotFoundError),
        ("step-30.attempt-3", NotFoundError), ("step-9.attempt-9", NotFoundError), ("newest", SpecError),
        ("step-30", SpecError), ("", SpecError), ("-1", SpecError), ("٣", SpecError),
    ],
)  # fmt: skip
def test_a_name_may_be_shortened_as_long_as_it_is_clear(text: str, meant: str | type[Exception] | None) -> None:
    listing = a_listing("step-20.attempt-1", "step-30.attempt-1", "step-30.attempt-2")
    if isinstance(meant, str):
        assert str(pick(listing, text)) == meant
        return
    with pytest.raises((NotFoundError, SpecError)) as told:
        pick(listing, text)
    assert told.value.hint
    assert meant is None or isinstance(told.value, meant)


def test_what_is_ambiguous_names_the_candidates() -> None:
    with pytest.raises(NotFoundError) as told:
        pick(a_listing("step-30.attempt-1", "step-30.attempt-2"), "30")
    assert told.value.code == "ambiguous-checkpoint"
    assert "step-30.attempt-2, step-30.attempt-1" in (told.value.hint or "")


def test_without_any_checkpoint_there_is_no_latest() -> None:
    with pytest.raises(NotFoundError) as told:
        pick(a_listing(), "latest")
    assert told.value.code == "no-such-checkpoint"


# show


def test_show_tells_a_checkpoint(tuneyard: Call, storage: Storage) -> None:
    made = a_store(storage)
    told = asked(tuneyard, "show", storage.url, "latest")
    assert (told["id"], told["state"], told["job"], told["samples"]) == (
        str(made["newest"]),
        "in lineage",
        "job-1",
        480,
    )
    assert told["parents"] == ["step-20.attempt-1", "step-10.attempt-1"]
    assert told["tensors"]["weight"] == {"tensors": 1, "elements": 1000, "bytes": 4000}
    assert [shard["file"] for shard in told["shards"]] == [f"rank-{rank}.safetensors" for rank in range(4)]
    assert told["plan"]["world_size"] == 4
    status, out, _ = tuneyard("checkpoint", "show", storage.url, "10")
    assert status == 0
    for words in ("in lineage, pinned", "at step 10, after 160 samples", "loss 0.5", "1000 elements, 3.9 KiB"):
        assert words in out


def test_a_chain_ends_where_a_parent_is_deleted(tuneyard: Call, directory: Storage) -> None:
    made = a_store(directory)
    Catalogue(directory).delete(made["parent"])
    assert asked(tuneyard, "show", directory.url, "latest")["parents"] == ["step-20.attempt-1"]


def test_show_refuses_what_cannot_be_read(tuneyard: Call, directory: Storage) -> None:
    made = a_store(directory)
    (Path(directory.url) / str(made["newest"]) / "MANIFEST.json").unlink()
    (error,) = asked(tuneyard, "show", directory.url, "latest", status=4)["errors"]
    assert error["code"] == "checkpoint-damaged"


# verify


def test_verify_reads_the_lineage_or_all(tuneyard: Call, storage: Storage) -> None:
    a_store(storage)
    findings = asked(tuneyard, "verify", storage.url)
    assert [finding["id"] for finding in findings] == ["step-30.attempt-2", "step-20.attempt-1", "step-10.attempt-1"]
    assert all(finding["good"] and finding["read"] == 8000 for finding in findings)
    assert len(asked(tuneyard, "verify", storage.url, "--all")) == 5
    assert [one["id"] for one in asked(tuneyard, "verify", storage.url, "20", "latest", "20")] == [
        "step-20.attempt-1", "step-30.attempt-2",
    ]  # fmt: skip
    assert error_of(tuneyard, "verify", storage.url, "20", "--all", status=2)["code"] == "usage"


def test_verify_names_file_and_bytes_and_sets_aside(tuneyard: Call, directory: Storage) -> None:
    begin(directory, 1)
    commit(directory, 1)
    found = commit(directory, 2, ranks=1, shard_size=BLOCK + 10)
    damage(Path(directory.url) / str(found) / "rank-0.safetensors", BLOCK + 3)
    file = "step-2.attempt-1/rank-0.safetensors"
    findings = asked(tuneyard, "verify", directory.url, status=1)
    assert [finding["good"] for finding in findings] == [False, True]
    assert findings[0]["faults"] == [{"file": file, "start": BLOCK, "end": BLOCK + 10, "message": "the hash differs"}]
    assert Catalogue(directory).listing().quarantined == frozenset()
    status, out, _ = tuneyard("checkpoint", "verify", directory.url, "--quarantine")
    assert status == 1
    assert f"{file}, bytes {BLOCK} to {BLOCK + 10}: the hash differs" in out
    assert "set aside" in out
    assert [str(one) for one in Catalogue(directory).listing().lineage()] == ["step-1.attempt-1"]
    assert asked(tuneyard, "ls", directory.url)[0]["state"] == "quarantined"
    assert tuneyard("checkpoint", "verify", directory.url)[0] == 0  # what is set aside is no news
    assert tuneyard("checkpoint", "verify", directory.url, "--all")[0] == 1


def test_there_may_be_nothing_to_verify(tuneyard: Call, directory: Storage) -> None:
    found = commit(directory, 1)
    Catalogue(directory).quarantine(found, "why", 1)
    error = error_of(tuneyard, "verify", directory.url, status=4)
    assert (error["code"], "--all" in error["hint"]) == ("no-such-checkpoint", True)


def test_a_store_that_fails_is_no_damage(tuneyard: Call, directory: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(directory, 1)
    monkeypatch.setattr(type(directory), "reader", lambda *_: (_ for _ in ()).throw(stores_failure()))
    assert error_of(tuneyard, "verify", directory.url, status=4)["code"] == "storage-failed"


def stores_failure() -> Exception:
    from launch.checkpoint.manifest import CheckpointError

    return CheckpointError("it does not answer", code="storage-failed", hint="wait")


# pin, unpin


def test_pinning(tuneyard: Call, storage: Storage) -> None:
    made = a_store(storage)
    assert asked(tuneyard, "pin", storage.url, "latest") == {"id": str(made["newest"]), "pinned": True}
    assert Catalogue(storage).listing().pinned == {made["newest"], made["pinned"]}
    for _ in range(2):
        assert tuneyard("checkpoint", "unpin", storage.url, "latest")[0] == 0
    assert Catalogue(storage).listing().pinned == {made["pinned"]}
    assert error_of(tuneyard, "pin", storage.url, "99", status=4)["code"] == "no-such-checkpoint"


# prune

ALL = ("--keep-last", "1", "--unfinished", "--quarantined")
STAYS = ["step-60.attempt-2", "step-30.attempt-2", "step-10.attempt-1"]


def test_prune_says_what_would_go_and_then_deletes_that(tuneyard: Call, storage: Storage) -> None:
    a_store(storage)
    before = storage.names("")
    would = asked(tuneyard, "prune", storage.url, *ALL, "--dry-run")
    assert storage.names("") == before
    assert {row["id"]: row["reason"] for row in would["would_delete"]} == {
        "step-50.attempt-1": "unfinished", "step-40.attempt-1": "not in lineage", "step-30.attempt-1": "quarantined",
        "step-20.attempt-1": "superfluous",
    }  # fmt: skip
    did = asked(tuneyard, "prune", storage.url, *ALL, "--yes")
    assert did == {"deleted": would["would_delete"], "would_delete": []}
    assert [row["id"] for row in asked(tuneyard, "ls", storage.url)] == STAYS
    assert asked(tuneyard, "prune", storage.url, *ALL, "--yes")["deleted"] == []
    assert any(name.startswith("assets/") for name in storage.names(""))
    assert Catalogue(storage).listing().begun == 2


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (("--keep-last", "3"), ["step-40.attempt-1"]),
        (("--keep-last", "2"), ["step-40.attempt-1"]),  # the third is pinned
        (("--keep-every", "20"), ["step-40.attempt-1"]),
        (("--keep-every", "7"), ["step-40.attempt-1", "step-20.attempt-1"]),
        (("--unfinished",), ["step-50.attempt-1"]),
        (("--quarantined",), ["step-30.attempt-1"]),
    ],
)
def test_each_option_says_what_goes(tuneyard: Call, directory: Storage, options: list[str], gone: list[str]) -> None:
    a_store(directory)
    would = asked(tuneyard, "prune", directory.url, *options, "--dry-run")
    assert [row["id"] for row in would["would_delete"]] == gone


def test_prune_counts_good_ones_alone(tuneyard: Call, directory: Storage) -> None:
    made = a_store(directory)
    damage(Path(directory.url) / str(made["newest"]) / "MANIFEST.json", 5)
    asked(tuneyard, "prune", directory.url, "--keep-last", "1", "--yes")
    states = {row["id"]: row["state"] for row in asked(tuneyard, "ls", directory.url)}
    assert states["step-20.attempt-1"] == "in lineage"


def test_prune_asks_and_takes_no_answer_for_no(
    tuneyard: Call, directory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_store(directory)
    before = directory.names("")
    assert error_of(tuneyard, "prune", directory.url, *ALL, status=2)["code"] == "not-confirmed"
    assert tuneyard("checkpoint", "prune", directory.url, *ALL)[0] == 2
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: no())
    assert tuneyard("checkpoint", "prune", directory.url, *ALL)[0] == 1
    assert directory.names("") == before


def no() -> None:
    import typer

    raise typer.Abort


def test_what_came_to_count_while_somebody_thought_stays(
    tuneyard: Call, directory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = a_store(directory)

    def thought(*_: object, **__: object) -> None:
        Catalogue(directory).pin(made["parent"])

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", thought)
    status, out, _ = tuneyard("checkpoint", "prune", directory.url, "--keep-last", "1")
    assert status == 0
    assert "deleted 1," in out
    assert made["parent"] in Catalogue(directory).listing().committed


def test_prune_needs_to_be_told_what(tuneyard: Call, directory: Storage) -> None:
    a_store(directory)
    assert error_of(tuneyard, "prune", directory.url, status=2)["code"] == "usage"
    assert tuneyard("checkpoint", "prune", directory.url, "--keep-last", "0", "--yes")[0] == 2


ids = st.builds(CheckpointId, st.integers(1, 9), st.integers(1, 3))


@given(
    committed=st.sets(ids),
    unfinished=st.sets(ids),
    quarantined=st.sets(ids),
    pinned=st.sets(ids),
    begun=st.integers(0, 3),
    starts_from=st.none() | ids,
    unreadable=st.sets(ids, max_size=2),
    keep_last=st.none() | st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 4),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_prune_never_takes_what_may_be_needed(
    committed: set[CheckpointId], unfinished: set[CheckpointId], quarantined: set[CheckpointId],
    pinned: set[CheckpointId], begun: int, starts_from: CheckpointId | None, unreadable: set[CheckpointId],
    keep_last: int | None, keep_every: int | None, flags: tuple[bool, bool],
) -> None:  # fmt: skip
    claims = {begun: Claim(attempt=begun, starts_from=str(starts_from) if starts_from else None)} if begun else {}
    listing = Listing(
        tuple(sorted(committed, reverse=True)), frozenset(quarantined), frozenset(pinned & committed),
        frozenset(unfinished - committed), begun, claims,
    )  # fmt: skip
    good = [found for found in listing.lineage() if found not in unreadable]
    retention = Retention(keep_last or 1, keep_every) if keep_last or keep_every else None
    gone = set(may_go(listing, good, retention, unfinished=flags[0], quarantined=flags[1]))
    assert not gone & set(good[: keep_last or 1])
    assert not gone & listing.pinned
    assert not gone & unreadable & set(listing.lineage())
    assert all(found.attempt < begun for found in gone & listing.unfinished)
    assert gone <= committed | unfinished
    if not flags[1]:
        assert not gone & committed & quarantined
    if retention is None:
        assert not gone & set(listing.lineage())


# By the name of a job.


def test_a_job_is_found_by_id_and_by_name(tuneyard: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_controller(tmp_path / "yard") as controller, listening(controller) as url:
        monkeypatch.setenv("TUNEYARD_URL", url)
        monkeypatch.setenv("TUNEYARD_TOKEN", TOKEN)
        assert error_of(tuneyard, "ls", "nothing", status=4)["code"] == "not-found"
        job = a_command_job(checkpoint={"directory": str(tmp_path / "store")})
        controller.store.add_job("job-1", job, 1.0)
        assert "has not started yet" in error_of(tuneyard, "ls", "job-1", status=4)["message"]
        controller.tick()
        assert error_of(tuneyard, "ls", "job-1", status=4)["code"] == "no-such-store"
        commit(open_storage(str(tmp_path / "store" / "job-1")), 7)
        for name in ("job-1", "job"):
            assert [row["id"] for row in asked(tuneyard, "ls", name)] == ["step-7.attempt-1"]
        controller.store.add_job("job-2", job, 2.0)
        error = error_of(tuneyard, "ls", "job", status=4)
        assert (error["code"], "job-2, job-1" in error["hint"]) == ("ambiguous-job", True)
