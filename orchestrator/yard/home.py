"""A yard on this machine: Ray's processes, the controller and its API, each detached, all found again by `yard.json`.

Every process of a yard carries its id in the environment, so that `down` ends what is left by that, not by name.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from orchestrator.client import Client
from orchestrator.cluster.model import START_LABEL
from orchestrator.errors import ConflictError, TuneyardError, YardError
from orchestrator.execute.local import free_port
from orchestrator.execute.processes import end_all
from orchestrator.job.lifecycle import JobState
from orchestrator.serve.secret import ensure_token
from orchestrator.serve.surroundings import is_loopback
from orchestrator.settings import Settings
from orchestrator.yard.nodes import LEAVE_S, forget, mend_ray, start_ray
from orchestrator.yard.record import (
    ENV_YARD,
    FILE,
    Process,
    YardRecord,
    await_ready,
    not_started,
    read_yard,
    save,
    spawn,
    step_file,
    wait_until,
)
from orchestrator.yard.remote import Remote, on_all

STOP_S = 10.0
KEEP_S = 2.0
"""How often a yard that is kept up is looked at."""
NODE_RETRIES = 3


def connect(settings: Settings, url: str | None = None) -> Client:
    """A client of the yard at `url`, or of this home's.

    Raises:
        YardError: this home has no yard.
    """
    if url is not None:
        if settings.token is None:
            raise YardError("a yard elsewhere needs its token", code="no-token", hint="set TUNEYARD_TOKEN")
        return Client(url, settings.token.get_secret_value())
    record = read_yard(settings)
    if record is None:
        raise YardError(
            f"there is no yard in {settings.root}", hint="start one with `tuneyard up`, or use `tuneyard run`"
        )
    return Client(record.url, ensure_token(settings))


def is_up(settings: Settings, record: YardRecord | None) -> bool:
    """Whether the yard's controller lives and its API answers."""
    if record is None or record.controller is None or not record.controller.alive:
        return False
    try:
        with Client(record.url, ensure_token(settings), timeout=5) as client:
            return bool(client.health().get("ok"))
    except YardError:
        return False


def up(
    settings: Settings, nodes: int, executor: str, remotes: Sequence[Remote] = (), *, new_controller: bool = False
) -> YardRecord:
    """Bring the yard up; what already runs is kept, so that this also starts again what has died of it, with as many
    nodes and the executor that the yard was made with. `remotes` join it, and those of before whose nodes are gone.
    With `new_controller` the controller is another one, of the code that is installed now; attempts go on.

    Raises:
        YardError: something did not start; its log is named. Or a machine could not join; the others have.
    """
    if remotes:
        _check_reach(settings, executor)
    before = read_yard(settings)
    if new_controller and before is not None:
        end_controller(before)
    record = _up_here(settings, nodes, executor)
    known = {remote.host: remote for remote in (*record.remotes, *remotes)}
    if known:
        record = record.model_copy(update={"remotes": tuple(known.values())})
        save(settings, record)
        _join(settings, record)
    return record


def _check_reach(settings: Settings, executor: str) -> None:
    if executor != "ray":
        raise YardError("without Ray a yard has one machine", code="no-ray", field="hosts", hint="leave --executor out")
    if is_loopback(settings.host):
        raise YardError(
            f"other machines do not reach {settings.host}",
            code="loopback",
            field="hosts",
            hint="set TUNEYARD_HOST to this machine's address; of a yard that is up, after `tuneyard down`",
        )


def _join(settings: Settings, record: YardRecord) -> None:
    with connect(settings) as client:
        there = {node.name for node in client.nodes()}
    away = [remote for remote in record.remotes if remote.host not in there]
    token = ensure_token(settings)
    failed = on_all(away, lambda remote: remote.join(record.url, token))
    if failed:
        raise failed[0]


def _up_here(settings: Settings, nodes: int, executor: str) -> YardRecord:
    record = read_yard(settings)
    if record is not None and record.whole and is_up(settings, record):
        return record
    ensure_token(settings)
    if record is None:
        record = YardRecord(id=secrets.token_hex(6), url=_url(settings), executor=executor, redis=settings.redis)
        if executor == "ray":
            record = start_ray(settings, record, nodes)
    elif not record.whole:
        record = mend_ray(settings, record)
    # Without Ray there is nothing but attempts beside the controller, and those are adopted.
    if record.controller is None or not record.controller.alive:
        record = record.model_copy(update={"controller": _start_controller(settings, record)})
    save(settings, record)
    return _wait_for_api(settings, record)


def down(settings: Settings, *, force: bool) -> YardRecord | None:
    """End every process of the yard. The database, logs and models stay.

    Returns:
        The yard that was ended; None if there was none.

    Raises:
        ConflictError: jobs are live and `force` is not given.
        YardError: a process could not be ended; or a machine that was joined by ssh could not be told to leave, when
            all else has ended.
    """
    record = read_yard(settings)
    if record is None:
        return None
    if not force and is_up(settings, record):
        with connect(settings) as client:
            live = [job.id for job in client.jobs() if not job.state.final and job.state != JobState.PAUSED]
        if live:
            raise ConflictError(
                f"{len(live)} jobs are live: {', '.join(live[:5])}",
                code="jobs-live",
                hint="wait for them, cancel them, or `tuneyard down --force`: they start again with the next `up`",
            )
    _end_step(settings, record)
    end_controller(record)
    left = end_all(ENV_YARD, record.id)
    if left:
        raise YardError(f"processes {left} could not be ended", code="not-ended", hint="look at them with `ps`")
    if record.ray_dir:
        shutil.rmtree(record.ray_dir, ignore_errors=True)
    if record.redis is not None:
        forget(record.redis, record.id)
    failed = on_all(record.remotes, lambda remote: remote.leave())
    (settings.root / FILE).unlink(missing_ok=True)
    if failed:
        raise failed[0]
    return record


def keep_up(settings: Settings, record: YardRecord, until: Callable[[], bool]) -> None:
    """Start again what dies, until `until`; what runs goes on afterwards. What cannot be started is tried again."""
    while not until():
        try:
            if read_yard(settings) is None:
                return  # `tuneyard down`
            record = up(settings, len(record.ray) or 1, record.executor)
        except TuneyardError as problem:
            print(f"not up again: {problem}", flush=True)
        deadline = time.monotonic() + KEEP_S
        while not until() and time.monotonic() < deadline:
            time.sleep(0.1)


def _end_step(settings: Settings, record: YardRecord) -> None:
    """In an allocation: let the other nodes leave, and wait for that; a task of theirs that says so itself does not."""
    step = record.step
    if step is None or not step_file(settings).exists():
        return
    step_file(settings).unlink(missing_ok=True)
    wait_until(lambda: not step.alive, 2 * LEAVE_S)
    if step.alive:
        psutil.Process(step.pid).kill()


def end_controller(record: YardRecord) -> None:
    """Attempts go on without it."""
    controller = record.controller
    if controller is not None and controller.alive:
        psutil.Process(controller.pid).send_signal(signal.SIGTERM)
        wait_until(lambda: not controller.alive, STOP_S)
        if controller.alive:
            psutil.Process(controller.pid).kill()


def _url(settings: Settings) -> str:
    return f"http://{settings.host}:{settings.port or free_port()}"


def _start_controller(settings: Settings, record: YardRecord) -> Process:
    argv = [sys.executable, "-m", "orchestrator.serve", "--executor", record.executor]
    if record.ray_address:
        argv += ["--address", record.ray_address]
    return spawn(settings, record, "controller", argv)


def _wait_for_api(settings: Settings, record: YardRecord) -> YardRecord:
    """The record, once all nodes are there. On a loaded machine a raylet may give up starting, and is started again."""
    assert record.controller is not None
    retries = NODE_RETRIES

    def answers() -> bool:
        nonlocal record, retries
        ended = [process for process in record.ray if not process.alive]
        if ended:
            if record.ray[0] in ended or not retries:
                raise not_started(settings, ended[0], f"{ended[0].name} ended")
            retries -= 1
            record = mend_ray(settings, record)
            save(settings, record)
        if not is_up(settings, record):
            return False
        try:
            with connect(settings) as client:
                nodes = client.nodes()
                there = {node.labels.get(START_LABEL) for node in nodes}
                return bool(nodes) and all(process.label in {None, *there} for process in record.ray)
        except TuneyardError:
            return False  # a controller that was there before finds a new head in its own time

    await_ready(settings, record.controller, "the controller", answers)
    return record
