"""The attempts of one job, started one after the other by a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.storage import open_storage
from launch.config import TrainSpec
from launch.contract import CheckpointNote, ExitCode, ProgressLine, RankExit
from tests.worlds import Launched, a_contract, a_plan, start


class Job:
    """The attempts of one job, each with a layout of its own."""

    patience_s = 120.0
    """For an attempt to end in."""

    def __init__(
        self, spec: TrainSpec, folder: Path, store: str | None = None, plan: dict[str, Any] | None = None, **more: str
    ) -> None:
        """`plan` is what its plans have beside engine and size; `more` is of its ranks' environment."""
        self.spec, self.folder, self.plan, self.environment = spec, folder, plan or {}, more
        self.store = store or str(folder / "checkpoints")
        self.attempts: list[Launched] = []

    def begin(self, engine: str, size: int, mutant: str | None = None, *, cold: bool = False, **more: str) -> Launched:
        number = len(self.attempts) + 1
        plan = a_plan(self.spec, engine, size, 4, **self.plan)
        contract = a_contract(
            self.folder / f"attempt-{number}", plan, self.spec, attempt=number, checkpoint_dir=self.store,
            tracker_dir=str(self.folder / "trackers"), run_id=f"small.{number}",
        )  # fmt: skip
        environment = {**self.environment, **more, **({"MUTANT": mutant} if mutant else {})}
        launched = start(contract, environment, module="tests.mutants" if mutant else "launch", cold=cold)
        self.attempts.append(launched)
        return launched

    def run(self, engine: str, size: int, *, stop_at: int | None = None, cold: bool = False) -> dict[int, RankExit]:
        """An attempt, to its end or to the stop that it is asked for."""
        if stop_at is None:
            launched = self.begin(engine, size, cold=cold)
        else:
            launched = self.begin(engine, size, "stop-at", cold=cold, STOP_AT=str(stop_at))
        ended = launched.wait(self.patience_s)
        expected = ExitCode.DONE if stop_at is None else ExitCode.STOPPED
        assert [ended[rank].code for rank in range(size)] == [expected] * size, launched.logs()
        return ended

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(open_storage(self.store))

    def notes(self, attempt: int) -> list[CheckpointNote]:
        lines = self.attempts[attempt - 1].files.progress(0).read_text().splitlines()
        found = [ProgressLine.model_validate_json(line).checkpoint for line in lines]
        return [note for note in found if note is not None]

    def model(self) -> bytes:
        return (Path(self.attempts[-1].contract.output_dir) / "model.safetensors").read_bytes()


def losses(ended: dict[int, RankExit]) -> tuple[float, ...]:
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    return result.train.losses
