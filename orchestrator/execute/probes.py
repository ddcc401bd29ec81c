"""Probes of a node, as processes of their own: a GPU that hangs takes no agent along. Standard library alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from orchestrator.execute.processes import inherited

PATIENCE_S = 180.0
"""A probe that takes longer has hung. Importing torch is a part of it."""
REMEMBERED = 64
"""Probes whose results are kept."""


@dataclass
class _Probe:
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float = field(default_factory=time.monotonic)
    result: str | None = None


class Probes:
    """The probes of this node, by an id that whoever asks has chosen."""

    def __init__(self) -> None:
        self._probes: dict[str, _Probe] = {}
        self._lock = threading.Lock()

    def ask(self, probe_id: str, options: Sequence[str]) -> str | None:
        """Begin a probe, unless there is one of that id. Returns its result as JSON (launch.probe) once it has ended.

        Raises:
            OSError: it cannot be started.
        """
        with self._lock:
            probe = self._probes.get(probe_id)
            if probe is None:
                probe = self._probes[probe_id] = _begin(options)
                while len(self._probes) > REMEMBERED:
                    self._end(self._probes.pop(next(iter(self._probes))))
            if probe.result is None:
                probe.result = self._result(probe)
            return probe.result

    def close(self) -> None:
        """End what still runs."""
        with self._lock:
            for probe in self._probes.values():
                self._end(probe)

    def _result(self, probe: _Probe) -> str | None:
        code = probe.process.poll()
        if code is None:
            if time.monotonic() - probe.began < PATIENCE_S:
                return None
            self._end(probe)
            return _failed(f"it did not end within {PATIENCE_S:.0f} s")
        probe.output.seek(0)
        lines = probe.output.read().decode(errors="replace").splitlines()
        probe.output.close()
        found = [line for line in lines if line.startswith('{"checks":')]
        if not found:
            return _failed(f"it ended with status {code}: {lines[-1] if lines else 'and said nothing'}")
        return found[-1]

    def _end(self, probe: _Probe) -> None:
        if probe.process.poll() is None:
            os.killpg(probe.process.pid, signal.SIGKILL)
            probe.process.wait()
        probe.output.close()


def _begin(options: Sequence[str]) -> _Probe:
    output = tempfile.TemporaryFile()  # noqa: SIM115 — open as long as the probe
    argv = [sys.executable, "-m", "launch.probe", *options]
    process = subprocess.Popen(
        argv,
        cwd=Path(__file__).parents[2],
        env=inherited(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return _Probe(process, output)


def _failed(told: str) -> str:
    return json.dumps({"checks": [{"name": "probe", "ok": False, "told": told}]})
