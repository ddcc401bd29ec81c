"""Traces models beside the controller: `launch.footprint` in a process of its own, one at a time, at low priority."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from launch.config import TrainSpec
from launch.contract import Device
from launch.footprint_record import Footprint

TIMEOUT_S = 300.0


class Tracer:
    """Asked again and again, it answers once it has traced; a job is traced once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running: tuple[str, subprocess.Popen[str], Path, float] | None = None
        self._found: dict[str, Footprint | str] = {}

    def ask(self, job_id: str, spec: TrainSpec, device: Device) -> Footprint | str | None:
        """The footprint, or why there is none; None while it is not known yet."""
        if self._running is not None:
            self._look()  # whoever asks: the job that is being traced may have been cancelled, and asks no more
        if self._running is None and job_id not in self._found:
            self._start(job_id, spec, device)
        return self._found.get(job_id)

    def forget(self, job_id: str) -> None:
        """The answer has been noted."""
        self._found.pop(job_id, None)

    def close(self) -> None:
        """End what is running."""
        if self._running is not None:
            _, process, file, _ = self._running
            process.kill()
            process.communicate()
            file.unlink(missing_ok=True)
            self._running = None

    def _start(self, job_id: str, spec: TrainSpec, device: Device) -> None:
        handle, name = tempfile.mkstemp(prefix="tuneyard-trace-", suffix=".json")
        with os.fdopen(handle, "w") as file:
            file.write(spec.model_dump_json())
        argv = [sys.executable, "-m", "launch.footprint", "--spec", name, "--device", device]
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: os.nice(10),
        )  # fmt: skip
        self._running = (job_id, process, Path(name), self._clock())

    def _look(self) -> None:
        assert self._running is not None
        job_id, process, file, since = self._running
        if process.poll() is None:
            if self._clock() - since > TIMEOUT_S:
                self.close()
                self._found[job_id] = f"not traced: it took longer than {TIMEOUT_S:.0f} s"
            return
        told, complained = process.communicate()
        file.unlink(missing_ok=True)
        self._running = None
        try:
            self._found[job_id] = Footprint.model_validate_json(told.strip().splitlines()[-1])
        except (IndexError, ValidationError):
            lines = complained.strip().splitlines() or ["it ended without a word"]
            self._found[job_id] = f"not traced: {lines[-1]}"
