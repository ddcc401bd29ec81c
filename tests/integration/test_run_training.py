"""`tuneyard run` of a training job: what it prints, under every engine; and the main example on a real yard."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import AttemptFiles
from launch.contract import RunContract
from launch.instructions import multiplies_bf16
from orchestrator.execute.processes import of_run
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "configs" / "jobs" / "sms-spam.yaml"
KEYS = {
    "job", "state", "attempts", "engine", "zero_stage", "world_size", "metrics", "train", "peak_bytes",
    "moment_bytes", "master_bytes", "output_dir",
}  # fmt: skip
ENGINES = {
    "single": (1, 0, []),
    "ddp": (2, 0, []),
    "zero1": (2, 1, []),
    "zero2": (2, 2, ["offload=optimizer"]),
    "zero3": (2, 3, ["offload=all"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    """A home and a job file in it; no yard is up."""
    folder = tmp_path_factory.mktemp("home")
    write_bert(folder / "bert")
    write_messages(folder / "messages.tsv")
    yard = Yard(folder)
    yard.job_file(
        name="small",
        model={"name_or_path": "bert", "task": "sequence-classification", "dropout": 0.0},
        data={"train": "messages.tsv", "split": {"test": 0.2, "stratify": True}, "max_length": 32},
        train={"max_steps": 5, "global_batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"},
    )
    return yard


@pytest.fixture(scope="module")
def results(home: Yard) -> dict[str, Any]:
    def ran(engine: str) -> Any:
        processes, _, more = ENGINES[engine]
        overrides = [f"strategy={engine}", f"resources.num_processes={processes}", *more]
        flags = [flag for override in overrides for flag in ("--set", override)]
        return home.json("run", str(home.home / "small.yaml"), "-q", *flags)

    with ThreadPoolExecutor(2) as pool:  # while one imports, another trains
        return dict(zip(ENGINES, pool.map(ran, ENGINES), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_last_line_is_the_whole_result(results: dict[str, Any], engine: str) -> None:
    processes, stage, _ = ENGINES[engine]
    told = results[engine]
    assert set(told) >= KEYS
    assert (told["state"], told["attempts"]) == ("succeeded", 1)
    assert (told["engine"], told["zero_stage"], told["world_size"]) == (engine, stage, processes)
    assert set(told["metrics"]) == {"loss", "accuracy", "f1_macro", "mcc"}
    assert told["train"]["steps"] == len(told["train"]["losses"]) == 5
    assert told["train"]["samples"] == 5 * 16
    assert told["train"]["samples_per_s"] > 0
    for name in ("peak_bytes", "moment_bytes", "master_bytes"):
        assert len(told[name]) == processes
    assert (Path(told["output_dir"]) / "model.safetensors").is_file()


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "single"])
def test_every_engine_trains_the_same(results: dict[str, Any], engine: str) -> None:
    assert results[engine]["train"]["losses"] == pytest.approx(results["single"]["train"]["losses"], abs=1e-6)
    assert results[engine]["metrics"] == pytest.approx(results["single"]["metrics"], abs=1e-5)


def test_moments_are_sharded_by_zero_and_by_nothing_else(results: dict[str, Any]) -> None:
    (whole,) = results["single"]["moment_bytes"]
    assert results["ddp"]["moment_bytes"] == [whole, whole]
    for engine in ("zero1", "zero2", "zero3"):
        assert results[engine]["moment_bytes"] == pytest.approx([whole / 2] * 2, rel=0.01)
    assert results["single"]["master_bytes"] == [0]
    assert all(shard > 0 for shard in results["zero2"]["master_bytes"])


def test_nothing_is_left_running(home: Yard, results: dict[str, Any]) -> None:
    for told in results.values():
        assert of_run(f"{told['job']}.1") == []
        run_dir = home.home / "runs" / told["job"] / "jobs" / told["job"] / "attempt-1"
        contract = RunContract.read(AttemptFiles(run_dir).contract)
        assert contract.run_id == f"{told['job']}.1"


@pytest.mark.skipif(
    not (EXAMPLE.parent / "assets" / "models" / "minilm").is_dir(), reason="`make examples` was not run"
)
def test_the_main_example_on_a_ray_yard() -> None:
    """What `make demo` does, in half the steps: sharded by ZeRO-2 over two processes, to a model worth having."""
    with a_yard() as yard:
        told = yard.json("submit", str(EXAMPLE), "--wait", "-q", "--set", "train.max_steps=50")
        assert (told["state"], told["engine"], told["world_size"]) == ("succeeded", "zero2", 2)
        assert told["metrics"]["f1_macro"] >= 0.93
        assert yard.left_of(told["job"]) == []
        described = yard.describe(told["job"])
        launch = described["attempts"][0]["launch"]
        engine = json.loads(launch["deepspeed.json"])
        assert engine["zero_optimization"]["stage"] == 2
        assert engine["bf16"]["enabled"] is multiplies_bf16()  # the job says `precision: auto`
        card = (Path(told["output_dir"]) / "README.md").read_text()
        assert f", {'bf16' if multiplies_bf16() else 'fp32'}, all weights" in card
        assert "auto" not in "".join(launch[name] for name in launch if name != "contract.json")

        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(told["output_dir"], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(told["output_dir"])
        texts = ["WINNER!! Claim your free prize now, call 09061701461", "ok, see you at home after dinner then"]
        with torch.no_grad():
            chosen = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
        assert [model.config.id2label[int(label)] for label in chosen] == ["spam", "ham"]
