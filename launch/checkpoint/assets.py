"""Small files beside the weights that an export needs: configuration, tokenizer, adapter. Torch-free.

They are stored once under the hash of them all, so that the checkpoints of a job share them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from launch.checkpoint.manifest import Damaged, hash_of
from launch.checkpoint.storage import Storage


def store_assets(storage: Storage, files: Mapping[str, bytes]) -> str | None:
    """Write `files` if they are not there yet; returns what to ask `load_assets` for, None if there are none."""
    if not files:
        return None
    found = _hash(files)
    for name, data in files.items():
        storage.create(f"assets/{found}/{name}", data)
    return found


def load_assets(storage: Storage, found: str) -> dict[str, bytes]:
    """The files by name.

    Raises:
        Damaged: they are not those that were stored.
    """
    prefix = f"assets/{found}/"
    names = [name for name in storage.names(prefix.rstrip("/")) if name.startswith(prefix)]
    files = {name.removeprefix(prefix): storage.read(name) for name in names}
    if _hash(files) != found:
        raise Damaged(f"{storage.url}/{prefix} is not what was stored: a file is missing or differs")
    return files


def _hash(files: Mapping[str, bytes]) -> str:
    return hash_of(json.dumps({name: hash_of(data) for name, data in sorted(files.items())}).encode())
