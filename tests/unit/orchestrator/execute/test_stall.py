"""Whether a rank moves, and what its threads do if not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.attempt import AttemptFiles
from launch.pulse import Pulse
from orchestrator.execute import stall
from orchestrator.execute.stall import (
    AWAY_S,
    FACTOR,
    PATIENCE_S,
    STOPPED_S,
    Stacks,
    Watch,
    dump_collectives,
    is_stopped,
    listens,
    stack_in,
)

TICK_S = 0.5


class Rank:
    """A pulse and its watch on a clock of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float | None = None) -> None:
        self.now = 1000.0
        monkeypatch.setattr("launch.pulse.time.monotonic", lambda: self.now)
        self.pulse = Pulse(folder / "pulse")
        self.watch = Watch(folder / "pulse", os.getpid(), limit_s)

    def stays(self, seconds: float) -> float | None:
        """Look every tick; after how long it is overdue, if it is."""
        began = self.now
        while self.now < began + seconds:
            self.now += TICK_S
            if self.watch.look(self.now) is not None:
                return self.now - began
        return None


@pytest.mark.parametrize(("phase", "patience"), PATIENCE_S.items())
def test_each_phase_has_its_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, patience: float
) -> None:
    rank = Rank(tmp_path, monkeypatch)
    assert rank.watch.look(rank.now) is None, "it has said nothing yet"
    rank.pulse.enter(phase, 3)
    assert rank.stays(patience + 10) == pytest.approx(patience, abs=2 * TICK_S)
    rank.pulse.enter(phase, 4)
    assert rank.stays(patience - TICK_S) is None, "it moves again"


def test_patience_follows_what_it_took_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch)
    for _ in range(3):
        rank.pulse.enter("step", 1, "backward")
        assert rank.stays(60.0) is None
    rank.pulse.enter("step", 2, "backward")
    assert rank.stays(2 * FACTOR * 60.0) == pytest.approx(FACTOR * 60.0, rel=0.05)


def test_a_user_says_how_long_a_step_takes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch, limit_s=30.0)
    rank.pulse.enter("save")
    assert rank.stays(300.0) is None
    rank.pulse.enter("step", 1, "data")
    assert rank.stays(60.0) == pytest.approx(30.0, abs=2 * TICK_S)


def test_never_is_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch, limit_s=0.0)
    monkeypatch.setattr(stall, "is_stopped", lambda _pid: True)
    rank.pulse.enter("step", 1, "data")
    assert rank.stays(5000.0) is None


def test_a_machine_that_stood_still_itself_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(tmp_path, monkeypatch)
    rank.pulse.enter("step", 1, "data")
    assert rank.stays(50.0) is None
    rank.now += 3600.0  # nobody looked: a suspended laptop, a stopped agent
    assert rank.stays(60.0) is None
    assert rank.stays(60.0) is not None
    assert AWAY_S < 3600.0


def test_a_stopped_process_is_found_whatever_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, stopped = Rank(tmp_path, monkeypatch), False
    monkeypatch.setattr(stall, "is_stopped", lambda _pid: stopped)
    rank.pulse.enter("save", 9)
    assert rank.stays(100.0) is None
    stopped = True
    assert rank.stays(100.0) == pytest.approx(STOPPED_S, abs=3 * TICK_S)
    place = rank.watch.place(rank.now)
    assert place is not None
    assert (place["stopped"], place["phase"], place["step"]) == (True, "save", 9)


def test_no_false_alarm_in_long_saves_slow_evaluations_and_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred of each, longer than any step: minutes."""
    rank = Rank(tmp_path, monkeypatch)
    for number in range(100):
        for phase, seconds in (("first-step", 900.0), ("step", 2.0), ("save", 1200.0), ("evaluate", 240.0)):
            rank.pulse.enter(phase, number)
            assert rank.stays(seconds) is None, phase


SLEEPER = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "w"))
def waits_for_ever():
    print("ready", flush=True)
    time.sleep(1000)
waits_for_ever()
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path / "stacks.txt")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def read(sleeper: subprocess.Popen[bytes], path: Path) -> str | None:
    stacks = Stacks({sleeper.pid: path})
    while not stacks.written:
        stacks.look()
        time.sleep(0.05)
    assert sleeper.poll() is None, "it lives on"
    return stack_in(path)


def test_the_stack_of_a_stopped_process_is_read(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    while not is_stopped(sleeper.pid):
        time.sleep(0.01)
    found = read(sleeper, tmp_path / "stacks.txt")
    if found is None:
        pytest.skip("one process may not look into another here (CAP_SYS_PTRACE)")
    assert "waits_for_ever" in found


def test_who_may_not_look_asks(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall, "py_spy", lambda: None)
    monkeypatch.setattr(stall, "DUMP_S", 1.0)
    assert listens(sleeper.pid)
    assert "waits_for_ever" in (read(sleeper, tmp_path / "stacks.txt") or "")


def test_who_does_not_listen_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would end it."""
    monkeypatch.setattr(stall, "py_spy", lambda: None)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        assert not listens(process.pid)
        assert read(process, tmp_path / "stacks.txt") is None
    finally:
        process.kill()
        process.wait()


def test_flight_recorders_are_asked_by_their_pipes_where_somebody_reads_them(tmp_path: Path) -> None:
    files = AttemptFiles(tmp_path)
    pipes = [files.ask_for_collectives(rank) for rank in range(3)]
    os.mkfifo(pipes[1])
    os.mkfifo(pipes[2])  # nobody reads it: its rank is gone
    reader = os.open(pipes[1], os.O_RDONLY | os.O_NONBLOCK)
    try:
        dump_collectives(pipes)
        assert os.read(reader, 16) == b"1"
    finally:
        os.close(reader)
