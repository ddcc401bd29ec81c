"""`tuneyard reproduce`: the same weights to the last bit, or what is at fault. With dropout, on real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from launch.attempt import AttemptFiles
from launch.contract import RunContract
from launch.provenance import RECORD, base_files, read_record
from tests.repositories import a_repository
from tests.worlds import write_bert, write_messages
from tests.yards import Yard

REPOSITORY = Path(__file__).parents[2]


def a_home(folder: Path, **keys: Any) -> Yard:
    """A home and a job file in it; no yard is up."""
    write_bert(folder / "bert")
    write_messages(folder / "messages.tsv")
    yard = Yard(folder)
    yard.job_file(
        name="small",
        model={"name_or_path": "bert", "task": "sequence-classification", "dropout": 0.2},
        data={"train": "messages.tsv", "split": {"test": 0.2, "stratify": True}, "max_length": 32},
        train={"max_steps": 4, "global_batch_size": 15, "learning_rate": 1e-2, "seed": 7} | keys.pop("train", {}),
        output_dir="model",
        **keys,
    )
    return yard


@pytest.mark.slow
def test_two_processes_give_bitwise_the_same_weights(tmp_path: Path) -> None:
    """ZeRO-2, with a last micro-batch that one rank has and the other has not."""
    secret = {"A_KEY": {"from_env": "HIDDEN"}, "PLAIN": "hush-hush"}
    keys = {"strategy": "zero2", "resources": {"num_processes": 2}, "env": secret}
    yard = a_home(tmp_path, train={"micro_batch_size": 3}, **keys)
    a_repository(tmp_path)
    yard.env["HIDDEN"] = "pssst"
    yard.json("run", str(tmp_path / "small.yaml"), "-q")

    record = read_record(tmp_path / "model")
    told = (tmp_path / "model" / RECORD).read_text()
    assert record.env == ("A_KEY", "PLAIN")
    assert not any(value in told for value in ("hush-hush", "pssst"))
    assert (record.plan.engine, record.plan.micro_batch_size, len(record.threads)) == ("zero2", 3, 2)
    assert record.nodes[0].threads == record.threads[0]
    assert record.base.files == base_files(tmp_path / "bert")
    assert set(record.data) == {"train", "test"}
    assert record.surroundings.cpu_capability
    assert record.job_file is not None
    assert (record.job_file.path, record.job_file.dirty) == ("small.yaml", False)
    assert (record.attempts, record.resumed_at) == (1, 0)
    assert "`tuneyard reproduce DIRECTORY`" in (tmp_path / "model" / "README.md").read_text()
    versions = json.loads((tmp_path / "model" / "versions.json").read_text())
    assert versions == record.surroundings.versions

    again = yard.run("reproduce", str(tmp_path / "model"), "-q", "-o", "json")
    result = json.loads(again.stdout)
    assert (result["bitwise_same"], result["different"], result["different_metrics"]) == (True, [], [])
    assert result["tensors"] == len(load_file(tmp_path / "model" / "model.safetensors"))
    assert result["output_dir"] == str(tmp_path / "model-reproduced")
    assert "A_KEY, PLAIN" in again.stderr
    new = read_record(tmp_path / "model-reproduced")
    assert (new.plan, new.threads, new.data, new.base) == (record.plan, record.threads, record.data, record.base)
    assert new.job_file == record.job_file


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    """An adapter that `launch` trained alone, in no repository, on one thread where a planner gives it all cores."""
    folder = tmp_path_factory.mktemp("adapter")
    yard = a_home(folder, strategy="single", adapter={"r": 2, "dropout": 0.3}, train={"deterministic": True})
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
         "--num_cpu_threads_per_process", "1", "-m", "launch", "--config", str(folder / "small.yaml")],
        cwd=REPOSITORY, capture_output=True, timeout=200, check=True,
    )  # fmt: skip
    return yard


def test_an_adapter_trained_by_launch_alone_and_a_weight_that_was_changed_since(adapter: Yard) -> None:
    """One bit of one tensor: all others are found the same, which is what a whole reproduction is."""
    model = adapter.home / "model"
    record = read_record(model)
    assert (record.threads, record.job_file, record.plan.engine) == ((1,), None, "single")
    path = model / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "lora_B" in name)
    weights[name].view(-1)[5] += 0.5
    save_file(weights, path)

    target = adapter.home / "again"
    done = adapter.run("reproduce", str(model), "--output-dir", str(target), "-q", check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"not the same: 1 of {len(weights)} tensors differ, by at most 0.5"
    assert lines[1].split() == [name, "0.5"]
    assert lines[2] == "likely reasons"
    assert "metrics differ" not in done.stdout
    assert read_record(target).threads == (1,)
    job = next((adapter.home / "runs").glob("small-*"))
    contract = RunContract.read(AttemptFiles(job / "jobs" / job.name / "attempt-1").contract)
    assert contract.nodes[0].threads == 1


@pytest.mark.parametrize("change", ["a row moved", "gone"])
def test_data_that_changed_are_refused_before_a_step(adapter: Yard, change: str) -> None:
    data = adapter.home / "messages.tsv"
    header, first, *rest = data.read_text().splitlines(keepends=True)
    if change == "gone":
        data.unlink()
    else:
        data.write_text("".join([header, *rest, first]))
    target = adapter.home / "never"
    try:
        done = adapter.run(
            "reproduce", str(adapter.home / "model"), "--output-dir", str(target), "-q", "-o", "json", check=False
        )
    finally:
        data.write_text("".join([header, first, *rest]))
    assert done.returncode == 2, done.stderr
    (error,) = json.loads(done.stdout)["errors"]
    assert error["code"] == ("file-not-found" if change == "gone" else "data-changed")
    assert error["field"] == "data.train"
    assert error["hint"]
    assert not target.exists()
