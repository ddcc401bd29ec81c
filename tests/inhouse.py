"""A yard within the test: the real controller, database and node agent; ranks are forks of the test's own standby."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.attempt import AttemptFiles, write_atomically
from launch.contract import RunContract, StopRequest
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import AttemptStatus, ProbeReport, ProbeRequest, StandbyReport
from orchestrator.control.loop import Controller
from orchestrator.errors import ExecutorError
from orchestrator.execute.local import free_ports
from orchestrator.execute.member import Member
from orchestrator.execute.processes import of_run
from orchestrator.execute.protocol import Executor, read_bytes, read_report
from orchestrator.execute.request import build_request
from orchestrator.execute.standby import Ordered
from orchestrator.job.spec import AnyJob
from orchestrator.memory.alike import Peak, key_of
from orchestrator.settings import Settings
from orchestrator.store.rows import AttemptRow, EventRow, JobRow
from orchestrator.store.store import Store
from tests.worlds import standby

ROOT = Path(__file__).parents[1]
TICK_S = 0.05


class Forks:
    """What a Member needs of Standbys: the one of the test session, whatever the environment."""

    def want(self, environment: dict[str, str]) -> None:
        """It is there already."""

    def launch(self, argv: tuple[str, ...], environment: dict[str, str], cwd: str, log: Path) -> Ordered | None:
        return standby().order(argv, environment, cwd, log)


class Here:
    """An executor whose node agents are turns of the test's own loop; ranks run `tests.victims` in place of launch."""

    def __init__(
        self, nodes: int = 1, memory_bytes: int | None = None, slots: int | None = None, **environment: str
    ) -> None:
        self._nodes, self._environment = nodes, {"HF_HUB_OFFLINE": "1", **environment}
        self._slots = slots or (4 if nodes == 1 else 1)
        self._memory_bytes = memory_bytes
        self._members: dict[tuple[str, int], Member] = {}

    def nodes(self) -> list[Node]:
        cores = os.cpu_count() or 1
        return [
            Node(
                id=f"n{index}",
                name=f"n{index}",
                address="127.0.0.1",
                cores=cores,
                cpu_slots=self._slots,
                memory_bytes=self._memory_bytes,
            )
            for index in range(self._nodes)
        ]

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:
        return dict.fromkeys(asked)  # none has an answer

    def standbys(self) -> dict[str, StandbyReport]:
        return {}

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        return {node: free_ports(count) for node, count in wanted.items()}

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        for contract in contracts:
            for index in range(len(contract.nodes)):
                request = build_request(contract, index)
                argv = tuple("tests.victims" if word == "launch" else word for word in request.argv)
                member = Member(replace(request, argv=argv, cwd=str(ROOT), env={**request.env, **self._environment}))
                if member.start(Forks()):  # type: ignore[arg-type]
                    self._members[contract.run_id, index] = member
        return {}

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        for key, member in list(self._members.items()):
            if member.tick():
                del self._members[key]
        return {
            one.run_id: AttemptStatus(
                reports=tuple(
                    read_report(one, index, offsets[one.run_id], reachable=True) for index in range(len(one.nodes))
                )
            )
            for one in contracts
        }

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        write_atomically(AttemptFiles(contract.run_dir).stop, request.model_dump_json())

    def release(self, contract: RunContract) -> None:
        """Nothing is reserved."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        files = AttemptFiles(contract.run_dir)
        return read_bytes(files.launcher_log(0) if rank is None else files.log(rank), offset, limit)

    def close(self) -> None:
        """Nothing is open."""


class Ended:
    """A job that has run to its end, and all that is known of it."""

    def __init__(self, store: Store, job_id: str) -> None:
        self.job: JobRow = store.job(job_id)
        self.attempts: list[AttemptRow] = store.attempts(job_id)
        self.events: list[EventRow] = store.events(job_id)
        self.peaks: list[Peak] = store.peaks([key_of(self.job.job) or ""])[::-1]
        """Of jobs like it, oldest first."""

    @property
    def losses(self) -> list[float]:
        assert self.job.result is not None, self.story()
        return list(self.job.result["train"]["losses"])

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.kind == kind]

    def files(self, attempt: int) -> AttemptFiles:
        return AttemptFiles(self.attempts[attempt - 1].run.run_dir)

    def story(self) -> str:
        lines = [f"{event.attempt} {event.kind} {event.data}" for event in self.events]
        logs = [path.read_text(errors="replace")[-2000:] for path in self.files(-1).run_dir.glob("**/*log")]
        return "\n".join([*lines, *logs])


def carried_out(
    folder: Path,
    job: AnyJob,
    *,
    name: str = "job-1",
    nodes: int = 1,
    patience_s: float = 100,
    memory_bytes: int | None = None,
    sizing: str | None = None,
    executor: Executor | None = None,
    **environment: str,
) -> Ended:
    """Run `job` to its end in the yard of `folder`, with more `environment` for its ranks. `memory_bytes` is what each
    node has, where the yard is to know it; another `executor` than Here knows better."""
    settings = Settings(home=folder)
    store = Store(f"sqlite:///{folder / 'yard.db'}")
    store.prepare()
    controller = Controller(store, executor or Here(nodes, memory_bytes, **environment), settings)
    store.add_job(name, job, time.time(), sizing=sizing)
    deadline = time.monotonic() + patience_s
    try:
        while not store.job(name).state.final:
            controller.tick()
            assert time.monotonic() < deadline, Ended(store, name).story()
            time.sleep(TICK_S)
    finally:
        for attempt in store.attempts(name):
            for process in of_run(attempt.run.run_id):
                process.kill()
    ended = Ended(store, name)
    controller.close()
    store.close()
    return ended
