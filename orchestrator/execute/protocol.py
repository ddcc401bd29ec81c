"""What every executor can do, and what it reports. The controller knows executors only by this."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from launch.attempt import AttemptFiles
from launch.contract import ProgressLine, RankExit, RunContract, StopRequest
from launch.pulse import read_beat
from orchestrator.cluster.model import Node
from orchestrator.cluster.status import (
    AttemptStatus,
    Energy,
    NodeReport,
    ProbeReport,
    ProbeRequest,
    Spent,
    Stall,
    StandbyReport,
)
from orchestrator.errors import ExecutorError

TAIL_BYTES = 8192
LINE_BYTES = 1 << 16  # a user's script may write what it likes where progress is expected
MAX_NEWS = 1000


class Executor(Protocol):
    """Starts, watches and ends attempts somewhere. Every call is safe to repeat."""

    def nodes(self) -> list[Node]:
        """The nodes that answer now. Raises ExecutorError if the cluster cannot be asked."""

    def standbys(self) -> dict[str, StandbyReport]:
        """Node id → its idle standbys, of the nodes that answer."""

    def free_ports(self, wanted: Mapping[str, int]) -> dict[str, list[int]]:
        """Node id → as many different ports as `wanted` of it, that are free there now; of the nodes that answer."""

    def probe(self, asked: Mapping[str, ProbeRequest]) -> dict[str, ProbeReport | None]:
        """Begin probes of nodes, by their id, unless they have begun; what they found, None for those that go on. Nodes
        that do not answer are left out."""

    def start(self, contracts: Sequence[RunContract]) -> dict[str, ExecutorError]:
        """Start gangs; nothing is done for a run that was started before. May be called from several threads at once.

        Returns:
            Run id → why that gang could not be started on every node; what did start of it is ended by a stop. No gang
            keeps another from starting.
        """

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        """Run id → what is known. Never raises for a node that does not answer: it is reported unreachable.

        `offsets` says by run id from which byte on rank 0's progress is read for news of checkpoints.
        """

    def stop(self, contract: RunContract, request: StopRequest) -> None:
        """Pass the stop message on to every node that answers; past its deadline the agents end the processes."""

    def release(self, contract: RunContract) -> None:
        """Give back what was reserved for an attempt that has ended."""

    def read_log(self, contract: RunContract, rank: int | None, offset: int, limit: int) -> bytes:
        """Bytes of a rank's log (the first node's launcher's for None) from `offset`; empty at its end."""

    def close(self) -> None:
        """Let go of the cluster; attempts go on."""


def read_report(contract: RunContract, node_index: int, offset: int, *, reachable: bool) -> NodeReport:
    """What an attempt's directory shows of one node; of rank 0 also the news of checkpoints from `offset` on."""
    files = AttemptFiles(contract.run_dir)
    ranks = contract.ranks_of(node_index)
    exits = [end for rank in ranks if (end := _read_exit(files.exit(rank))) is not None]
    ended = files.agent_exit(node_index).exists()
    # After the end was looked for: nothing is written after it.
    news, offset = news_since(files.progress(0), offset) if node_index == 0 else ((), 0)
    return NodeReport(
        node_index=node_index,
        reachable=reachable,
        claimed=files.agent(node_index).exists(),
        ended=ended,
        begun=any(files.process(rank).exists() for rank in ranks),
        exits=tuple(exits),
        progress=last_progress(files.progress(ranks[0])),
        news=news,
        offset=offset,
        stalls=tuple(stall for rank in ranks if (stall := _read_stall(files.stall(rank))) is not None),
        spent=read_spent(files.pulse(ranks[0])),
        energy=read_energy(files.agent_exit(node_index)) if ended else None,
    )


def read_spent(path: Path) -> Spent | None:
    """Where a rank's time went, by its pulse; None if it has none (a user's own script)."""
    beat = read_beat(path)
    if beat is None:
        return None
    where = {"phase": beat.phase, "step": beat.step, "from_step": beat.from_step}
    return Spent(began_at=beat.began_at, seconds=beat.spent, **where)


def read_energy(path: Path) -> Energy | None:
    """What the node's counters told of an attempt, by its agent's last word; None if that has nothing of it."""
    try:
        return Energy.model_validate(json.loads(path.read_bytes())["energy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_progress(path: Path) -> ProgressLine | None:
    """The last whole line of a progress file; None if there is none (a user's script may write its own)."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    return next((found for line in reversed(lines) if (found := _progress_line(line)) is not None), None)


def news_since(path: Path, offset: int) -> tuple[tuple[ProgressLine, ...], int]:
    """Whole lines with a checkpoint's note from byte `offset` on, at most MAX_NEWS, and up to where it was read."""
    news: list[ProgressLine] = []
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            while len(news) < MAX_NEWS and (line := stream.readline(LINE_BYTES)):
                if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    break  # it is being written
                offset += len(line)
                found = _progress_line(line) if b'"checkpoint"' in line else None
                if found is not None and found.checkpoint is not None:
                    news.append(found)
    except OSError:
        pass  # not yet there, or out of sight: later, then
    return tuple(news), offset


def _progress_line(line: bytes) -> ProgressLine | None:
    try:
        return ProgressLine.model_validate_json(line)
    except ValidationError:
        return None


def read_bytes(path: Path, offset: int, limit: int) -> bytes:
    """Up to `limit` bytes of `path` from `offset`; empty if there is no such file yet."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(limit)
    except FileNotFoundError:
        return b""


def _read_exit(path: Path) -> RankExit | None:
    try:
        return RankExit.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _read_stall(path: Path) -> Stall | None:
    try:
        return Stall.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
