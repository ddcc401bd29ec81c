"""Every damage is found, and told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.checkpoint.assets import store_assets
from launch.checkpoint.manifest import BLOCK, CheckpointError, CheckpointId
from launch.checkpoint.storage import Storage, open_storage
from launch.checkpoint.verify import Fault, verify
from tests.stores import a_store, commit, damage

SIZE = 2 * BLOCK + 100


def test_what_is_whole_is_found_whole(storage: Storage) -> None:
    made = a_store(storage)
    for name in ("pinned", "parent", "newest", "superseded"):
        finding = verify(storage, made[name])
        assert (finding.checkpoint, finding.read, finding.faults) == (made[name], 8000, ())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one checkpoint of one shard of three blocks."""
    folder = tmp_path_factory.mktemp("large")
    commit(open_storage(str(folder)), 1, ranks=1, shard_size=SIZE)
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, SIZE - 1) | st.sampled_from([0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, SIZE - 1]))
def test_a_bit_that_changed_is_found_in_its_block(large: Path, at: int) -> None:
    storage = open_storage(str(large))
    shard = large / "step-1.attempt-1" / "rank-0.safetensors"
    found = CheckpointId(1, 1)
    damage(shard, at)
    try:
        start = at // BLOCK * BLOCK
        fault = Fault("step-1.attempt-1/rank-0.safetensors", "the hash differs", start, min(start + BLOCK, SIZE))
        assert verify(storage, found).faults == (fault,)
    finally:
        damage(shard, at)
    assert verify(storage, found).faults == ()


def test_a_file_that_is_cut_goes_on_or_is_gone(storage: Storage) -> None:
    found = commit(storage, 1, ranks=3, shard_size=1000)
    for rank, size in enumerate((999, 1001)):
        data = storage.read(f"{found}/rank-{rank}.safetensors") + b"x"
        storage.write(f"{found}/rank-{rank}.safetensors", [memoryview(data)[:size]])
    storage.delete(f"{found}/rank-2.safetensors")
    finding = verify(storage, found)
    assert [str(fault) for fault in finding.faults] == [
        "step-1.attempt-1/rank-0.safetensors, bytes 0 to 1000: the file ends at byte 999",
        "step-1.attempt-1/rank-1.safetensors: the file goes on past its 1000 bytes",
        "step-1.attempt-1/rank-2.safetensors: is missing",
    ]


def test_manifest_and_assets_count_too(storage: Storage) -> None:
    assets = store_assets(storage, {"config.json": b"{}"})
    first, second = commit(storage, 1, assets=assets), commit(storage, 2, assets=assets)
    storage.delete(f"assets/{assets}/config.json")
    storage.write(f"{second}/MANIFEST.json", [memoryview(b"{}")])
    assert [fault.file for fault in verify(storage, first).faults] == [f"assets/{assets}"]
    assert [fault.file for fault in verify(storage, second).faults] == [str(second)]


def test_a_store_that_fails_is_no_damage(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commit(storage, 1)

    def away(_name: str) -> None:
        raise CheckpointError("the store does not answer", code="storage-failed")

    monkeypatch.setattr(storage, "reader", away)
    with pytest.raises(CheckpointError, match="does not answer"):
        verify(storage, found)
