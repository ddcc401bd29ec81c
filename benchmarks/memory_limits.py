"""`python -m benchmarks.memory_limits`: does what is planned fit, and how much is left unused?

Trainings run in memory cgroups of random sizes, in which the kernel kills what exceeds the limit. The plan comes from
the planner alone; brute force tries the same plan with every larger micro-batch, and stops where the kernel kills. The
first attempts of each architecture are planned with the cold-start margin, later ones with what was learned from them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.memory import footprint_of
from benchmarks.memory_world import Case, write_job
from launch.attempt import ENV_RUN_ID, AttemptFiles, ExitCode
from launch.contract import ExecutionPlan, RankExit
from launch.document import read_document
from launch.engine_config import launch_environment
from launch.footprint_record import Footprint
from launch.shape import ModelShape, read_shape
from orchestrator.cluster.spec import NodeKind
from orchestrator.job.spec import TrainingJob, load_job
from orchestrator.memory.calibrate import NOTHING_LEARNED, Score, margin_factor
from orchestrator.memory.margin import COLD, NONE, Margin, cold
from orchestrator.memory.search import Choice, needed, predict_of, search
from tests.victims import ENV_CGROUP
from tests.worlds import a_contract

TOP = Path("/sys/fs/cgroup/memory")
LEARNED_AFTER = 10
ROWS = 32
"""Of a global batch on each rank."""
CASES = [
    Case("bert", 256, ROWS, hidden=256, layers=4),
    Case("gpt2", 256, ROWS, hidden=256, layers=4),
    Case("llama", 256, ROWS, hidden=256, layers=4),
]


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A cgroup of memory (version 1) that allows `limit` bytes and no swap."""
    group = TOP / f"tuneyard-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def fits(job: TrainingJob, plan: ExecutionPlan, limit: int, folder: Path) -> int | None:
    """Peak resident bytes of the training under `limit`; None if the kernel killed it."""
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    contract = a_contract(run_dir, plan, job.train_spec())
    files = AttemptFiles(run_dir)
    contract.write(files.contract)
    environment = launch_environment(plan, contract.nodes[0]) | {"HF_HUB_OFFLINE": "1", ENV_RUN_ID: contract.run_id}
    with cgroup(limit) as group, (run_dir / "output").open("w") as output:
        # What the launcher starts, without the launcher: there is one rank.
        rank = subprocess.Popen(
            [sys.executable, "-m", "tests.victims", "--contract", str(files.contract)],
            env=os.environ | environment | {ENV_CGROUP: str(group)}, stdout=output, stderr=output,
        )  # fmt: skip
        rank.wait(600)
    try:
        if rank.returncode == -signal.SIGKILL:
            return None
        end = RankExit.model_validate_json(files.exit(0).read_bytes())
        if end.code != ExitCode.DONE or end.result is None:
            raise RuntimeError(f"{end.error}\n{(run_dir / 'output').read_text()}")
        return end.result.peak_bytes
    finally:
        shutil.rmtree(run_dir)


def with_micro(plan: ExecutionPlan, micro: int) -> ExecutionPlan:
    return plan.model_copy(update={"micro_batch_size": micro, "gradient_accumulation_steps": -(-ROWS // micro)})


class Subject:
    """One architecture: its job, footprint, and what has been learned of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        path = write_job(case, folder, planned=True)
        job = load_job(read_document(path))
        assert isinstance(job, TrainingJob)
        self.job = job
        self.shape: ModelShape = read_shape(job.model)
        self.footprint: Footprint = footprint_of(case, folder, planned=True)
        self.scores: dict[str, list[Score]] = {"fast": [], "tight": []}
        """By allocator, as a yard keeps them."""
        self.more = 0

    @property
    def attempts(self) -> int:
        return sum(map(len, self.scores.values()))

    def margin_of(self, plan: ExecutionPlan) -> Margin:
        factor = margin_factor(self.scores[plan.allocator])
        return cold(self.footprint, plan) if factor == NOTHING_LEARNED else COLD.scaled(factor)

    def choose(self, limit: int) -> Choice:
        kind = NodeKind("limited", 1, os.cpu_count() or 1, 1, limit)
        choice = search(self.job, self.shape, self.footprint, [kind], margin_of=self.margin_of)
        assert choice is not None
        return choice

    def limit(self, draw: random.Random) -> int:
        """Enough for between 10 and 30 rows without recomputation, as far as anybody knows."""
        first = self.choose(1 << 40).best.plan.model_copy(update={"allocator": "tight"})
        told_of = predict_of(self.job)
        low, high = (
            needed(told_of(self.footprint, with_micro(first, micro), True, 1), first, NONE).host for micro in (10, 30)
        )
        return int(draw.uniform(low, high))


def brute_force(subject: Subject, plan: ExecutionPlan, limit: int) -> int:
    """The largest micro-batch that runs, of those from the plan's on: the kernel is asked about each that matters."""
    low, high = plan.micro_batch_size, ROWS + 1  # low runs; high does not, or is not asked for
    told_of = predict_of(subject.job)
    expected = [
        micro
        for micro in range(low, high)
        if needed(told_of(subject.footprint, with_micro(plan, micro), True, 1), plan, NONE).host <= limit
    ]
    fitting = max([low, *expected])
    guess = fitting + subject.more  # where it was beyond what was expected the last time, it is likely to be again
    while high - low > 1:
        tried = min(max(guess, low + 1), high - 1)
        if fits(subject.job, with_micro(plan, tried), limit, subject.folder) is None:
            high, guess = tried, tried - 1
        else:
            low, guess = tried, tried + 1
    subject.more = low - fitting
    return low


def row_of(subject: Subject, limit: int) -> dict[str, Any]:
    learned = subject.attempts >= LEARNED_AFTER
    choice = subject.choose(limit)
    plan = choice.best.plan
    row: dict[str, Any] = {
        "case": subject.case.name, "limit": limit, "learned": learned, "fits": choice.fits,
        "micro_batch_size": plan.micro_batch_size, "allocator": plan.allocator,
        "activation_checkpointing": plan.activation_checkpointing,
    }  # fmt: skip
    if not choice.fits:
        return row
    peak = fits(subject.job, plan, limit, subject.folder)
    row["ran_out"] = peak is None
    if peak is not None:
        best = choice.best
        score = Score(predicted_bytes=best.bare, margin_bytes=best.cold_margin, measured_bytes=peak)
        subject.scores[plan.allocator].append(score)
        row |= {"measured": peak, "predicted": best.bare}
        row["brute_force"] = brute_force(subject, plan, limit)
        row["share"] = plan.micro_batch_size / row["brute_force"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limits", type=int, default=51)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("-o", default="text")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="limits-") as folder:
        subjects = [Subject(case, Path(folder)) for case in CASES]
        draws = [random.Random(arguments.seed + number) for number in range(len(subjects))]

        def of_subject(number: int) -> None:
            # One after the other, since each teaches the next; of two architectures at a time.
            for _ in range(-(-arguments.limits // len(subjects))):
                row = row_of(subjects[number], subjects[number].limit(draws[number]))
                rows.append(row)
                if arguments.o == "text":
                    print(json.dumps(row), flush=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(of_subject, range(len(subjects))))
    print(json.dumps(summary(rows)))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ran = [row for row in rows if row["fits"]]
    cold = [row["share"] for row in ran if not row["learned"] and "share" in row]
    learned = [row["share"] for row in ran if row["learned"] and "share" in row]
    return {
        "limits": len(rows), "planned": len(ran), "ran_out": sum(row["ran_out"] for row in ran),
        "share_cold_min": round(min(cold), 3) if cold else None,
        "share_cold_mean": round(mean(cold), 3) if cold else None,
        "share_learned_min": round(min(learned), 3) if learned else None,
        "share_learned_mean": round(mean(learned), 3) if learned else None, "learned": len(learned),
    }  # fmt: skip


if __name__ == "__main__":
    main()
