"""Where a rank says it is, read from outside."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from launch.progress import Progress
from launch.pulse import PARTS, PHASES, Pulse, read_beat


def test_what_is_entered_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rank-0" / "pulse"
    assert read_beat(path) is None
    pulse = Pulse(path)
    assert read_beat(path) is None, "nothing was said yet"
    for count, (phase, part) in enumerate([("load", ""), ("step", "forward"), ("done", "")], start=1):
        before = time.monotonic()
        pulse.enter(phase, 7, part)
        beat = read_beat(path)
        assert beat is not None
        assert (beat.count, beat.phase, beat.part, beat.step) == (count, phase, part, 7)
        assert before <= beat.since <= time.monotonic()


def test_a_step_of_ones_own_ends_where_the_others_are_waited_for(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "pulse")
    pulse.enter("step", 1, "data")
    time.sleep(0.02)
    pulse.waits()
    time.sleep(0.1)
    pulse.enter("step", 1, "exchange")
    beat = read_beat(tmp_path / "pulse")
    assert beat is not None
    assert 0.02 <= beat.own_s < 0.1


def test_what_others_hold_is_waited_for_in_nobodys_own_time(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "pulse")
    pulse.gathered(5.0)  # before the step
    pulse.enter("step", 1, "data")
    time.sleep(0.05)
    pulse.gathered(0.04)
    pulse.waits()
    assert 0.01 <= pulse.own_s < 0.05
    pulse.gathered(5.0)  # in the backward pass
    assert pulse.own_s < 0.05


def test_who_reads_never_sees_a_part_of_two_moves(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    pulse, over = Pulse(path), threading.Event()

    def moves() -> None:
        for step in range(20_000):
            pulse.enter(PHASES[step % len(PHASES)], step, PARTS[step % len(PARTS)])
        over.set()

    mover = threading.Thread(target=moves)
    mover.start()
    seen = 0
    while not over.is_set():
        beat = read_beat(path)
        if beat is not None:
            seen += 1
            assert beat.count == beat.step + 1
            assert (beat.phase, beat.part) == (PHASES[beat.step % len(PHASES)], PARTS[beat.step % len(PARTS)])
    mover.join()
    assert seen


@pytest.mark.parametrize("text", [b"", b"x", bytes(40), b"\xff" * 40])
def test_a_file_that_is_no_pulse_says_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "pulse").write_bytes(text)
    assert read_beat(tmp_path / "pulse") is None


def test_progress_tells_of_phases(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "rank-0" / "progress.jsonl")
    for told, phase in (("start", "start"), ("ready", "first-step"), ("export", "export")):
        progress.phase(told)
        beat = read_beat(tmp_path / "rank-0" / "pulse")
        assert beat is not None
        assert beat.phase == phase
