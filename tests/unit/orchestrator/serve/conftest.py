"""The API over a controller of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from orchestrator.cluster.model import Node
from orchestrator.control.loop import Controller
from orchestrator.serve import api
from tests.served import TOKEN, a_controller


@pytest.fixture
def nodes() -> list[Node] | None:
    """What the executor tells, for modules that say so; None for what there is. Tests may change the list."""
    return None


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[Node] | None) -> Iterator[Controller]:
    with a_controller(tmp_path) as controller:
        if nodes is not None:
            monkeypatch.setattr(controller.executor, "nodes", lambda: list(nodes))
        yield controller


@pytest.fixture
def http(controller: Controller) -> Iterator[TestClient]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(api.create_app(controller, TOKEN), headers=headers, raise_server_exceptions=False) as client:
        yield client
