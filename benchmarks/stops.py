"""Planned stops at random moments: what is done twice, and whether the model is that of a training left in peace.

    python -m benchmarks.stops --moments 50 [--seed 1] [-o json]

Jobs of two ranks under DDP, ZeRO-2 and ZeRO-3 train on a yard without Ray. Each is stopped again and again, once in
each attempt: by SIGTERM to a rank, to the launcher, to the node's agent or to all of these, by a pause, a pre-emption,
or a drain of the node. A moment is drawn for each: a time after a phase begins (start, load, first step, step,
evaluation, save, export), or, where the controller carries it out, any time after the attempt began. Then the job goes
on.

`steps_lost` are steps that an attempt had begun and the next one did not resume after, whether or not they had been
finished; ranks write down what rows they train on before each step. The final weights must be, bit by bit, those of the
same job that nobody stopped. The last line of stdout is JSON; the status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.attempt import ENV_RUN_ID, AttemptFiles
from launch.document import read_document
from launch.pulse import read_beat
from orchestrator.client import Client
from orchestrator.execute.processes import carrying
from orchestrator.job.lifecycle import JobState
from orchestrator.job.spec import load_job
from orchestrator.settings import Settings
from orchestrator.yard.home import connect
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard, until

ENGINES = ("ddp", "zero2", "zero3")
STEPS, EVAL_EVERY, SAVE_EVERY = 48, 12, 7
SIGNALLED = ("sigterm-rank", "sigterm-launcher", "sigterm-agent", "sigterm-all")
ASKED = ("pause", "preempt", "drain")
PHASES = ("start", "load", "first-step", "step", "evaluate", "save", "export")
SPAN_S = {"start": 1.0, "load": 0.6, "first-step": 0.2, "step": 1.5, "evaluate": 0.4, "save": 0.02, "export": 0.1}
"""About as long as each takes; a step's is that of a dozen."""
ANY_TIME_S = 4.0
STOPS_A_JOB = 6
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Moment:
    """When and how an attempt is stopped."""

    way: str
    phase: str | None
    """None: counted from the attempt's beginning."""
    delay_s: float


@dataclass
class Figures:
    moments: int = 0
    moments_that_lost: int = 0
    steps_lost: int = 0
    attempts_that_failed: int = 0
    restarts_used: int = 0
    jobs: int = 0
    models_that_differ: int = 0
    by_way: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    """Where rank 0 was when it happened."""
    longest_stop_s: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Stops:
    """Jobs on a yard, stopped again and again."""

    def __init__(self, yard: Yard, client: Client, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.figures = Figures()
        self._yard, self._client, self._seed, self._say = yard, client, seed, say
        self._model = write_bert(folder / "bert", hidden=256)
        self._data = write_messages(folder / "messages.tsv", rows=1600)
        self._guest = load_job(read_document(yard.ticker("guest", ticks=1, priority="high")))
        self._undisturbed: dict[str, bytes] = {}
        (self._node,) = [node.name for node in client.nodes()]

    def stop(self, moments: int) -> Figures:
        begun = time.monotonic()
        for engine in ENGINES:
            job = self._submit(engine, "undisturbed")
            assert self._yard.json("wait", job)["state"] == "succeeded"
            self._undisturbed[engine] = self._model_of(job)
        while self.figures.moments < moments:
            self.figures.jobs += 1
            draw = random.Random(f"{self._seed}/{self.figures.jobs}")
            self._disturb(draw.choice(ENGINES), draw, min(STOPS_A_JOB, moments - self.figures.moments))
        self.figures.seconds = round(time.monotonic() - begun, 1)
        return self.figures

    def _submit(self, engine: str, name: str) -> str:
        return self._yard.submit(
            self._yard.job_file(
                name=f"{name}-{engine}",
                model={
                    "name_or_path": str(self._model), "task": "sequence-classification", "dropout": 0.1,
                },
                data={"train": str(self._data), "split": {"test": 0.4, "validation": 0.3}, "max_length": 48},
                train={
                    "max_steps": STEPS, "global_batch_size": 32, "micro_batch_size": 8, "learning_rate": 1e-3,
                    "eval_every": EVAL_EVERY, "eval_batch_size": 8, "log_samples": True, "keep_best": True,
                },
                strategy=engine,
                resources={"num_processes": 2},
                checkpoint={"every_steps": SAVE_EVERY},
                retry={"max_restarts": 9},
            )
        )  # fmt: skip

    def _disturb(self, engine: str, draw: random.Random, stops: int) -> None:
        """One job to its end."""
        job = self._submit(engine, f"job-{self.figures.jobs}")
        moments: dict[int, Moment] = {}
        attempt = 0
        while True:
            attempt += 1
            if not self._begins(job, attempt):
                break
            if len(moments) < stops:
                moment = _moment(draw)
                if self._strike(job, attempt, moment, engine):
                    moments[attempt] = moment
                self._goes_on(job, attempt)
        self._judge(job, engine, moments)

    def _begins(self, job: str, attempt: int) -> bool:
        """Whether there is an attempt of that number, and not the end of the job."""

        def known() -> bool:
            return self._files(job, attempt).agent(0).exists() or self._client.job(job).state.final

        until(known, PATIENCE_S)
        return self._files(job, attempt).agent(0).exists()

    def _strike(self, job: str, attempt: int, moment: Moment, engine: str) -> bool:
        """Stop an attempt at a moment; whether it was still there."""
        files = self._files(job, attempt)
        ended = files.agent_exit(0).exists
        while not ended() and moment.phase not in (None, _phase(files)):
            time.sleep(0.001)
        time.sleep(moment.delay_s)
        where = _phase(files)
        begun = time.monotonic()
        if ended() or where == "done" or not self._act(job, files, moment.way):
            return False
        until(ended, PATIENCE_S)
        took = time.monotonic() - begun
        figures = self.figures
        figures.moments += 1
        figures.by_way[moment.way] += 1
        figures.by_phase[where] += 1
        figures.longest_stop_s = max(figures.longest_stop_s, round(took, 2))
        self._say(f"{figures.moments:3}  {job} attempt {attempt}: {engine}, {moment.way} in {where}, {took:.2f} s")
        return True

    def _act(self, job: str, files: AttemptFiles, way: str) -> bool:
        """Whether there was somebody to be stopped."""
        if way in ASKED:
            if self._client.job(job).state.final:
                return False
            match way:
                case "pause":
                    self._client.pause(job)
                case "preempt":
                    self._client.submit(self._guest)
                case "drain":
                    self._client.mark_node(self._node, "drain")
            return True
        told = False
        for pid in _whom(files, way):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                told = True
        return told

    def _goes_on(self, job: str, attempt: int) -> None:
        """After an attempt has ended: undo what keeps the job from going on."""
        until(self._files(job, attempt).agent_exit(0).exists, PATIENCE_S)
        if any(node.mark for node in self._client.nodes()):
            self._client.uncordon(self._node)
        settled = (JobState.QUEUED, JobState.PAUSED, JobState.RUNNING, JobState.STARTING)

        def look() -> bool:
            view = self._client.job(job)
            if view.state == JobState.PAUSED:
                self._client.resume(job)
            return view.state.final or view.attempts > attempt or view.state in settled[:1]

        until(look, PATIENCE_S)

    def _judge(self, job: str, engine: str, moments: dict[int, Moment]) -> None:
        figures = self.figures
        view = self._client.job(job)
        attempts = self._client.attempts(job)
        if view.state != JobState.SUCCEEDED:
            self._wrong(f"{job} is {view.state}: {view.reason.sentence}")
        figures.restarts_used += view.failures
        for one, after in zip(attempts, [*attempts[1:], None], strict=True):
            files = self._files(job, one.number)
            ends = [files.exit(rank) for rank in range(2)]
            ended = {json.loads(end.read_bytes())["code"] for end in ends if end.exists()}
            if one.outcome not in ("stopped", "succeeded"):
                figures.attempts_that_failed += 1
                self._wrong(f"{job} attempt {one.number} ({moments.get(one.number)}) ended {one.outcome}: {ended}")
            if after is None:
                continue
            begun = max(max(self._steps(job, one.number, rank), default=0) for rank in range(2))
            from_step = min(self._steps(job, after.number, 0), default=None)
            later = [s for a in attempts if a.number > one.number for s in self._steps(job, a.number, 0)]
            lost = len([step for step in set(later) if step <= begun])
            if lost:
                figures.steps_lost += lost
                figures.moments_that_lost += 1
                told = f"began step {begun}, and attempt {after.number} began with {from_step}"
                self._wrong(f"{job} attempt {one.number} ({moments.get(one.number)}) {told}")
        if self._model_of(job) != self._undisturbed[engine]:
            figures.models_that_differ += 1
            self._wrong(f"the weights of {job} ({engine}) are not those of the undisturbed training")

    def _steps(self, job: str, attempt: int, rank: int) -> list[int]:
        """The steps that a rank of an attempt has begun."""
        path = self._files(job, attempt).samples(rank)
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def _model_of(self, job: str) -> bytes:
        path = self._yard.home / "jobs" / job / "model" / "model.safetensors"
        return path.read_bytes() if path.exists() else b""

    def _files(self, job: str, attempt: int) -> AttemptFiles:
        return self._yard.files(job, attempt)

    def _wrong(self, what: str) -> None:
        self.figures.wrong.append(what)
        self._say(f"WRONG {what}")


def _moment(draw: random.Random) -> Moment:
    way = draw.choice(SIGNALLED + ASKED)
    if way in ASKED:
        return Moment(way, None, draw.uniform(0, ANY_TIME_S))
    phase = draw.choice(PHASES)
    return Moment(way, phase, draw.uniform(0, SPAN_S[phase]))


def _phase(files: AttemptFiles) -> str:
    """Where rank 0 is; `start` also before it is there."""
    beat = read_beat(files.pulse(0))
    return beat.phase if beat is not None else "start"


def _pid_in(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_bytes())["pid"])
    except (OSError, ValueError):
        return None


def _whom(files: AttemptFiles, way: str) -> list[int]:
    """Pids of those that a way speaks to, as far as they are there by now."""
    run_id = f"{files.run_dir.parent.name}.{files.run_dir.name.removeprefix('attempt-')}"
    agent = _pid_in(files.agent(0))
    ranks = [pid for rank in range(2) if (pid := _pid_in(files.process(rank))) is not None]
    # A rank that has not introduced itself yet may be taken for the launcher, which is older.
    others = [process for process in carrying(ENV_RUN_ID, run_id) if process.pid not in ranks]
    launcher = [process.pid for process in sorted(others, key=lambda process: process.create_time())[:1]]
    match way:
        case "sigterm-agent":
            return [agent] if agent is not None else []
        case "sigterm-launcher":
            return launcher
        case "sigterm-rank":
            return ranks[-1:]
        case _:
            return [*([agent] if agent is not None else []), *launcher, *ranks]


def measure(folder: Path, moments: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    rules = json.dumps({"min_run_for_class_s": 0})
    with (
        a_yard("--executor", "local", cpu_slots="2", standbys="1", rules=rules) as yard,
        connect(Settings(home=yard.home)) as client,
    ):
        until(lambda: sum(node.standbys.count for node in client.nodes()), PATIENCE_S)
        return {"seed": seed} | vars(Stops(yard, client, folder, seed, say).stop(moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", choices=("text", "json"), default="text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        figures = measure(
            Path(name), options.moments, options.seed, lambda line: print(line, file=sys.stderr, flush=True)
        )
    if options.o == "text":
        for key, value in figures.items():
            print(f"{key:24} {value}")
    print(json.dumps(figures))
    sys.exit(1 if figures["wrong"] else 0)


if __name__ == "__main__":
    main()
