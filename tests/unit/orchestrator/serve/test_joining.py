"""What a machine is told that wants to be a node of a yard."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from orchestrator.control.loop import Controller
from orchestrator.serve import api
from orchestrator.serve.surroundings import is_loopback, versions
from tests.served import AUTH, TOKEN


def joining(controller: Controller, head: str | None, asker: str = "10.0.0.2") -> tuple[int, dict[str, object]]:
    with TestClient(api.create_app(controller, TOKEN, head), headers=AUTH, client=(asker, 50_000)) as client:
        answer = client.get("/v1/joining")
        assert answer.status_code != 200 or answer.headers["cache-control"] == "no-store"
        return answer.status_code, answer.json()


def test_it_is_told_where_rays_head_is_and_its_token(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray-token").write_text("s3cret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray-token"))
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "10.0.0.9:6379")
    status, told = joining(controller, "10.0.0.1:6379")
    assert status == 200
    assert (told["head"], told["ray_token"], told["redis"]) == ("10.0.0.1:6379", "s3cret", True)
    assert told["home"] == str(controller.settings.root)
    assert versions().items() <= told.items()


@pytest.mark.parametrize(("head", "code"), [(None, "no-ray"), ("127.0.0.1:6379", "loopback")])
def test_a_yard_that_no_other_machine_reaches_takes_none(controller: Controller, head: str | None, code: str) -> None:
    status, told = joining(controller, head)
    assert (status, told["error"]["code"]) == (409, code)  # type: ignore[index]
    assert told["error"]["hint"]  # type: ignore[index]


def test_from_the_same_machine_loopback_will_do(controller: Controller) -> None:
    assert joining(controller, "127.0.0.1:6379", "127.0.0.1")[0] == 200


@pytest.mark.parametrize(
    ("host", "told"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)]
)
def test_what_loopback_is(host: str, told: bool) -> None:
    assert is_loopback(host) is told
