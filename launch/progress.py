"""A rank's progress file: one JSON line per event, flushed, so that a reader is never behind. Torch-free."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from launch.attempt import PULSE
from launch.contract import CheckpointNote, ProgressLine
from launch.pace import Pace
from launch.pulse import Pulse

CURVE_LINES = 5000
"""Every checkpoint holds the curve, and nobody sees more points in a picture."""


class Progress:
    """Appends ProgressLines and derives speed and time left from the steps of this attempt."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self.pulse = Pulse(path.with_name(PULSE))
        """Where the rank is between the lines."""
        self.pace = Pace()
        """Which rank is slow."""
        self.curve: list[ProgressLine] = []
        """Lines of phases `train` and `evaluate`, for the training curve; of a long training some of the former."""
        self.follow: Callable[[ProgressLine], None] = lambda _line: None
        """Is given every line once it is written: the trackers."""
        self._started: float | None = None
        self._samples_before = 0
        self._steps_before = 0

    def write(self, line: ProgressLine) -> None:
        self._file.write(line.model_dump_json(exclude_none=True) + "\n")
        self._file.flush()
        if line.phase in ("train", "evaluate"):
            self.curve.append(line)
            if len(self.curve) > CURVE_LINES:
                self.curve = thinned(self.curve)
        self.follow(line)

    def phase(self, phase: str, step: int = 0, steps: int | None = None, samples: int = 0) -> None:
        self.pulse.enter({"ready": "first-step", "train": "step"}.get(phase, phase), step)
        self.write(ProgressLine(time=time.time(), phase=phase, step=step, steps=steps, samples=samples))

    def start_training(self, step: int, samples: int) -> None:
        """Everything is loaded; speed is measured from here."""
        self._started = time.monotonic()
        self._steps_before = step
        self._samples_before = samples
        self.phase("ready", step, samples=samples)

    def step(self, step: int, steps: int, samples: int, loss: float, learning_rate: float, memory_bytes: int) -> None:
        assert self._started is not None
        elapsed = max(time.monotonic() - self._started, 1e-9)
        done = step - self._steps_before
        slow = self.pace.slowest()
        self.write(
            ProgressLine(
                time=time.time(),
                phase="train",
                step=step,
                steps=steps,
                samples=samples,
                loss=loss,
                learning_rate=learning_rate,
                samples_per_s=(samples - self._samples_before) / elapsed,
                eta_s=elapsed / done * (steps - step),
                memory_bytes=memory_bytes,
                slow_rank=slow.rank if slow is not None else None,
                slow_by=round(slow.ratio, 2) if slow is not None else None,
            )
        )

    def skipped(self, step: int, steps: int, samples: int, count: int) -> None:
        """Step `step` was left out, the `count`-th so far."""
        self.write(
            ProgressLine(time=time.time(), phase="train", step=step, steps=steps, samples=samples, skipped=count)
        )

    def evaluation(self, step: int, steps: int, samples: int, metrics: dict[str, float]) -> None:
        self.write(
            ProgressLine(time=time.time(), phase="evaluate", step=step, steps=steps, samples=samples, metrics=metrics)
        )

    def checkpoint(self, note: CheckpointNote) -> None:
        """What became of a checkpoint."""
        phase = "load" if note.outcome in ("resumed", "quarantined", "rolled-back") else "save"
        self.write(ProgressLine(time=time.time(), phase=phase, step=note.step, checkpoint=note))

    def samples_per_s(self, samples: int) -> float:
        """Mean since start_training, evaluation and saving included; 0 before it."""
        if self._started is None:
            return 0.0
        return (samples - self._samples_before) / max(time.monotonic() - self._started, 1e-9)


def thinned(curve: list[ProgressLine]) -> list[ProgressLine]:
    """Every second line of training; evaluations and the newest line stay."""
    last = len(curve) - 1
    return [line for i, line in enumerate(curve) if line.phase == "evaluate" or i % 2 == 0 or i == last]


class SampleLog:
    """Which rows of the training data a rank trained on, a line a step: `{"step": 3, "rows": [17, 4]}`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="ascii")

    def write(self, step: int, rows: list[int], *, left_out: bool = False) -> None:
        """With `left_out`, the rows of all ranks, on which none has trained: `{"step": 3, "left_out": [17, 4]}`."""
        self._file.write(json.dumps({"step": step, "left_out" if left_out else "rows": rows}) + "\n")
        self._file.flush()
