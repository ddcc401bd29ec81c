"""A yard inside an allocation of Slurm: Ray's head, the controller and its API on the node where it is brought up, and
a step of one task a node, `python -m orchestrator.yard.allocation`, that keeps the other nodes in it.

The step is also how the yard ends with its allocation. Slurm's SIGTERM lets what runs save, then takes the yard down,
whose processes may be out of Slurm's sight. `tuneyard down` ends the step by removing the file that its tasks look at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import psutil

from launch.attempt import write_atomically
from orchestrator.errors import ConflictError, TuneyardError
from orchestrator.execute.evacuate import evacuate
from orchestrator.execute.processes import end_all
from orchestrator.execute.slurm_agent import ENV_NODE, stop_within
from orchestrator.outside.slurm.commands import addresses, kill_wait
from orchestrator.serve.secret import ensure_token
from orchestrator.settings import Settings
from orchestrator.yard.home import connect, down, end_controller, up
from orchestrator.yard.joined import ENV_NODE as ENV_JOINED
from orchestrator.yard.joined import Keeper, prepare
from orchestrator.yard.record import (
    ENV_YARD,
    FILE,
    Process,
    Step,
    YardRecord,
    await_ready,
    log_file,
    read_yard,
    save,
    step_file,
)

LOG = "slurm-step"
LOOK_S = 0.5


def settings_here(settings: Settings) -> Settings:
    """`settings` within what the allocation has on this node, where other nodes reach it.

    Raises:
        ConflictError: this process is on no node of an allocation.
        YardError: Slurm does not answer.
    """
    here = os.environ.get(ENV_NODE)
    if here is None or "SLURM_JOB_ID" not in os.environ:
        raise ConflictError(
            "this is no node of an allocation of Slurm's",
            code="no-allocation",
            hint="say it in a script for sbatch; or after `salloc --nodes=2`, if that leaves you where you were, "
            "in `srun --nodes=1 --ntasks=1 --overlap --pty bash`",
        )
    update: dict[str, Any] = {}
    if "host" not in settings.model_fields_set:
        update["host"] = _nodes()[here]
    if settings.cpu_slots is None and "SLURM_CPUS_ON_NODE" in os.environ:
        update["cpu_slots"] = int(os.environ["SLURM_CPUS_ON_NODE"])
    if settings.memory_gb is None and "SLURM_MEM_PER_NODE" in os.environ:
        update["memory_gb"] = int(os.environ["SLURM_MEM_PER_NODE"]) * (1 << 20) / 1e9
    return settings.model_copy(update=update)


def up_in_slurm(settings: Settings) -> YardRecord:
    """Bring a yard up on all nodes of the allocation, with the settings of `settings_here`; what already runs is kept.
    What a yard of this home had to do in an earlier allocation goes on in this one.

    Raises:
        ConflictError: a yard of this home is up outside of an allocation.
        YardError: something did not start; its log is named.
    """
    _forget_another(settings)
    nodes = len(_nodes())
    record = up(settings, 1, "ray")
    if record.step is None or not record.step.alive:
        record = _with_step(settings, record, nodes)
    assert record.step is not None

    def all_there() -> bool:
        try:
            with connect(settings) as client:
                return len(client.nodes()) >= nodes
        except TuneyardError:
            return False

    await_ready(settings, record.step, "the step of the other nodes", all_there)
    return record


def _nodes() -> dict[str, str]:
    """Name → address of the allocation's."""
    return addresses(os.environ["SLURM_JOB_NODELIST"])


def _forget_another(settings: Settings) -> None:
    """What is written down of a yard in an earlier allocation: its processes have ended with that."""
    record = read_yard(settings)
    if record is None or record.slurm_job == os.environ["SLURM_JOB_ID"]:
        return
    if record.slurm_job is None and record.step is None and record.controller is not None and record.controller.alive:
        raise ConflictError(
            f"a yard is up in {settings.root}, outside of this allocation",
            code="yard-elsewhere",
            hint="`tuneyard down` where it is, or take another TUNEYARD_HOME",
        )
    end_all(ENV_YARD, record.id)
    (settings.root / FILE).unlink(missing_ok=True)
    step_file(settings).unlink(missing_ok=True)


def _with_step(settings: Settings, record: YardRecord, nodes: int) -> YardRecord:
    mark = Step(yard=record.id, node=os.environ[ENV_NODE])
    write_atomically(step_file(settings), mark.model_dump_json())
    log = log_file(settings, LOG)
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--export=ALL"]
    if "SLURM_CPUS_ON_NODE" in os.environ:
        argv.append(f"--cpus-per-task={os.environ['SLURM_CPUS_ON_NODE']}")
    with log.open("ab") as stream:
        # Without the yard's id in its environment: `down` ends what carries that, and this ends in its own time.
        child = subprocess.Popen(
            [*argv, sys.executable, "-m", "orchestrator.yard.allocation"],
            env={**os.environ, "TUNEYARD_HOME": str(settings.root)},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    step = Process(name=LOG, pid=child.pid, start_time=psutil.Process(child.pid).create_time())
    record = record.model_copy(update={"step": step, "slurm_job": os.environ["SLURM_JOB_ID"]})
    save(settings, record)
    return record


# A task of the step.


class Task:
    """One node's, until the step's file is gone, or Slurm ends it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mark = Step.read(settings)
        self._grace_s = stop_within(kill_wait())
        self._told = threading.Event()

    def run(self) -> None:
        if self._mark is None:
            return  # it is over before it has begun
        here = os.environ[ENV_NODE]
        signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        if here == self._mark.node:
            self._guard()
        else:
            self._be_a_node(here)

    def _over(self) -> bool:
        return Step.read(self._settings) != self._mark

    def _guard(self) -> None:
        """Beside the yard's own processes, which end with this task, wherever `down` was said."""
        assert self._mark is not None
        while not self._told.wait(LOOK_S) and not self._over():
            pass
        if self._told.is_set():
            record = read_yard(self._settings)
            if record is not None:
                end_controller(record)  # nothing is to start again meanwhile
            evacuate(self._settings.root, self._grace_s)
            step_file(self._settings).unlink(missing_ok=True)
            down(self._settings, force=True)
        else:
            end_all(ENV_YARD, self._mark.yard)

    def _be_a_node(self, here: str) -> None:
        record = read_yard(self._settings)
        assert record is not None
        home = self._settings.model_copy(update={"home": self._settings.root / "slurm-nodes" / here})
        mine, token = settings_here(home), ensure_token(self._settings)
        node = prepare(mine, record.url, token, name=here, address=_nodes()[here], labels={})
        keeper = Keeper(mine, node)

        def watch() -> None:
            while not self._told.wait(LOOK_S) and not self._over():
                pass
            if self._told.is_set():
                evacuate(self._settings.root, self._grace_s, (ENV_JOINED, node.id))
            keeper.end(signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()
        keeper.run()


if __name__ == "__main__":
    try:
        Task(Settings()).run()
    except TuneyardError as problem:
        sys.exit(str(problem))
