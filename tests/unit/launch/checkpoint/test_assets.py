"""Files that an export needs are stored once, and come back as they were."""

from __future__ import annotations

import pytest

from launch.checkpoint.assets import load_assets, store_assets
from launch.checkpoint.manifest import Damaged
from launch.checkpoint.storage import Storage

FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"[]", "empty": b""}


def test_files_come_back_and_are_stored_once(storage: Storage) -> None:
    found = store_assets(storage, FILES)
    assert found is not None
    names = storage.names("")
    assert store_assets(storage, dict(reversed(FILES.items()))) == found
    assert storage.names("") == names
    assert load_assets(storage, found) == FILES
    assert store_assets(storage, FILES | {"empty": b"x"}) != found
    assert store_assets(storage, {}) is None


@pytest.mark.parametrize("spoil", ["changed", "missing", "another"])
def test_what_is_not_as_it_was_is_damage(storage: Storage, spoil: str) -> None:
    found = store_assets(storage, FILES)
    assert found is not None
    match spoil:
        case "changed":
            storage.write(f"assets/{found}/config.json", [memoryview(b"{}")])
        case "missing":
            storage.delete(f"assets/{found}/config.json")
        case "another":
            storage.create(f"assets/{found}/extra", b"")
    with pytest.raises(Damaged, match=found):
        load_assets(storage, found)
    assert store_assets(storage, FILES) == found  # a save goes on all the same
