"""What a run leaves behind: a model directory that stock libraries load, metrics, progress, tracker files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch.config import AdapterSpec, CheckpointSpec, TrainSpec
from launch.contract import ExitCode, NodeShare, ProgressLine, RankExit, RunContract
from launch.data import Rows, collate, load_corpus, sampler_for
from launch.model import load_tokenizer
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_dialogues, write_llama, write_messages

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=203)
    return world


def classification(world: Path, **train: object) -> TrainSpec:
    return a_spec(world / "bert", world / "messages.tsv", train={"learning_rate": 5e-3, **train})


def run(spec: TrainSpec, directory: Path, engine: str, world_size: int, micro_batch: int) -> dict[int, RankExit]:
    launched = start(a_contract(directory, a_plan(spec, engine, world_size, micro_batch), spec))
    ended = launched.wait()
    assert {rank: exit_.code for rank, exit_ in ended.items()} == dict.fromkeys(range(world_size), ExitCode.DONE), (
        launched.logs()
    )
    return ended


def losses(ended: dict[int, RankExit]) -> list[float]:
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    return list(result.train.losses)


def metrics(ended: dict[int, RankExit]) -> dict[str, float]:
    result = ended[0].result
    assert result is not None
    assert result.metrics is not None
    return result.metrics


def logits(model: torch.nn.Module, rows: Rows, *, causal: bool = False) -> torch.Tensor:
    batch = collate(rows, np.arange(len(rows)), 0, causal=causal)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


def test_the_model_directory_gives_the_measured_predictions(world: Path, tmp_path: Path) -> None:
    """Trained by ZeRO-3 on two ranks over an odd number of held-out rows; measured again by stock transformers."""
    spec = classification(world, max_steps=12, eval_every=5, early_stopping=None)
    spec = spec.model_copy(update={"trackers": ("tensorboard",)})
    ended = run(spec, tmp_path, "zero3", 2, 3)
    measured = metrics(ended)
    output = tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "ham", 1: "spam"}
    test = load_corpus(spec, AutoTokenizer.from_pretrained(output)).test
    assert test is not None
    assert len(test) % 2 == 1
    predicted = logits(model, test).argmax(-1).numpy()
    assert measured["accuracy"] == pytest.approx(accuracy_score(test.classes, predicted))
    assert measured["f1_macro"] == pytest.approx(f1_score(test.classes, predicted, average="macro", zero_division=0))
    loss = torch.nn.functional.cross_entropy(logits(model, test), torch.from_numpy(test.classes))
    assert measured["loss"] == pytest.approx(float(loss), abs=1e-6)

    assert measured["mcc"] == pytest.approx(matthews_corrcoef(test.labels, predicted))
    written = json.loads((output / "metrics.json").read_text())
    by_class, confusion = written.pop("per_class"), written.pop("confusion_matrix")
    assert written == measured
    assert by_class["spam"]["recall"] == pytest.approx(recall_score(test.labels, predicted))
    assert by_class["ham"]["support"] == int((test.labels == 0).sum())
    assert confusion["labels"] == ["ham", "spam"]
    assert confusion["counts"] == confusion_matrix(test.labels, predicted).tolist()
    assert TrainSpec.model_validate_json((output / "job.json").read_text()) == spec
    assert (output / "training-curve.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "bert"
    assert "12 steps, 178 samples" in card
    assert f"| spam | {by_class['spam']['precision']:.4f} | {by_class['spam']['recall']:.4f} |" in card
    assert not list(tmp_path.glob(".model*"))

    lines = [ProgressLine.model_validate_json(line) for line in (tmp_path / "rank-0/progress.jsonl").open()]
    phases = [line.phase for line in lines]
    assert phases[:2] == ["start", "load"]
    assert phases[-2:] == ["export", "done"]
    assert [line.step for line in lines if line.phase == "evaluate"] == [5, 10, 12]
    trained = [line for line in lines if line.phase == "train"]
    assert [line.step for line in trained] == list(range(1, 13))
    assert trained[-1].eta_s == 0
    assert all(line.memory_bytes and line.samples_per_s for line in trained)

    tracked = EventAccumulator(str(tmp_path / "trackers" / "small")).Reload()
    assert len(tracked.Scalars("train/loss")) == 12
    assert tracked.Scalars("eval/accuracy")[-1].value == pytest.approx(measured["accuracy"])


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_an_adapter_is_saved_as_peft_loads_it(world: Path, tmp_path: Path, engine: str) -> None:
    write_bert(tmp_path / "bert", pooler=False)
    spec = a_spec(tmp_path / "bert", world / "messages.tsv", train={"learning_rate": 5e-3, "max_steps": 12})
    spec = spec.model_copy(update={"adapter": AdapterSpec(r=4)})
    ended = run(spec, tmp_path, engine, 1 if engine == "single" else 2, 8)
    assert len(losses(ended)) == 12
    output = tmp_path / "model"
    assert not (output / "model.safetensors").exists()
    model = AutoPeftModelForSequenceClassification.from_pretrained(output, num_labels=2)
    test = load_corpus(spec, AutoTokenizer.from_pretrained(output)).test
    assert test is not None
    loss = torch.nn.functional.cross_entropy(logits(model, test), torch.from_numpy(test.classes))
    assert metrics(ended)["loss"] == pytest.approx(float(loss), abs=1e-6)
    changed = [name for name, value in model.named_parameters() if "lora_B" in name and value.abs().max() > 0]
    assert len(changed) == 12, "six linear layers in each of two blocks, and not the pooler's new weights"


def test_a_causal_model_trains_the_same_on_any_engine(tmp_path: Path) -> None:
    """The loss is a mean over the target tokens of the whole global batch, which the ranks share unevenly."""
    spec = a_spec(
        write_llama(tmp_path / "llama"),
        write_dialogues(tmp_path / "dialogues.jsonl"),
        model={"task": "causal-lm"},
        data={"split": {"test": 0.2}, "prompt_column": "prompt", "response_column": "response"},
        train={"max_steps": 6, "learning_rate": 1e-2, "max_grad_norm": 0.1, "adam_epsilon": 1e-4},
    )
    single = losses(run(spec, tmp_path / "single", "single", 1, 16))
    np.testing.assert_allclose(losses(run(spec, tmp_path / "ddp", "ddp", 2, 3)), single, rtol=5e-7)
    zero3 = run(spec, tmp_path / "zero3", "zero3", 2, 3)
    np.testing.assert_allclose(losses(zero3), single, rtol=5e-7)
    assert metrics(zero3)["perplexity"] == pytest.approx(np.exp(metrics(zero3)["loss"]))

    # The first loss is what transformers' own loss says of the same batch.
    rows = load_corpus(spec, load_tokenizer(spec.model)).train
    first = sampler_for(rows, spec.train).batch(0)
    batch = collate(rows, first, 1, causal=True)
    model = AutoModelForCausalLM.from_pretrained(spec.model.name_or_path)
    stock = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).loss
    assert single[0] == pytest.approx(stock.item(), abs=1e-6)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "zero3" / "model")
    assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()


def test_training_stops_early_on_all_ranks(world: Path, tmp_path: Path) -> None:
    spec = classification(
        world,
        max_steps=50,
        eval_every=2,
        learning_rate=1e-9,
        early_stopping={"metric": "f1_macro", "patience": 2},
    )
    ended = run(spec, tmp_path, "ddp", 2, 8)
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    assert (result.train.steps, result.train.stopped_early) == (6, True)
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "zero3"])
def test_a_stopped_job_goes_on_where_it_was(world: Path, tmp_path: Path, engine: str) -> None:
    """It fails after step 5, saved at step 4: losses are those of a run that was never interrupted. Where a rank has
    the whole state, what it leaves makes that step 5."""
    processes = 1 if engine == "single" else 2
    spec = classification(world, max_steps=12)
    whole = losses(run(spec, tmp_path / "whole", engine, processes, 8))
    kept = spec.model_copy(update={"checkpoint": CheckpointSpec(every_steps=2, keep_last=2)})
    plan = a_plan(kept, engine, processes, 8)
    shared = {"checkpoint_dir": str(tmp_path / "checkpoints")}
    first = start(
        a_contract(tmp_path / "first", plan, kept, **shared), {"MUTANT": "crash-at-6"}, module="tests.mutants"
    )
    ended = first.wait()
    assert ended[0].code == ExitCode.CRASH, first.logs()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    left = ["copies"] if engine in ("single", "ddp") else []
    assert saved == ["assets", "claims", *left, "step-2.attempt-1", "step-4.attempt-1"]
    torn = tmp_path / "checkpoints" / "step-99.attempt-1"  # without a marker
    torn.mkdir()
    (torn / "rank-0.safetensors").write_bytes(b"half")
    second = start(a_contract(tmp_path / "second", plan, kept, attempt=2, **shared))
    ended = second.wait()
    assert ended[0].code == ExitCode.DONE, second.logs()
    assert losses(ended) == whole
    lines = [ProgressLine.model_validate_json(line) for line in second.files.progress(0).open()]
    assert [line.step for line in lines if line.phase == "train"] == list(range(6 if left else 5, 13))
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-10.attempt-2", "step-12.attempt-2"]


def test_two_nodes_of_different_size_train_as_one(world: Path, tmp_path: Path) -> None:
    """Two launchers with the configuration of two machines, one rank and two ranks; both on this one."""
    spec = classification(world)
    alone = losses(run(spec, tmp_path / "alone", "single", 1, 16))
    for engine in ("ddp", "zero2"):
        nodes = tuple(NodeShare(node=f"n{i}", address="127.0.0.1", processes=1 + i) for i in range(2))
        directory = tmp_path / engine
        launched = start(a_contract(directory, a_plan(spec, engine, 3, 2), spec, nodes=nodes))
        ended = launched.wait()
        assert {exit_.code for exit_ in ended.values()} == {ExitCode.DONE}, launched.logs()
        assert len(ended) == 3
        np.testing.assert_allclose(losses(ended), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        ("single", ["--num_processes", "1"]),
        ("ddp", ["--config_file", "configs/accelerate/ddp-2.yaml"]),
        ("zero2", ["--config_file", "configs/accelerate/zero2-2.yaml"]),
    ],
)
def test_a_job_file_alone_trains_as_under_a_contract(
    world: Path, tmp_path: Path, strategy: str, flags: list[str]
) -> None:
    spec = classification(world, micro_batch_size=4)
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                **spec.model_dump(mode="json", exclude_none=True, exclude={"trackers", "checkpoint"}),
                "queue": "research",
                "resources": {"num_processes": 2},
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0", "-m", "launch",
         "--config", str(job), "--set", f"strategy={strategy}", "--output", str(tmp_path / "out")],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "runs" / "small"
    alone = {0: RankExit.model_validate_json((run_dir / "rank-0" / "exit.json").read_bytes())}
    assert (tmp_path / "out" / "model.safetensors").exists()
    result = alone[0].result
    assert result is not None
    assert result.engine == strategy
    under_contract = run(spec, tmp_path / "contract", strategy, result.world_size, 4)
    assert losses(alone) == losses(under_contract)


def test_a_contract_survives_its_file(world: Path, tmp_path: Path) -> None:
    spec = classification(world)
    contract = a_contract(tmp_path, a_plan(spec, "zero3", 2, 8), spec)
    contract.write(tmp_path / "contract.json")
    assert RunContract.read(tmp_path / "contract.json") == contract
