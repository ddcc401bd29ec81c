"""The client against a real server: errors arrive as what they were, and a short outage is waited for."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.contract import GitState, Origin
from launch.document import parse_document
from orchestrator import follow as module
from orchestrator.client import Client
from orchestrator.control.loop import Controller
from orchestrator.errors import (
    ConflictError,
    ExecutorError,
    ImpossibleGangError,
    NotFoundError,
    SpecError,
    SpecErrors,
    StoreError,
    TuneyardError,
    UnauthorizedError,
    YardError,
)
from orchestrator.execute.local import free_port
from orchestrator.job.array import expand
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import AnyJob, CommandJob
from tests.builders import a_command_job, a_training_job
from tests.served import SLOTS, TOKEN, a_client, a_controller, listening


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with a_controller(tmp_path) as controller:
        yield controller


@pytest.fixture
def client(controller: Controller) -> Iterator[Client]:
    with listening(controller) as url, a_client(url) as client:
        yield client


def test_health(client: Client) -> None:
    assert client.health()["ok"] is True


@pytest.mark.parametrize("job", [a_command_job(2, env={"A": "b", "K": {"from_env": "K"}}), a_training_job(2)])
def test_a_job_arrives_as_it_was_sent(client: Client, controller: Controller, job: CommandJob) -> None:
    view = client.submit(job)
    assert controller.store.job(view.id).job == job
    assert client.job(view.id).id == view.id
    assert [one.id for one in client.jobs()] == [view.id]
    assert [event.kind for event in client.events(view.id)] == ["submitted"]
    assert client.attempts(view.id) == []
    assert [node.cpu_slots for node in client.nodes()] == [SLOTS]


def test_where_the_job_file_stood_arrives_too(client: Client, controller: Controller) -> None:
    git = GitState(commit="0123456789" * 4, dirty=True, path="jobs/job.yaml")
    view = client.submit(a_command_job(), git)
    assert controller.store.job(view.id).origin == Origin(git=git)
    assert controller.store.job(client.submit(a_command_job()).id).origin == Origin()
    problem = refused(YardError, lambda: client.submit(a_command_job(), git.model_copy(update={"commit": "HEAD"})))
    assert (problem.code, problem.field) == ("bad-request", "git.commit")


def refused(kind: type[TuneyardError], call: Callable[[], object]) -> TuneyardError:
    with pytest.raises(TuneyardError) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_an_impossible_gang_is_one_here_too(client: Client, controller: Controller) -> None:
    problem = refused(ImpossibleGangError, lambda: client.submit(a_command_job(64)))
    assert (problem.code, problem.field) == ("impossible-gang", "resources.num_processes")
    refused(ImpossibleGangError, lambda: client.dry_run(a_command_job(64)))
    assert controller.store.jobs() == []


def test_an_unknown_job_is_not_found(client: Client) -> None:
    problem = refused(NotFoundError, lambda: client.job("none-such"))
    assert problem.field == "job"
    refused(NotFoundError, lambda: client.log("none-such", rank=0))


def test_an_ended_job_cannot_be_cancelled(client: Client, controller: Controller) -> None:
    view = client.submit(a_command_job())
    lease = controller.store.acquire_lease("test", time.time(), 60)
    assert lease is not None
    with controller.store.acting(lease) as write:
        write.set_job(view.id, JobState.FAILED, view.reason, 1.0)
    refused(ConflictError, lambda: client.cancel(view.id))


def an_array(count: int, **keys: Any) -> list[AnyJob]:
    text = json.dumps({"name": "job", "run": ["true"], "array": count} | keys)
    return [element.job for element in expand(parse_document(text), "x")]


def test_an_array_arrives_whole_and_is_followed_to_its_end(client: Client, controller: Controller) -> None:
    client.submit(a_command_job())
    jobs = an_array(3, array_at_once=2)
    git = GitState(commit="0123456789" * 4, dirty=True, path="jobs/job.yaml")
    views = client.submit_array(jobs, git)
    assert [controller.store.job(view.id).job for view in views] == jobs
    assert controller.store.job(views[2].id).origin == Origin(git=git)
    assert client.jobs(array="job-x") == views
    looks = client.follow_array("job-x")
    assert next(looks) == views
    lease = controller.store.acquire_lease("test", time.time(), 60)
    assert lease is not None
    for index, view in enumerate(views):
        with controller.store.acting(lease) as write:
            write.set_job(view.id, JobState.FAILED, view.reason, 1.0)
        states = [one.state.final for one in next(looks)]
        assert states == [number <= index for number in range(3)]
    assert list(looks) == []
    client.submit_array(an_array(1))
    with pytest.raises(YardError, match="array job-x has not ended"):
        list(client.follow_array("job-x", timeout=0.0))


def test_of_an_impossible_array_nothing_is_stored(client: Client, controller: Controller) -> None:
    jobs = an_array(2, array={"resources.num_processes": [1, 64]})
    refused(ImpossibleGangError, lambda: client.submit_array(jobs))
    refused(NotFoundError, lambda: client.submit_array(an_array(2, after=["none-such"])))
    assert controller.store.jobs() == []


def test_a_priority_is_set_by_word_or_number(client: Client) -> None:
    job = client.submit(a_command_job()).id
    assert [client.set_priority(job, wanted).priority for wanted in ("high", -3)] == [100, -3]
    problem = refused(SpecError, lambda: client.set_priority(job, "urgent"))
    assert (problem.code, problem.field) == ("unknown-value", "priority")
    refused(NotFoundError, lambda: client.set_priority("none-such", 1))


def test_queues_are_set_and_forgotten(client: Client) -> None:
    view = client.set_queue("q", {"weight": 2, "guaranteed": 1})
    assert (view.weight, view.guaranteed, view.ceiling, view.configured) == (2.0, 1, None, True)
    assert client.queues() == [view]
    assert client.set_queue("q", {"guaranteed": None}).guaranteed is None
    problem = refused(SpecError, lambda: client.set_queue("q", {"weight": 0}))
    assert (problem.code, problem.field) == ("out-of-range", "weight")
    client.delete_queue("q")
    refused(NotFoundError, lambda: client.delete_queue("q"))
    assert client.queues() == []


def test_nodes_are_marked_and_let_go(client: Client) -> None:
    (node,) = client.nodes()
    assert client.mark_node(node.name, "cordon").mark == "cordoned"
    assert client.mark_node(node.name, "drain", "a disk").reason == "a disk"
    (seen,) = client.nodes()
    assert (seen.mark, seen.mark_reason, seen.free) == ("drained", "a disk", 0)
    client.uncordon(node.name)
    problem = refused(ConflictError, lambda: client.uncordon(node.name))
    assert (problem.code, problem.field) == ("not-marked", "node")
    refused(NotFoundError, lambda: client.mark_node("none-such", "drain"))
    assert client.nodes() == [node]


def test_a_wrong_token_is_unauthorized(client: Client) -> None:
    with a_client(client.url, token=f"{TOKEN}x") as stranger:
        refused(UnauthorizedError, stranger.jobs)
        with pytest.raises(UnauthorizedError):  # no use in waiting
            list(stranger.follow("job-1"))


def test_faults_of_a_job_come_back_each(client: Client) -> None:
    job = a_command_job().model_copy(update={"name": "Not A Name", "queue": "../q"})
    with pytest.raises(SpecErrors) as caught:
        client.submit(job)
    assert [(one.code, one.field) for one in caught.value.errors] == [("bad-name", "name"), ("bad-name", "queue")]
    problem = refused(SpecError, lambda: client.submit(a_command_job().model_copy(update={"priority": 5000})))
    assert (problem.code, problem.field) == ("out-of-range", "priority")


def test_a_job_too_large_is_the_jobs_fault(client: Client) -> None:
    problem = refused(SpecError, lambda: client.submit(a_command_job(run=["x" * (1 << 20)])))
    assert problem.code == "too-large"


@pytest.mark.parametrize("kind", [StoreError, ExecutorError])
def test_trouble_behind_the_api_keeps_its_name(
    client: Client, controller: Controller, monkeypatch: pytest.MonkeyPatch, kind: type[TuneyardError]
) -> None:
    def trouble() -> None:
        raise kind("it is away", hint="wait")

    monkeypatch.setattr(controller.executor, "nodes", trouble)
    assert refused(kind, client.nodes).message == "it is away"


def test_a_dead_yard_does_not_answer() -> None:
    with a_client(f"http://127.0.0.1:{free_port()}") as client:
        problem = refused(YardError, client.jobs)
        assert problem.code == "yard-unreachable"
        assert "tuneyard up" in (problem.hint or "")


@contextmanager
def stranger(status: int, body: bytes) -> Iterator[str]:
    """Something else that listens where a yard is expected."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>no</html>"),
        (500, b""),
        (502, b'{"error": "text"}'),
        (500, b"[]"),
        (500, b'{"errors": [{"x": 1}]}'),
        (200, b"<html>hello</html>"),
        (200, b'{"not": "a list"}'),
    ],
)
def test_something_else_at_that_address_is_told_as_that(status: int, body: bytes) -> None:
    with stranger(status, body) as url, a_client(url) as client:
        problem = refused(YardError, client.jobs)
        assert "Tuneyard" in (problem.hint or "")


def test_following_survives_an_outage(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    port = free_port()
    with a_client(f"http://127.0.0.1:{port}") as client:
        with listening(controller, port):
            job = client.submit(a_command_job()).id
            views = client.follow(job)
            assert next(views).state == JobState.QUEUED
        refused(YardError, lambda: client.job(job))  # away

        def return_after_failures() -> None:
            with listening(controller, port):
                controller.store.request_cancel(job, 1.0)
                controller.step()
                back.wait(60)

        back = threading.Event()
        failures = 0
        real = client.job

        def count(job_id: str) -> object:
            nonlocal failures
            try:
                return real(job_id)
            except YardError:
                failures += 1
                if failures == 3:
                    thread.start()
                raise

        monkeypatch.setattr(client, "job", count)
        thread = threading.Thread(target=return_after_failures, daemon=True)
        *_, last = views
        back.set()
        thread.join(60)
        assert not thread.is_alive()
        assert failures >= 3
        assert last.state == JobState.CANCELLED


def test_following_gives_a_yard_up_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    monkeypatch.setattr(module, "AWAY_S", 0.05)
    with a_client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(YardError, match="does not answer"):
        list(client.follow("job-1"))


def test_following_ends_after_its_timeout(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    job = client.submit(a_command_job()).id
    with pytest.raises(YardError) as caught:
        list(client.follow(job, timeout=0.0))
    assert caught.value.code == "timeout"
