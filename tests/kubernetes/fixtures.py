"""The emulated Kubernetes API server, one for all tests of this session that want it.

Where the schemas of custom resources are not at hand it takes RayJobs as they come.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kubernetes.cluster import Cluster, a_cluster


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("kubernetes")) as cluster:
        yield cluster


@pytest.fixture
def cluster(api_server: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The server with nothing in it, as this process's own; clients are less patient, and pause less."""
    from orchestrator.outside.k8s import api

    for name, value in api_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNEYARD_K8S_PATIENCE", "20")
    monkeypatch.setattr(api, "FIRST_PAUSE_S", 0.01)
    api.api.cache_clear()
    api_server.forget()
    yield api_server
    api_server.empty()
    api.api.cache_clear()
