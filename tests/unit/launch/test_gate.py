"""Forked ranks of a standby wait for each other."""

from __future__ import annotations

import os
import time

from launch.standby import Gate


def forked(gate: Gate) -> int:
    pid = os.fork()
    if pid == 0:
        gate.wait()
        os._exit(7)
    return pid


def test_no_fork_goes_on_before_all_are_there() -> None:
    gate = Gate()
    gate.close()
    first = forked(gate)
    time.sleep(0.2)
    second = forked(gate)
    assert os.waitpid(first, os.WNOHANG) == (0, 0)
    gate.open()
    for pid in (first, second):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_an_open_gate_holds_nobody() -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(forked(Gate()), 0)[1]) == 7
