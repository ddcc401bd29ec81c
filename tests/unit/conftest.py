"""A store of checkpoints of each kind, with the same tests for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.checkpoint.storage import Storage, open_storage


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an S3 bucket that the tests of a module share."""
    from tests import stores  # imports a whole S3 server

    with stores.object_store() as url:
        yield url


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty store."""
    if request.param == "directory":
        return open_storage(str(tmp_path / "store"))
    from tests import stores

    return stores.fresh(request.getfixturevalue("bucket"), "store")
