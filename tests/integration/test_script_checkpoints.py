"""The example script's checkpoints: stopped on two processes, gone on with on one, and told of in its progress."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.storage import LocalStorage
from launch.contract import ExecutionPlan, ExitCode, ProgressLine, StopRequest
from tests.worlds import Launched, a_contract, start

SCRIPT = Path(__file__).parents[2] / "configs" / "jobs" / "plain_script.py"
STEPS = 40


def script(folder: Path, store: Path, processes: int) -> Launched:
    plan = ExecutionPlan(
        engine="ddp" if processes > 1 else "single", world_size=processes, device="cpu", micro_batch_size=1,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    command = (sys.executable, str(SCRIPT), "--steps", str(STEPS), "--save-every", "10")
    return start(
        a_contract(folder, plan, None, command=command, working_dir=str(folder.parent), checkpoint_dir=str(store))
    )


def test_a_script_moves_to_another_world_size(tmp_path: Path) -> None:
    store = tmp_path / "checkpoints"
    first = script(tmp_path / "first", store, 2)
    first.wait_for('"step": 12')
    first.files.stop.write_text(StopRequest(reason="test", deadline=time.time() + 60).model_dump_json())
    ended = first.wait()
    assert {end.code for end in ended.values()} == {ExitCode.STOPPED}, first.logs()
    listing = Catalogue(LocalStorage(store)).listing()
    stopped_at = listing.committed[0].step
    assert stopped_at >= 12
    second = script(tmp_path / "second", store, 1)
    assert second.wait()[0].code == ExitCode.DONE, second.logs()
    lines = [json.loads(line) for line in second.files.progress(0).read_text().splitlines()]
    notes = [ProgressLine.model_validate(line).checkpoint for line in lines if "checkpoint" in line]
    assert next((note.outcome, note.step) for note in notes if note) == ("resumed", stopped_at)
    assert ("committed", STEPS) in [(note.outcome, note.step) for note in notes if note]
    assert min(line["step"] for line in lines if line["phase"] == "train") == stopped_at + 1
    model = torch.load(Path(second.contract.output_dir) / "model.pt", weights_only=True)
    assert len(model) == 4
