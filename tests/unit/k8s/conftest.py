"""What the manifests render to, once a session: kubectl is slow."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from k8s.check import render
from k8s.check.model import Objects

Render = Callable[[str], Objects]


@pytest.fixture(scope="session")
def cache() -> dict[str, Objects]:
    if render.kubectl() is None:
        pytest.skip("kubectl is not installed: nothing can be rendered")
    return {}


@pytest.fixture
def rendered(cache: dict[str, Objects]) -> Render:
    """The objects of an overlay, for the test to break."""

    def objects(subject: str) -> Objects:
        if subject not in cache:
            cache[subject] = render.render(subject)
        return copy.deepcopy(cache[subject])

    return objects
