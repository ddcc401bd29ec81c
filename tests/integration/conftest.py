"""Fixtures of the integration tests."""

from tests.kubernetes.fixtures import api_server, cluster

__all__ = ["api_server", "cluster"]
