"""One node's part of an attempt: starts its launcher, watches its ranks, ends them. Standard library and psutil alone.

Everything it learns it writes into the attempt's directory, so that whoever asks next need not have been there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launch.attempt import (
    CANCELLED,
    ENV_HEARTBEAT,
    ENV_RUN_ID,
    HUNG,
    AttemptFiles,
    ExitCode,
    told_to_torch,
    write_atomically,
)
from launch.pulse import read_beat
from orchestrator.execute.energy import Meter
from orchestrator.execute.oom import Witness
from orchestrator.execute.processes import inherited, is_alive, kill, of_run
from orchestrator.execute.search import found_in, signal_in, tail, told_to_end
from orchestrator.execute.stall import Stacks, Watch, dump_collectives, stack_in
from orchestrator.execute.standby import Ordered, Standbys

HEARTBEAT_S = 0.5
ECHO_S = 3.0  # time that ranks have to write down how they fail once one of them has
LINGER_S = 30.0  # time that processes may take to leave once every rank has said how it ended
LAST_MINUTE_S = 20.0  # added to that for a rank that saves what it has
UPLOAD_S = 60.0  # time that copies in memory have to get into the store; what does not stays where it is
LOG_TAIL = 4000


@dataclass(frozen=True)
class LaunchRequest:
    """The very request that starts one node's ranks: what a dry run shows and what is carried out."""

    run_id: str
    run_dir: str
    node_index: int
    ranks: tuple[int, ...]
    argv: tuple[str, ...]
    env: dict[str, str]
    """On top of the agent's environment."""
    env_from: dict[str, str]
    cwd: str
    files: dict[str, str]
    """Path → text, written before the start."""
    owner: tuple[int, float] | None = None
    """Pid and start time of a process without which the attempt has no purpose (an embedded `run`)."""
    hang_s: float | None = None
    """How long a rank may stay in a part of a step, in place of patience that adapts; 0 is for ever."""
    standby: bool = False
    """Whether a standby may be its launcher: it trains, and no secret would lie in a standby's environment."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs that it holds here."""
    log_patterns: tuple[str, ...] = ()
    """What is looked for in the logs of ranks that failed."""
    copies: tuple[str, str] | None = None
    """With copies in memory: the folder where its ranks leave them, and the URL of the checkpoints to put them to."""

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> LaunchRequest:
        data = json.loads(text)
        data["ranks"], data["argv"] = tuple(data["ranks"]), tuple(data["argv"])
        data["owner"] = tuple(data["owner"]) if data["owner"] else None
        data["gpus"] = tuple(data.get("gpus", ()))
        data["log_patterns"] = tuple(data.get("log_patterns", ()))
        data["copies"] = tuple(data["copies"]) if data.get("copies") else None
        return cls(**data)


@dataclass
class Member:
    """The state of one node's part; `start` once, then `tick` until it returns True."""

    request: LaunchRequest
    launcher: subprocess.Popen[bytes] | Ordered | None = None
    ended: bool = False
    _seen: dict[int, dict[str, Any]] = field(default_factory=dict)
    _witnesses: dict[int, Witness] = field(default_factory=dict)
    _watches: dict[int, Watch] = field(default_factory=dict)
    _stacks: Stacks | None = None
    """Being written, or written, once a rank has not moved for too long."""
    _stalled: bool = False
    _ended_by_us: str | None = None
    """Why we ended what was left of the ranks, once we have."""
    _failed_at: float | None = None
    _over_at: float | None = None
    _beat_at: float = 0.0
    _meter: Meter | None = None
    _node_lost: bool = False
    """Whether its node counts as lost from now on, so that its ranks are to go at once."""
    _bereft: bool = False
    """Whether the agent that started it has died: how its ranks ended is not known then."""
    _upload: tuple[subprocess.Popen[bytes], float] | None = None
    """Puts copies from memory into the store, and since when."""

    def __post_init__(self) -> None:
        self.files = AttemptFiles(self.request.run_dir)

    def start(self, standbys: Standbys | None = None) -> bool:
        """Claim the attempt on this node and start its launcher; False if it has been claimed before.

        Where one of `standbys` can be the launcher, it is.

        Raises:
            OSError: the directory or the launcher cannot be made.
        """
        self.files.run_dir.mkdir(parents=True, exist_ok=True)
        me = psutil.Process()
        claim = {"pid": me.pid, "start_time": me.create_time(), "host": socket.gethostname()}
        try:
            with self.files.agent(self.request.node_index).open("x") as stream:
                json.dump(claim, stream)
        except FileExistsError:
            return False
        self._meter = Meter(self.request.gpus)
        for path, text in self.request.files.items():
            write_atomically(Path(path), text)
        self._beat(force=True)
        env, log_file = self._environment(), self.files.launcher_log(self.request.node_index)
        if standbys is not None and self.request.standby:
            self.launcher = standbys.launch(self.request.argv, env, self.request.cwd, log_file)
            standbys.want(env)  # it may have to be started again
            if self.launcher is not None:
                return True
        try:
            with log_file.open("ab") as log:
                self.launcher = subprocess.Popen(
                    self.request.argv,
                    cwd=self.request.cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as problem:
            self._record(self.request.ranks[0], ExitCode.CRASH, f"the launcher cannot be started: {problem}")
            self._finish(None)
        return True

    @classmethod
    def left_behind(cls, request: LaunchRequest) -> Member | None:
        """The part of an attempt whose agent on this host has died, to be ended by another; None if it has not, or
        nothing is to be ended any more. Its ranks are killed: their launcher's word went with that agent."""
        member = cls(request, _bereft=True, _failed_at=time.time())
        claim = _read(member.files.agent(request.node_index))
        if claim is None or claim["host"] != socket.gethostname() or is_alive(claim["pid"], claim["start_time"]):
            return None
        if member.files.agent_exit(request.node_index).exists():
            return None
        known = [process for rank in request.ranks if (process := _read(member.files.process(rank))) is not None]
        pids = {process["pid"] for process in known if is_alive(process["pid"], process["start_time"])}
        kill(process for process in of_run(request.run_id) if process.pid in pids)
        return member

    def lose_node(self) -> None:
        """Its node counts as lost, and the next attempt waits for its ranks: they are killed, not asked."""
        self._node_lost = True

    def tick(self, heard: float | None = None) -> bool:
        """Look once, act if needed; True when no process of this part is left.

        `heard` is when the node last heard of its yard, of time.monotonic(), if not now: what ranks' leash counts from.
        """
        if self.ended:
            return True
        now = time.time()
        if not self._bereft:
            self._beat(heard)
            self._see_ranks()
            self._watch_ranks()
        ends = {rank: self._exit(rank) for rank in self.request.ranks}
        failed = any(end and end["code"] not in (ExitCode.DONE, ExitCode.STOPPED) for end in ends.values())
        if failed and self._failed_at is None:
            self._failed_at = now
        if all(ends.values()) and self._over_at is None:
            self._over_at = now
        code = self.launcher.poll() if self.launcher else None
        more = LAST_MINUTE_S if self._failed_at is not None and self._saves(ends) else 0.0
        overdue = (
            (self._failed_at is not None and now - self._failed_at > ECHO_S + more)
            or (self._over_at is not None and now - self._over_at > LINGER_S)
            or self._stop_is_overdue(now - more)
            or self._is_orphan()
            or self._node_lost
        )
        if overdue or code is not None or self._bereft:
            left = of_run(self.request.run_id)
            if left and (overdue or self._leavers_are_late(now)):
                self._ended_by_us = self._ended_by_us or self._why_ended()
                kill(left)
            elif not left and code is None and isinstance(self.launcher, Ordered):
                self.launcher.cancel()  # its standby may not have come to it yet
            elif not left and self._stored(now):
                self._finish(self.launcher.wait() if self.launcher else None)
        return self.ended

    def _beat(self, heard: float | None = None, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._beat_at >= HEARTBEAT_S:
            write_atomically(self.files.heartbeat(self.request.node_index), repr(now if heard is None else heard))
            self._beat_at = now
            for witness in self._witnesses.values():
                witness.look()
            if self._meter is not None:
                self._meter.look()

    def _environment(self) -> dict[str, str]:
        """The agent's own, plus the request's."""
        env = inherited()
        env.update({name: os.environ[source] for name, source in self.request.env_from.items() if source in os.environ})
        env.update(self.request.env)
        env[ENV_RUN_ID] = self.request.run_id
        env[ENV_HEARTBEAT] = str(self.files.heartbeat(self.request.node_index))
        return told_to_torch(env)

    def _see_ranks(self) -> None:
        """Notice ranks that are gone without having said how: nobody can write that but us."""
        for rank in self.request.ranks:
            if rank not in self._seen:
                process = _read(self.files.process(rank))
                if process is not None:
                    self._seen[rank] = process
                    self._witnesses[rank] = Witness(process["pid"])
                    self._watches[rank] = Watch(self.files.pulse(rank), process["pid"], self.request.hang_s)
            elif not is_alive(self._seen[rank]["pid"], self._seen[rank]["start_time"]) and self._exit(rank) is None:
                self._record_death(rank)

    def _watch_ranks(self) -> None:
        """Notice ranks that do not move. Once one is overdue here, or the gang is stopped for one elsewhere, the stacks
        of all are read and where each stands is written down."""
        now = time.monotonic()
        live = [rank for rank in self._seen if self._exit(rank) is None]
        overdue = [rank for rank in live if self._watches[rank].look(now) is not None]
        told = self._stop_reason() == HUNG
        if not overdue and not told:
            if self._stalled:  # it moves again
                for rank in live:
                    self.files.stall(rank).unlink(missing_ok=True)
                self._stalled, self._stacks = False, None
            return
        if self._stacks is None:
            dump_collectives(map(self.files.ask_for_collectives, live))
            self._stacks = Stacks({self._seen[rank]["pid"]: self.files.stacks(rank) for rank in live})
        elif self._stalled and self._stacks.written:
            return
        self._stalled = True
        self._stacks.look()
        for rank in live:
            place = self._watches[rank].place(now)
            if place is not None:
                stall = {"rank": rank, "time": time.time(), "stack": stack_in(self.files.stacks(rank)), **place}
                write_atomically(self.files.stall(rank), json.dumps(stall))

    def _record_death(self, rank: int) -> None:
        """Write how a rank ended that could not: by us, by the kernel for want of memory, or by somebody's signal."""
        death = self._witnesses[rank].death() if self._ended_by_us is None else None
        if death is not None:
            told = {"code": death.code, "limit_bytes": death.limit_bytes, "used_bytes": death.used_bytes}
            self._record(rank, ExitCode.OUT_OF_MEMORY, death.message, number=signal.SIGKILL, told=told)
        elif self._node_lost:
            self._record(rank, ExitCode.LEASH_EXPIRED, "its node was lost, and the node's agent ended it first")
        elif self._ended_by_us is not None:
            self._record(rank, ExitCode.KILLED, self._ended_by_us, number=signal.SIGKILL, told={"echo": True})
        else:
            self._record(rank, ExitCode.KILLED, "the process ended without a word; a signal killed it")

    def _why_ended(self) -> str:
        if self._failed_at is not None:
            return f"the node's agent ended it, {ECHO_S:.0f} s after its gang had begun to fail"
        reason = self._stop_reason()
        why = f"it was asked to stop ({reason}), and did not in time" if reason else "it had outlived its purpose"
        return f"the node's agent ended it: {why}"

    def _stop_reason(self) -> str | None:
        """Of the stop message, if there is one."""
        stop = _read(self.files.stop)
        return str(stop["reason"]) if stop is not None else None

    def _saves(self, ends: Mapping[int, dict[str, Any] | None]) -> bool:
        """Whether a rank that is still there writes down the state that it has, after another has failed."""
        beats = [read_beat(self.files.pulse(rank)) for rank, end in ends.items() if end is None]
        return any(beat is not None and beat.phase == "save" for beat in beats)

    def _stored(self, now: float) -> bool:
        """Whether the copies that its ranks have left in memory, if any, are in the store, or it has taken too long."""
        if self.request.copies is None or not Path(self.request.copies[0]).exists():
            return True
        if self._upload is None and self._stop_reason() == CANCELLED:
            shutil.rmtree(self.request.copies[0], ignore_errors=True)
            return True
        if self._upload is None:
            env = {key: value for key, value in self._environment().items() if key != ENV_RUN_ID}
            with self.files.launcher_log(self.request.node_index).open("ab") as log:
                argv = [sys.executable, "-m", "launch.checkpoint.copies", self.request.copies[1]]
                self._upload = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log), now
        process, since = self._upload
        if process.poll() is None and now - since > UPLOAD_S:
            process.kill()
            process.wait()
        return process.poll() is not None

    def _exit(self, rank: int) -> dict[str, Any] | None:
        return _read(self.files.exit(rank))

    def _stop_is_overdue(self, now: float) -> bool:
        stop = _read(self.files.stop)
        return stop is not None and now > stop["deadline"]

    def _is_orphan(self) -> bool:
        return self.request.owner is not None and not is_alive(*self.request.owner)

    def _leavers_are_late(self, now: float) -> bool:
        """The launcher is gone; what it left has a moment to follow."""
        if self._failed_at is None:
            self._failed_at = now
        return now - self._failed_at > ECHO_S

    def _finish(self, code: int | None) -> None:
        """Every process is gone: complete the record of how, as far as that is known."""
        log = self._launcher_tail()
        for rank in self.request.ranks if not self._bereft else ():
            end = self._exit(rank)
            if end is None and rank in self._seen:
                self._record_death(rank)
            elif end is None:
                stopped = _read(self.files.stop) is not None or told_to_end(code, log)
                self._record(
                    rank,
                    ExitCode.STOPPED if stopped else ExitCode.CRASH,
                    "the launcher ended before this rank began",
                    told={"traceback": None if stopped else log},
                )
            elif end["code"] == ExitCode.KILLED and end.get("signal") is None and rank in self._seen:
                number = signal_in(log, self._seen[rank]["pid"])
                if number is not None:
                    end["signal"] = number
                    end["error"]["message"] = f"killed by {signal.Signals(number).name}"
                    write_atomically(self.files.exit(rank), json.dumps(end))
        self._search_logs(log)
        told = {"launcher_code": code, "time": time.time(), "energy": self._meter.read() if self._meter else None}
        write_atomically(self.files.agent_exit(self.request.node_index), json.dumps(told))
        self.ended = True

    def _search_logs(self, launcher_log: str) -> None:
        """Add to how ranks failed what of the patterns their logs have; the launcher's is everybody's."""
        if not self.request.log_patterns:
            return
        for rank in self.request.ranks:
            end = self._exit(rank)
            if end is not None and end["code"] not in (ExitCode.DONE, ExitCode.STOPPED):
                text = f"{tail(self.files.log(rank))}\n{launcher_log}"
                end["found"] = found_in(text, self.request.log_patterns)
                write_atomically(self.files.exit(rank), json.dumps(end))

    def _launcher_tail(self) -> str:
        return tail(self.files.launcher_log(self.request.node_index), LOG_TAIL)

    def _record(
        self, rank: int, code: ExitCode, message: str, *, number: int | None = None, told: Mapping[str, Any] = {}
    ) -> None:
        """Write a RankExit by hand; `told` are fields of its RankError."""
        self.files.rank(rank).mkdir(parents=True, exist_ok=True)
        error = {"code": code.name.lower().replace("_", "-"), "message": message, **told}
        end = {"rank": rank, "code": int(code), "time": time.time(), "signal": number, "error": error}
        write_atomically(self.files.exit(rank), json.dumps(end))


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None while there is none, or none that is whole."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None
