"""The process that traces models: one at a time, whatever becomes of it or of who asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch.config import TrainSpec
from launch.footprint_record import Footprint, Line, Passes
from orchestrator.execute import tracing
from orchestrator.execute.tracing import TIMEOUT_S, Tracer
from tests.worlds import a_spec

LINE = Line(base=0, per_row=1)
FOUND = Footprint(
    source="traced", length=8, parameters=1, trainable=1, moments_bytes=8,
    passes=(Passes(precision="fp32", native=False, activation_checkpointing=False, loss="whole",
                   beside_gradients=LINE, with_gradients=LINE, at_loss=LINE),),
)  # fmt: skip
SPEC = a_spec(Path("/model"), Path("/data.tsv"), strategy="auto")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracer(clock: Clock) -> Iterator[Tracer]:
    tracer = Tracer(clock)
    yield tracer
    tracer.close()


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a script run in place of Python, with the arguments that launch.footprint would get."""

    def run(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(tracing, "sys", SimpleNamespace(executable=str(path)))

    return run


def answer(tracer: Tracer, job: str, spec: TrainSpec = SPEC) -> Footprint | str:
    deadline = time.monotonic() + 30
    while (found := tracer.ask(job, spec, "cpu")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_it_answers_with_the_last_line(tracer: Tracer, instead: Callable[[str], None], tmp_path: Path) -> None:
    """The process gets the whole job as a file, which is taken away."""
    instead(f'echo "$@" >{tmp_path}/argv; cp "$4" {tmp_path}/spec; echo noise; echo \'{FOUND.model_dump_json()}\'')
    assert tracer.ask("a", SPEC, "cuda") is None
    assert answer(tracer, "a") == FOUND
    assert answer(tracer, "a") == FOUND, "it is remembered"
    argv = (tmp_path / "argv").read_text().split()
    assert (argv[:3], argv[4:]) == (["-m", "launch.footprint", "--spec"], ["--device", "cuda"])
    assert TrainSpec.model_validate_json((tmp_path / "spec").read_text()) == SPEC
    assert not Path(argv[3]).exists()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo first >&2; echo 'error[x]: no such model' >&2; exit 2", "error[x]: no such model"),
        ("echo no json", "it ended without a word"),
        ("echo '{}'; echo half >&2", "half"),
        ("kill -9 $$", "it ended without a word"),
    ],
)
def test_without_a_footprint_it_says_why(tracer: Tracer, instead: Callable[[str], None], script: str, why: str) -> None:
    instead(script)
    assert answer(tracer, "a") == f"not traced: {why}"


def test_one_at_a_time_at_low_priority(tracer: Tracer, instead: Callable[[str], None], tmp_path: Path) -> None:
    instead(
        f"nice >>{tmp_path}/nice; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo '{FOUND.model_dump_json()}'"
    )
    assert tracer.ask("a", SPEC, "cpu") is None
    before = set(psutil.Process().children())
    assert tracer.ask("b", SPEC, "cpu") is None
    assert set(psutil.Process().children()) == before
    (tmp_path / "go").touch()
    assert answer(tracer, "a") == answer(tracer, "b") == FOUND
    assert [int(level) - psutil.Process().nice() for level in (tmp_path / "nice").read_text().split()] == [10, 10]


def test_a_job_that_asks_no_more_does_not_stop_the_others(
    tracer: Tracer, instead: Callable[[str], None], clock: Clock
) -> None:
    """It was cancelled while it was being traced."""
    instead(f"echo '{FOUND.model_dump_json()}'")
    assert tracer.ask("cancelled", SPEC, "cpu") is None
    assert answer(tracer, "b") == FOUND
    instead("exec sleep 1000")
    assert tracer.ask("cancelled-too", SPEC, "cpu") is None
    instead(f"echo '{FOUND.model_dump_json()}'")
    clock.now += TIMEOUT_S + 1
    assert answer(tracer, "c") == FOUND


def test_what_takes_too_long_is_ended(tracer: Tracer, instead: Callable[[str], None], clock: Clock) -> None:
    instead("exec sleep 1000")
    assert tracer.ask("a", SPEC, "cpu") is None
    assert tracer._running is not None
    process = psutil.Process(tracer._running[1].pid)
    clock.now += TIMEOUT_S - 1
    assert tracer.ask("a", SPEC, "cpu") is None
    clock.now += 2
    assert answer(tracer, "a") == "not traced: it took longer than 300 s"
    assert not process.is_running()


def test_what_was_noted_is_forgotten(tracer: Tracer, instead: Callable[[str], None]) -> None:
    instead(f"echo '{FOUND.model_dump_json()}'")
    assert answer(tracer, "a") == FOUND
    tracer.forget("a")
    assert tracer.ask("a", SPEC, "cpu") is None
    tracer.close()
