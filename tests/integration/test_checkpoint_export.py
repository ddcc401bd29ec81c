"""A checkpoint exports to what the training itself would have written, with as little memory as is promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch.config import CheckpointSpec, TrainSpec
from launch.contract import ExitCode
from tests.programs import told_by
from tests.worlds import (
    a_contract,
    a_plan,
    a_spec,
    start,
    write_bert,
    write_dialogues,
    write_gpt2,
    write_llama,
    write_messages,
)

STEPS = 4


def trained(spec: TrainSpec, folder: Path, engine: str = "single", size: int = 1) -> tuple[Path, Path]:
    """The store of checkpoints and the model directory of a run whose last step is saved."""
    spec = spec.model_copy(update={"checkpoint": CheckpointSpec(every_steps=STEPS)})
    launched = start(a_contract(folder, a_plan(spec, engine, size, 4), spec))
    ended = launched.wait()
    assert ended[0].code == ExitCode.DONE, launched.logs()
    return Path(launched.contract.checkpoint_dir), Path(launched.contract.output_dir)


def export(store: Path, output: Path, *options: str, status: int = 0, alone: bool = False) -> dict[str, Any]:
    """What the program prints; `alone` in a process of its own, as it is used."""
    words = [str(store), f"step-{STEPS}.attempt-1", str(output), *options]
    return told_by("launch.checkpoint.export", words, status, alone=alone)


def messages(folder: Path, **changes: Any) -> TrainSpec:
    write_bert(folder / "bert", hidden=64)
    write_messages(folder / "messages.tsv", rows=60)
    return a_spec(folder / "bert", folder / "messages.tsv", data={"split": None}, **changes)


def dialogues(folder: Path, model: Path, **changes: Any) -> TrainSpec:
    write_dialogues(folder / "dialogues.jsonl")
    data = {"split": None, "prompt_column": "prompt", "response_column": "response"}
    return a_spec(model, folder / "dialogues.jsonl", model={"task": "causal-lm"}, data=data, **changes)


def logits(model: Any, tokenizer_dir: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(tokenizer_dir)(["win a free prize call now"], return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def test_a_classifier_in_several_files(tmp_path: Path) -> None:
    """Half of it frozen: that half is the base's own."""
    store, model = trained(messages(tmp_path, train={"freeze": ["bert.embeddings.*"]}), tmp_path / "run", "zero3", 2)
    done = export(store, tmp_path / "exported", "--max-shard-bytes", "60000", alone=True)
    assert done["kind"] == "model"
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    live = AutoModelForSequenceClassification.from_pretrained(model)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(exported, tmp_path / "exported"), logits(live, model))
    assert exported.config.id2label == live.config.id2label
    assert export(store, tmp_path / "exported", status=1, alone=True)["error"]["code"] == "output-exists"


def test_a_language_model_with_tied_weights(tmp_path: Path) -> None:
    store, model = trained(dialogues(tmp_path, write_llama(tmp_path / "llama")), tmp_path / "run")
    export(store, tmp_path / "exported")
    live, exported = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "exported"))
    assert live.keys() == exported.keys()
    assert all(torch.equal(live[name], exported[name]) for name in live)
    half = export(store, tmp_path / "half", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert half["size"] < (tmp_path / "exported" / "model.safetensors").stat().st_size * 0.6


@pytest.mark.parametrize(
    ("write", "adapter"),
    [
        pytest.param(write_llama, {"r": 4}, id="lora"),
        pytest.param(write_llama, {"r": 4, "use_dora": True}, id="dora"),
        pytest.param(write_gpt2, {"r": 4, "use_rslora": True}, id="rslora-conv1d"),
    ],
)
def test_an_adapter_apart_and_merged(tmp_path: Path, write: Any, adapter: dict[str, Any]) -> None:
    spec = dialogues(tmp_path, write(tmp_path / "base"), adapter={"type": "lora", **adapter})
    store, model = trained(spec, tmp_path / "run", "ddp", 2)
    assert export(store, tmp_path / "apart")["kind"] == "adapter"
    live, apart = (load_file(folder / "adapter_model.safetensors") for folder in (model, tmp_path / "apart"))
    assert live.keys() == apart.keys()
    assert all(torch.equal(live[name], apart[name]) for name in live)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_adapter = PeftModel.from_pretrained(base, str(tmp_path / "apart"))
    expected = logits(with_adapter, model)
    assert export(store, tmp_path / "merged", "--merge")["kind"] == "merged model"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, model), expected, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits(plain, model), expected, atol=1e-4), "the adapter changes something"


def test_the_head_of_a_merged_classifier_is_the_trained_one(tmp_path: Path) -> None:
    store, model = trained(messages(tmp_path, adapter={"type": "lora", "r": 4}), tmp_path / "run")
    export(store, tmp_path / "merged", "--merge")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    expected = logits(PeftModel.from_pretrained(base, str(model)), model)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, model), expected, rtol=0, atol=1e-5)


def test_the_best_weights_rather_than_the_last(tmp_path: Path) -> None:
    """Held out are rows of the other class, which the model takes ever less for it: the best weights are early ones."""
    spec = messages(tmp_path, train={"learning_rate": 1e-2, "schedule": "constant", "eval_every": 1, "keep_best": True})
    swapped = {"spam": "ham", "ham": "spam", "label": "label"}
    lines = [line.rpartition("\t") for line in (tmp_path / "messages.tsv").read_text().splitlines()]
    (tmp_path / "swapped.tsv").write_text("".join(f"{text}\t{swapped[label]}\n" for text, _, label in lines))
    held_out = spec.data.model_copy(update={"test": (str(tmp_path / "swapped.tsv"),)})
    store, model = trained(spec.model_copy(update={"data": held_out}), tmp_path / "run", "zero3", 2)
    export(store, tmp_path / "best", "--best")
    export(store, tmp_path / "last")
    live, best, last = (load_file(f / "model.safetensors") for f in (model, tmp_path / "best", tmp_path / "last"))
    assert all(torch.equal(live[name], best[name]) for name in live)
    assert not all(torch.equal(last[name], best[name]) for name in live)


def test_without_best_weights_there_is_nothing_to_take(tmp_path: Path) -> None:
    store, _ = trained(messages(tmp_path), tmp_path / "run")
    assert export(store, tmp_path / "best", "--best", status=1)["error"]["code"] == "no-best-weights"


MEASURED = """
import sys
import psutil, torch, threading, time
from launch.checkpoint import export as module
import transformers.models.llama.modeling_llama
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, psutil.Process().memory_info().rss)
        time.sleep(0.001)
write = module.write_weights
def measured(*arguments):
    global done, before
    before = psutil.Process().memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    files = write(*arguments)
    done = True
    thread.join()
    return files
module.write_weights = measured
module.main()
print(peak - before)
"""


def test_host_memory_is_that_of_the_largest_file(tmp_path: Path) -> None:
    """A model of 77 MB in files of at most 40 MB, of a process that has its imports done."""
    spec = dialogues(tmp_path, write_llama(tmp_path / "base", hidden=1024))
    store, _ = trained(spec, tmp_path / "run")
    done = subprocess.run(
        [
            sys.executable, "-c", MEASURED, str(store), f"step-{STEPS}.attempt-1", str(tmp_path / "out"),
            "--max-shard-bytes", "40000000",
        ],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = [path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(files) >= 2
    assert int(done.stdout.splitlines()[-1]) <= 1.2 * max(files)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    store, _ = trained(messages(tmp_path), tmp_path / "run")
    shard = store / f"step-{STEPS}.attempt-1" / "rank-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    error = export(store, tmp_path / "exported", status=1)["error"]
    assert error["code"] == "checkpoint-damaged"
    assert "rank-0.safetensors" in error["message"]
    assert not (tmp_path / "exported").exists()
