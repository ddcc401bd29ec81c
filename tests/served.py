"""The API over a real controller, executor and database, in this process; and over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi.testclient import TestClient

from launch.attempt import ENV_RUN_ID
from orchestrator.client import Client
from orchestrator.control.loop import Controller
from orchestrator.execute.local import LocalExecutor, free_port
from orchestrator.execute.processes import end_all
from orchestrator.serve.api import create_app
from orchestrator.settings import Settings
from orchestrator.store.store import Store

TOKEN = "a-token-of-the-tests"
SLOTS = 4
START_S = 60.0
AUTH = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
JOB = {"name": "job", "run": ["true"]}
TRAINING = {
    "name": "train",
    "model": {"name_or_path": "org/model", "task": "sequence-classification"},
    "data": {"train": ["a.csv"]},
    "train": {"max_steps": 1},
}


def submit(http: TestClient, **keys: Any) -> Any:
    return http.post("/v1/jobs", json={"job": JOB | keys})


def typed(answer: Any, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """The error of an answer, once it is of the right kind."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["code"], error["field"]) == (code, field), error
    assert error["message"]
    return error


@contextmanager
def a_controller(home: Path, slots: int = SLOTS) -> Iterator[Controller]:
    """A controller that ticks when the test says so.

    What its attempts leave is ended: first the agents, which might yet start a launcher, then the rest by run id.
    """
    store = Store(f"sqlite:///{home / 'yard.db'}")
    store.prepare()
    executor = LocalExecutor(slots)
    controller = Controller(store, executor, Settings(home=home, tick=0.05, leash=10))
    try:
        yield controller
    finally:
        for agent in executor._children:
            agent.kill()
            agent.wait()
        for job in store.jobs(limit=10_000):
            for attempt in store.attempts(job.id):
                assert end_all(ENV_RUN_ID, attempt.run.run_id) == []
        controller.close()
        store.close()


def finish(controller: Controller, job_id: str, seconds: float = 120.0) -> None:
    """Tick until the job is final."""
    deadline = time.monotonic() + seconds
    while not controller.store.job(job_id).state.final:
        assert time.monotonic() < deadline, controller.store.job(job_id)
        controller.step()
        controller.wait()


@contextmanager
def listening(controller: Controller, port: int | None = None, token: str = TOKEN) -> Iterator[str]:
    """The API on a socket of its own, served by a thread; yields its address."""
    port = port or free_port()
    config = uvicorn.Config(
        create_app(controller, token), host="127.0.0.1", port=port, log_level="critical", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=START_S)
        assert not thread.is_alive()


def a_client(url: str, token: str = TOKEN) -> Client:
    return Client(url, token, timeout=30)
