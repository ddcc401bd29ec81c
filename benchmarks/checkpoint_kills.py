"""Checkpoints under SIGKILL: job after job, killed again and again. See benchmarks.checkpoint_crash."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.checkpoint_store import Found, committed, unfinished
from benchmarks.checkpoint_victim import ENV_MISTAKE, ENV_VICTIM, OF_EVERY_RANK, OF_RANK_0, Victim
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.storage import open_storage
from launch.config import TrainSpec
from launch.contract import AttemptFiles, ExitCode, ProgressLine, RankExit, RankProcess
from tests.worlds import Launched, a_contract, a_plan, a_spec, start, write_bert, write_messages

STEPS, EVERY = 24, 2
ENGINES = ("ddp", "zero1", "zero2", "zero3")
WORLD_SIZES = (2, 2, 2, 4)
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5
"""Engines and world sizes sum in another order."""
SAVE_S, RESUME_S = 0.08, 0.15
"""About as long as a save takes, and as it takes from the beginning of resuming to the first step."""
PATIENCE_S = 60.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Clock:
    """Who is killed from outside, and when."""

    rank: int
    after: Literal["save", "load"]
    """Counted from when rank 0 says that it begins to."""
    count: int
    """Which of those times, from 1."""
    delay_s: float


@dataclass
class Job:
    """What is known of a job that is killed again and again."""

    folder: Path
    attempts: int = 0
    said: Found | None = None
    """The newest checkpoint that rank 0 has called committed."""
    layout: tuple[str, int] | None = None
    """Engine and world size of the attempt before."""
    torn: set[str] = field(default_factory=set)
    trained: int = 0
    """The last step that rank 0 of the attempt before has told of."""

    @property
    def store(self) -> Path:
        return self.folder / "checkpoints"


@dataclass
class Figures:
    """What came of the kills. From `resumed_from_incomplete` to `hung`, all should be 0."""

    kills: int = 0
    kills_at: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    attempts_of: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    resumes: int = 0
    resumes_in_other_layout: int = 0
    """In which another engine or number of ranks had saved."""
    resumes_from_what_a_rank_left: int = 0
    """Under DDP, a rank that was not killed saves what it has."""
    steps_compared: int = 0
    resumed_from_incomplete: int = 0
    """From one without a marker, or of which a byte was missing or wrong."""
    resumed_older_than_newest_committed: int = 0
    """From an older one than the newest that had a marker, or that the job had called committed; or from none."""
    failed_to_resume: int = 0
    """Took no step, and was not killed before it could."""
    wrong_after_resume: int = 0
    """A step's loss, or the final weights, were not those of the undisturbed training."""
    torn_commits: int = 0
    """Had a marker and were not whole."""
    misread: int = 0
    """Attempts before which `catalogue` called another one the newest than benchmarks.checkpoint_store did."""
    left_behind: int = 0
    """Unfinished checkpoints of earlier attempts that an attempt has not cleared away."""
    died_by_itself: int = 0
    hung: int = 0
    hung_at_start: int = 0
    """Before there was a process group; that says nothing of checkpoints, and the next attempt goes on."""
    loss_difference: float = 0.0
    """The largest of all steps compared."""
    ended_after_s: float = 0.0
    """The longest from a kill to the end of the attempt's last process."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What was wrong, in words."""


class Crashes:
    """Job after job, killed again and again."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        mistake: str | None = None,
        boundaries: tuple[str, ...] = (),
        say: Say = lambda _line: None,
    ) -> None:
        """`mistake` is one of benchmarks.checkpoint_victim; `boundaries`, if given, are all that is killed at."""
        self.figures = Figures()
        self._folder, self._seed, self._mistake, self._boundaries = folder, seed, mistake, boundaries
        self._say = say
        self._spec = a_spec(
            write_bert(folder / "bert"),
            write_messages(folder / "messages.tsv"),
            train={
                "max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-2, "max_grad_norm": 0.1,
                "adam_epsilon": 1e-4, "log_every": 1,
            },
            checkpoint={"every_steps": EVERY, "keep_last": 2},
        )  # fmt: skip
        self._losses, self._weights = self._undisturbed()

    def kill(self, kills: int) -> Figures:
        begun, figures = time.monotonic(), self.figures
        while figures.kills < kills:
            figures.jobs += 1
            job = Job(self._folder / f"job-{figures.jobs}")
            while not self._attempt(job, last=figures.kills >= kills):
                pass
            if not figures.wrong:
                shutil.rmtree(job.folder)
        figures.seconds = round(time.monotonic() - begun, 1)
        return figures

    def _undisturbed(self) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
        """The losses of all steps, and the weights after them."""
        folder = self._folder / "undisturbed"
        launched = start(a_contract(folder, a_plan(self._spec, "single", 1, 16), self._spec))
        end = launched.wait()[0]
        assert end.result is not None, launched.logs()
        assert end.result.train is not None
        return end.result.train.losses, load_file(folder / "model" / "model.safetensors")

    def _attempt(self, job: Job, *, last: bool) -> bool:
        """Whether there is nothing more to do; the `last` attempt is left in peace."""
        job.attempts += 1
        figures, draw = self.figures, random.Random(f"{self._seed}/{job.folder.name}/{job.attempts}")
        engine, world_size = draw.choice(ENGINES), draw.choice(WORLD_SIZES)
        spec = with_saves(self._spec, asynchronous=draw.random() < 0.75)
        folder = job.folder / f"attempt-{job.attempts}"
        death = None if last else self._death(draw, world_size, folder)
        contract = a_contract(
            folder,
            a_plan(spec, engine, world_size, draw.choice((2, 4))),
            spec,
            attempt=job.attempts,
            run_id=f"{job.folder.name}.{job.attempts}",
            checkpoint_dir=str(job.store),
        )
        before, pieces = self._look(job), set(unfinished(job.store))
        environment = {ENV_MISTAKE: self._mistake or draw.choice(("", "", "", "slow-copy"))}
        if isinstance(death, Victim):
            environment[ENV_VICTIM] = json.dumps(asdict(death))
        launched = start(contract, environment, module="benchmarks.checkpoint_victim")
        killed_at = kill_at(launched, death) if isinstance(death, Clock) else None
        exits = ends_of(launched)
        ended_at = time.time()
        if exits is None and not lines_of(launched.files.progress(0), "load"):
            figures.hung_at_start += 1
            return False
        if exits is None:
            figures.hung += 1
            self._wrong(job, f"did not end within {PATIENCE_S:g} s", launched)
            return True
        if isinstance(death, Victim) and Path(death.told).exists():
            killed_at = Path(death.told).stat().st_mtime
        figures.attempts += 1
        figures.attempts_of[f"{engine} on {world_size}"] += 1
        if killed_at is not None:
            figures.kills += 1
            figures.kills_at[name_of(death)] += 1
            figures.ended_after_s = max(figures.ended_after_s, round(ended_at - killed_at, 2))
        good = self._judge(job, before, pieces, launched, exits, killed=killed_at is not None)
        at = f"killed, {name_of(death)}" if killed_at is not None else "to the end"
        self._say(f"{figures.kills:4} kills  {job.folder.name} attempt {job.attempts}: {engine} on {world_size}, {at}")
        job.layout = (engine, world_size)
        return killed_at is None or not good

    def _death(self, draw: random.Random, world_size: int, folder: Path) -> Victim | Clock:
        rank, save, kind = draw.randrange(world_size), draw.choice((1, 1, 2, 2, 3)), draw.random()
        if kind < 0.5 or self._boundaries:
            boundary = draw.choice(self._boundaries or (*OF_EVERY_RANK, *OF_RANK_0))
            rank = 0 if boundary in OF_RANK_0 else rank
            return Victim(rank, boundary, save, draw.random(), str(folder / "killed"))
        if kind < 0.9:
            return Clock(rank, "save", save, draw.uniform(0, SAVE_S))
        return Clock(rank, "load", 2, draw.uniform(0, RESUME_S))  # the first time it loads model and data

    def _look(self, job: Job) -> dict[str, Found]:
        """What the store has, before an attempt."""
        found = committed(job.store)
        for one in found.values():
            if one.faults and one.id not in job.torn:
                job.torn.add(one.id)
                self.figures.torn_commits += 1
                self._wrong(job, f"{one.id} is committed, and {one.faults[0]}")
        lineage = Catalogue(open_storage(str(job.store))).listing().lineage()
        if [str(one) for one in lineage[:1]] != list(found)[-1:]:
            self.figures.misread += 1
            self._wrong(job, f"the catalogue says {lineage[:1]}, the directories say {list(found)[-1:]}")
        return found

    def _judge(
        self,
        job: Job,
        before: dict[str, Found],
        pieces: set[str],
        launched: Launched,
        exits: dict[int, RankExit],
        *,
        killed: bool,
    ) -> bool:
        """Whether the attempt did as it should, with the committed checkpoints `before` and the unfinished `pieces`
        that it found; what not is counted."""
        figures, wrong_before = self.figures, len(self.figures.wrong)
        plan = launched.contract.plan
        lines = lines_of(launched.files.progress(0))
        notes = [line.checkpoint for line in lines if line.checkpoint is not None]
        resumed = next((note for note in notes if note.outcome == "resumed"), None)
        steps = lines_of(launched.files.progress(0), "train")
        done = [end.code for end in exits.values()] == [ExitCode.DONE] * plan.world_size
        if resumed is None and not steps:
            if not killed:
                figures.failed_to_resume += 1
                self._wrong(job, "did not begin", launched)
            return len(figures.wrong) == wrong_before
        if not killed and not done:
            figures.died_by_itself += 1
            self._wrong(job, "ended by itself", launched)

        if before:
            figures.resumes += 1
            figures.resumes_in_other_layout += job.layout != (plan.engine, plan.world_size)
        newest = max([*before.values(), *([job.said] if job.said else [])], default=None, key=lambda one: one.step)
        from_id = resumed.id if resumed is not None else None
        if resumed is not None and resumed.source == "memory":
            figures.resumes_from_what_a_rank_left += 1
            if (
                not (newest.step if newest is not None else 0) < resumed.step <= job.trained + 1
            ):  # which was killed before it told
                figures.wrong_after_resume += 1
                self._wrong(job, f"resumed from {from_id}, and trained up to {job.trained}", launched)
        elif from_id is not None and (from_id not in before or before[from_id].faults):
            figures.resumed_from_incomplete += 1
            self._wrong(job, f"resumed from {from_id}, which is not whole", launched)
        elif newest is not None and from_id != newest.id:
            figures.resumed_older_than_newest_committed += 1
            self._wrong(job, f"resumed from {from_id}, and {newest.id} was committed", launched)
        job.trained = max([line.step for line in steps], default=job.trained)
        if left := pieces & set(unfinished(job.store)):
            figures.left_behind += len(left)
            self._wrong(job, f"left {left}", launched)
        said = [Found(note.step, job.attempts, ()) for note in notes if note.outcome == "committed"]
        job.said = max([*said, *([job.said] if job.said else [])], default=None)

        first = resumed.step if resumed is not None else 0
        trained = [line.loss for line in steps]
        differences = [abs((loss or 0.0) - own) for loss, own in zip(trained, self._losses[first:], strict=False)]
        figures.steps_compared += len(differences)
        figures.loss_difference = max([figures.loss_difference, *differences])
        numbered = [line.step for line in steps] == list(range(first + 1, first + 1 + len(steps)))
        as_undisturbed = numbered and max(differences, default=0.0) <= LOSS_TOLERANCE
        if not as_undisturbed or (done and not self._same_weights(launched)):
            figures.wrong_after_resume += 1
            self._wrong(job, f"after {from_id} it trained otherwise: losses differ by {differences}", launched)
        return len(figures.wrong) == wrong_before

    def _same_weights(self, launched: Launched) -> bool:
        """Whether the exported model is that of the undisturbed training."""
        found = load_file(Path(launched.contract.output_dir) / "model.safetensors")
        return found.keys() == self._weights.keys() and all(
            float((found[name] - weight).abs().max()) <= WEIGHT_TOLERANCE for name, weight in self._weights.items()
        )

    def _wrong(self, job: Job, what: str, launched: Launched | None = None) -> None:
        where = f"{job.folder.name} attempt {job.attempts}: {what}"
        self.figures.wrong.append(where)
        self._say(f"WRONG {where}" + (f"\n{launched.logs()}" if launched is not None else ""))


def with_saves(spec: TrainSpec, *, asynchronous: bool) -> TrainSpec:
    return spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"asynchronous": asynchronous})})


def name_of(death: Victim | Clock | None) -> str:
    if isinstance(death, Victim):
        return death.boundary
    return "" if death is None else {"save": "any-time", "load": "resuming"}[death.after]


def kill_at(launched: Launched, clock: Clock) -> float | None:
    """Kill as `clock` says; when that was, None if the attempt ended before."""
    files, deadline = launched.files, time.monotonic() + PATIENCE_S
    while launched.launchers[0].poll() is None and time.monotonic() < deadline:
        begun = [line for line in lines_of(files.progress(0), clock.after) if line.checkpoint is None]
        if len(begun) >= clock.count:
            time.sleep(clock.delay_s)
            return _kill(files, clock.rank)
        time.sleep(0.002)
    return None


def ends_of(launched: Launched) -> dict[int, RankExit] | None:
    """How the ranks ended that wrote it down; None if not all ended in time, and were ended then."""
    try:
        return launched.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None


def _kill(files: AttemptFiles, rank: int) -> float | None:
    try:
        who = RankProcess.model_validate_json(files.process(rank).read_bytes())
        process = psutil.Process(who.pid)
        if files.exit(rank).exists() or abs(process.create_time() - who.start_time) > 0.05:
            return None
        process.kill()
    except (FileNotFoundError, psutil.Error):
        return None
    return time.time()


def lines_of(progress: Path, phase: str | None = None) -> list[ProgressLine]:
    """Whole lines, of all phases or of one: a killed rank may leave a piece of a line."""
    if not progress.exists():
        return []
    *whole, _ = progress.read_bytes().split(b"\n")
    lines = [ProgressLine.model_validate_json(line) for line in whole]
    return [line for line in lines if phase in (None, line.phase)]
