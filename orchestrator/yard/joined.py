"""This machine as a node of a yard elsewhere: a process that keeps Ray up here, found again by `node.json`.

What it starts carries the node's own id in the environment, so that `leave` ends what is left by that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from launch.attempt import write_atomically
from orchestrator.client import Client
from orchestrator.cluster.model import NAME_LABEL, START_LABEL
from orchestrator.errors import ConflictError, TuneyardError, YardError
from orchestrator.execute.evacuate import evacuate
from orchestrator.execute.processes import carrying, end_all
from orchestrator.serve.secret import RAY_TOKEN
from orchestrator.serve.surroundings import versions
from orchestrator.settings import Settings
from orchestrator.views import JoinView
from orchestrator.yard.nodes import LEAVE_S, is_agent, ray_start
from orchestrator.yard.record import FILE as YARD_FILE
from orchestrator.yard.record import Process, YardRecord, await_ready, log_file, ray_environment, wait_until

FILE = "node.json"
YARD_TOKEN = "yard-token"
ENV_NODE = "TUNEYARD_NODE"
LOG = "node"
AGAIN_S = (1.0, 30.0)
"""Least and most that the keeper waits before it starts Ray again."""
LASTED_S = 60.0
"""A node that was up for so long did start."""
EMPTY_S = 900.0
LOOK_S = 1.0
GRACE_S = 120.0
"""What runs here may take so long to save."""


class NodeRecord(BaseModel):
    """What `node.json` holds: no secrets."""

    model_config = ConfigDict(frozen=True)

    id: str
    url: str
    """Of the yard's API."""
    name: str
    address: str
    """Of this machine, for other nodes."""
    labels: dict[str, str] = {}
    keeper: Process | None = None

    @classmethod
    def read(cls, settings: Settings) -> Self | None:
        """That of this home; None if it is no node. Raises YardError if it cannot be read."""
        path = settings.root / FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as problem:
            raise YardError(
                f"the node's record {path} cannot be read",
                code="node-record",
                hint="end its processes, remove the file",
            ) from problem

    def save(self, settings: Settings) -> None:
        write_atomically(settings.root / FILE, self.model_dump_json(indent=2))

    @property
    def alive(self) -> bool:
        return self.keeper is not None and self.keeper.alive


def prepare(
    settings: Settings, url: str, token: str, *, name: str | None, address: str | None, labels: Mapping[str, str]
) -> NodeRecord:
    """Ask the yard at `url` whether this machine may be a node of it, and write down how.

    Raises:
        YardError: no yard answers, or it runs other versions.
        UnauthorizedError: the token is not the yard's.
        ConflictError: this home is a node of another yard already, or the yard takes none.
    """
    before = NodeRecord.read(settings)
    if before is not None and before.alive and before.url != url:
        raise ConflictError(
            f"this machine is a node of {before.url} already", code="joined", hint="`tuneyard node leave` first"
        )
    with Client(url, token) as client:
        told = client.joining()
    _check_versions(told)
    if before is not None and before.alive:
        _keep_secret(settings.root / YARD_TOKEN, token)
        return before
    record = NodeRecord(
        id=secrets.token_hex(6),
        url=url,
        name=name or socket.gethostname(),
        address=address or _address_toward(told.head),
        labels=dict(labels),
    )
    settings.root.mkdir(parents=True, exist_ok=True)
    _keep_secret(settings.root / YARD_TOKEN, token)
    record.save(settings)
    return record


def join(settings: Settings, record: NodeRecord) -> NodeRecord:
    """Start the keeper, if it does not live, and return once the yard has the node. Raises YardError: it did not get
    there; see its log."""
    if record.keeper is None or not record.keeper.alive:
        record = _with_keeper(settings, record)

    def there() -> bool:
        with contextlib.suppress(TuneyardError), _client(settings, record) as client:
            return any(node.name == record.name for node in client.nodes())
        return False

    assert record.keeper is not None
    await_ready(settings, record.keeper, "the node", there)
    return record


def _with_keeper(settings: Settings, record: NodeRecord) -> NodeRecord:
    path = log_file(settings, LOG)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.yard.joined"],
            env={**os.environ, "TUNEYARD_HOME": str(settings.root)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=settings.root,
        )  # fmt: skip
    keeper = Process(name=LOG, pid=child.pid, start_time=psutil.Process(child.pid).create_time())
    record = record.model_copy(update={"keeper": keeper})
    record.save(settings)
    return record


def leave(settings: Settings, *, force: bool) -> NodeRecord | None:
    """End this node, empty of attempts unless `force`. Returns what it was; None if it was none.

    Raises:
        YardError: the yard does not answer, or the node was not empty in time; `force` ends it all the same.
    """
    record = NodeRecord.read(settings)
    if record is None:
        return None
    if not force:
        _empty(settings, record)
    if record.keeper is not None and record.keeper.alive:
        psutil.Process(record.keeper.pid).send_signal(signal.SIGINT if force else signal.SIGTERM)
        wait_until(lambda: not record.alive, 2 * LEAVE_S)
    left = end_all(ENV_NODE, record.id)
    if left:
        raise YardError(f"processes {left} could not be ended", code="not-ended", hint="look at them with `ps`")
    if not force:
        _uncordon(settings, record)
    for name in (FILE, YARD_TOKEN, RAY_TOKEN):
        (settings.root / name).unlink(missing_ok=True)
    return record


def _empty(settings: Settings, record: NodeRecord) -> None:
    with _client(settings, record) as client:
        client.mark_node(record.name, "drain", "it leaves the yard")
        deadline = time.monotonic() + EMPTY_S
        while any(node.name == record.name and node.busy for node in client.nodes()):
            if time.monotonic() > deadline:
                raise YardError(
                    f"{record.name} still has attempts after {EMPTY_S:.0f} s",
                    code="not-empty",
                    hint="see `tuneyard ls`; `tuneyard node leave --force` ends them, and they go on elsewhere",
                )
            time.sleep(LOOK_S)


def sees_home(settings: Settings, record: NodeRecord) -> bool:
    """Whether the yard's directory is in sight of this machine, at the same place."""
    with _client(settings, record) as client:
        told = client.joining()
    try:
        return YardRecord.model_validate_json((Path(told.home) / YARD_FILE).read_bytes()).id == told.yard
    except (OSError, ValidationError):
        return False


# The keeper.


class Keeper:
    """Keeps Ray up on this machine until it is told to end: Ray ends itself where the head has given the node up."""

    def __init__(self, settings: Settings, record: NodeRecord, grace_s: float = GRACE_S) -> None:
        """`grace_s` is the time that what runs here has to save."""
        self._settings, self._record = settings, record
        self._ended = False
        self._grace_s = grace_s

    def run(self) -> None:
        """Until `end`. Raises what `prepare` raises, if the yard does not want the node before it was ever one."""
        wait_s, known = AGAIN_S[0], None
        while not self._ended:
            try:
                with _client(self._settings, self._record) as client:
                    known = client.joining()
                _check_versions(known)
            except TuneyardError as problem:
                print(f"the yard does not say where Ray is: {problem}", flush=True)
                if known is None and not isinstance(problem, YardError):
                    raise
            begun = time.monotonic()
            if known is not None and not self._ended:
                self._serve(known)
            wait_s = AGAIN_S[0] if time.monotonic() - begun > LASTED_S else min(2 * wait_s, AGAIN_S[1])
            deadline = time.monotonic() + wait_s
            while not self._ended and time.monotonic() < deadline:
                time.sleep(0.1)

    def end(self, number: int, *_: object) -> None:
        """SIGTERM: what runs here saves first, and goes on elsewhere. SIGINT: at once."""
        self._ended = True
        self._grace_s = self._grace_s if number == signal.SIGTERM else 0.0

    def _serve(self, told: JoinView) -> None:
        """One life of Ray here."""
        token = self._settings.root / RAY_TOKEN
        if told.ray_token is not None:
            _keep_secret(token, told.ray_token)
        env = {**os.environ, ENV_NODE: self._record.id} | ray_environment(token, redis=told.redis)
        # Unix sockets have short names: Ray's directory cannot lie deep.
        folder = Path(tempfile.mkdtemp(prefix="tuneyard-"))
        labels = {**self._record.labels, NAME_LABEL: self._record.name, START_LABEL: secrets.token_hex(4)}
        argv = ray_start(self._settings, folder, labels)
        argv += [f"--address={told.head}", f"--node-ip-address={self._record.address}"]
        print(f"Ray begins as {self._record.name} ({self._record.address}), for the head at {told.head}", flush=True)
        child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        marked = False
        try:
            while child.poll() is None and not self._ended:
                time.sleep(0.1)
            if child.poll() is None:
                marked = self._evacuate(Path(told.home))
                child.terminate()
            print(f"Ray has ended with status {child.wait()}", flush=True)
        finally:
            # Agents end their ranks and say so, which is quicker than to wait for the ranks' leash.
            wait_until(lambda: not _agents(self._record.id), LEAVE_S)
            end_all(ENV_NODE, self._record.id)
            shutil.rmtree(folder, ignore_errors=True)
            if marked:
                _uncordon(self._settings, self._record)

    def _evacuate(self, home: Path) -> bool:
        """Let what runs here save, and the yard send nothing more. Returns whether the node was marked for that."""
        if not self._grace_s:
            return False
        marked = False
        with contextlib.suppress(TuneyardError), _client(self._settings, self._record) as client:
            name = self._record.name
            if any(node.name == name and node.mark is None for node in client.nodes()):
                client.mark_node(name, "cordon", "it ends")
                marked = True
        if not evacuate(home, self._grace_s, (ENV_NODE, self._record.id)):
            print(f"not all ranks had saved after {self._grace_s:.0f} s", flush=True)
        return marked


def _uncordon(settings: Settings, record: NodeRecord) -> None:
    """It comes back as any other."""
    with contextlib.suppress(TuneyardError), _client(settings, record) as client:
        client.uncordon(record.name)


def _agents(node: str) -> list[psutil.Process]:
    return [process for process in carrying(ENV_NODE, node) if is_agent(process)]


def keep(settings: Settings) -> None:
    """Be the keeper of this home's node, in this process, until SIGTERM or SIGINT."""
    record = NodeRecord.read(settings)
    if record is None:
        raise YardError(f"{settings.root} is no node of a yard", code="no-node", hint="`tuneyard node join URL`")
    keeper = Keeper(settings, record)
    signal.signal(signal.SIGTERM, keeper.end)
    signal.signal(signal.SIGINT, keeper.end)
    keeper.run()


def _client(settings: Settings, record: NodeRecord) -> Client:
    return Client(record.url, (settings.root / YARD_TOKEN).read_text().strip())


def _check_versions(told: JoinView) -> None:
    for what, here in versions().items():
        there = getattr(told, what)
        if here != there:
            raise YardError(
                f"the yard runs {what} {there}, and this machine {here}",
                code="other-version",
                hint=f"install {what} {there} here: all nodes must run the same",
            )


def _address_toward(head: str) -> str:
    """This machine's address on the way to the head; nothing is sent."""
    host, _, port = head.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def _keep_secret(path: Path, secret: str) -> None:
    """Write it so that nobody else ever reads it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secret)
    temporary.replace(path)


if __name__ == "__main__":
    try:
        keep(Settings())
    except TuneyardError as problem:
        sys.exit(str(problem))
