"""Fine-tuning a language model on dialogues: the same on any engine, packed or not, with an adapter or without."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.config import TrainSpec
from launch.contract import ExitCode, RankExit, RankResult
from launch.data import Rows, collate, load_corpus, sampler_for
from launch.model import drawn, load_tokenizer
from tests.references import answer_loss
from tests.worlds import a_contract, a_plan, a_spec, start, write_chats, write_llama

CHATML = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_llama(world / "llama", hidden=128, chat_template="a template that the job's own replaces")
    write_chats(world / "chats.jsonl")
    (world / "template.jinja").write_text(CHATML)
    return world


def chatting(world: Path, adapter: dict[str, Any] | None = None, **changes: Any) -> TrainSpec:
    """A job on dialogues; `changes` are keys of `data` or `train`."""
    data = {
        "split": {"test": 0.2},
        "max_length": 96,
        "messages_column": "messages",
        "chat_template": str(world / "template.jinja"),
    }
    train = {"max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.1, "adam_epsilon": 1e-4}
    for key, value in changes.items():
        (data if key in ("packing", "loss_on", "max_length") else train)[key] = value
    return a_spec(
        world / "llama",
        world / "chats.jsonl",
        model={"task": "causal-lm"},
        data=data,
        train=train,
        **({} if adapter is None else {"adapter": adapter}),
    )


def run(spec: TrainSpec, directory: Path, engine: str, micro_batch: int = 4) -> dict[int, RankExit]:
    processes = 1 if engine == "single" else 2
    launched = start(a_contract(directory, a_plan(spec, engine, processes, micro_batch), spec))
    ended = launched.wait()
    assert {exit_.code for exit_ in ended.values()} == {ExitCode.DONE}, launched.logs()
    return ended


def result(ended: dict[int, RankExit]) -> RankResult:
    found = ended[0].result
    assert found is not None
    return found


def losses(ended: dict[int, RankExit]) -> list[float]:
    summary = result(ended).train
    assert summary is not None
    return list(summary.losses)


def held_out_loss(model: torch.nn.Module, spec: TrainSpec) -> float:
    """Mean loss over the held-out answer tokens."""
    rows = load_corpus(spec, load_tokenizer(spec.model, spec.data.chat_template)).test
    assert isinstance(rows, Rows)
    everything = np.arange(len(rows))
    batch = collate(rows, everything, 1, causal=True)
    with torch.no_grad():
        summed = answer_loss(model.eval()(**batch.inputs()).logits, batch)
    return float(summed) / rows.targets(everything)


def test_packed_dialogues_train_the_same_on_any_engine(world: Path, tmp_path: Path) -> None:
    """With samples: the same greedy answers, whether one rank has the whole model or all generate together."""
    spec = chatting(world, packing=True, global_batch_size=5, samples=3, sample_max_new_tokens=5)
    single = run(spec, tmp_path / "single", "single", 5)
    assert losses(single)[-1] < losses(single)[0]
    samples = [json.loads(line) for line in (tmp_path / "single/model/samples.jsonl").open()]
    assert len(samples) == 3
    for engine in ("ddp", "zero3"):
        ended = run(spec, tmp_path / engine, engine, 2)
        np.testing.assert_allclose(losses(ended), losses(single), rtol=5e-6)
        assert [json.loads(line) for line in (tmp_path / engine / "model/samples.jsonl").open()] == samples

    output = tmp_path / "zero3" / "model"
    metrics = result(ended).metrics
    assert metrics is not None
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert metrics["loss"] == pytest.approx(held_out_loss(model, spec), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == CHATML, "whoever asks the model asks in the words it has learned"
    card = (output / "README.md").read_text()
    for sample in samples:
        assert sample["prompt"].startswith("user:")
        assert sample["prompt"].endswith("assistant:")
        assert sample["reference"]
        assert f"```text\n{sample['prompt']}\n```" in card
        ids = tokenizer(sample["prompt"].replace("assistant:", "</s>assistant:", 1), return_tensors="pt").input_ids
        said = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == sample["generated"]


@pytest.mark.parametrize(
    ("engine", "adapter"),
    [
        ("single", {"r": 16, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("zero3", {"r": 16, "use_rslora": True, "target_modules": "all-linear"}),
        ("ddp", {"r": 16, "modules_to_save": ["norm"]}),
    ],
    ids=["dora-single", "rslora-zero3", "lora-ddp"],
)
def test_an_adapter_loads_in_stock_peft_and_is_no_larger_than_itself(
    world: Path, tmp_path: Path, engine: str, adapter: dict[str, Any]
) -> None:
    spec = chatting(world, adapter, max_length=40)
    ended = run(spec, tmp_path, engine)
    output = tmp_path / "model"
    config = PeftConfig.from_pretrained(output)
    assert (config.use_dora, config.use_rslora) == (bool(adapter.get("use_dora")), bool(adapter.get("use_rslora")))
    model = AutoPeftModelForCausalLM.from_pretrained(output, is_trainable=True)
    metrics = result(ended).metrics
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(held_out_loss(model, spec), abs=1e-5)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_magnitude_vector" in name for name in trainable) == bool(adapter.get("use_dora"))
    assert any("modules_to_save" in name for name in trainable) == ("modules_to_save" in adapter)
    with safe_open(output / "adapter_model.safetensors", "pt") as saved:
        assert len(saved.keys()) == len(trainable)
    size = (output / "adapter_model.safetensors").stat().st_size
    assert size <= 1.1 * sum(p.numel() * p.element_size() for p in trainable.values())
    summary = result(ended).train
    assert summary is not None
    corpus = load_corpus(spec, load_tokenizer(spec.model, spec.data.chat_template))
    assert summary.dropped_rows == corpus.dropped


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_a_merged_adapter_is_a_plain_model(world: Path, tmp_path: Path, engine: str) -> None:
    spec = chatting(world, {"r": 4, "alpha": 32, "merge": True, "use_dora": engine == "single"})
    ended = run(spec, tmp_path, engine)
    output = tmp_path / "model"
    assert not list(output.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(output)
    metrics = result(ended).metrics
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(held_out_loss(model, spec), abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    assert abs(held_out_loss(base, spec) - metrics["loss"]) > 1e-2
    assert "library_name: transformers" in (output / "README.md").read_text()


def test_samples_without_held_out_data_are_refused(world: Path, tmp_path: Path) -> None:
    """Before the first step, with the field at fault."""
    spec = chatting(world, samples=1)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"split": None})})
    launched = start(a_contract(tmp_path, a_plan(spec, "single", 1, 4), spec))
    ended = launched.wait()
    error = ended[0].error
    assert error is not None, launched.logs()
    assert (ended[0].code, error.field) == (ExitCode.USER_ERROR, "train.samples"), launched.logs()


@dataclass(frozen=True)
class Adapted:
    losses: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapted(world: Path, request: pytest.FixtureRequest) -> tuple[TrainSpec, Adapted]:
    """A job with an adapter, and what a plain loop over stock peft makes of it: one process, the whole batch."""
    r, dora = 160, request.param == "dora"  # lora_A is above ZeRO-3's persistence threshold, lora_B of k_proj below
    spec = chatting(world, {"r": r, "use_dora": dora}, global_batch_size=7, max_length=40)
    rows = load_corpus(spec, load_tokenizer(spec.model, spec.data.chat_template)).train
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    config = LoraConfig("CAUSAL_LM", r=r, lora_alpha=16, target_modules="all-linear", use_dora=dora)
    model = get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            if "lora_A" in name:
                p.copy_(drawn(p.shape, name, 0, 0.02))
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], eps=1e-4)
    sampler, consumed, losses = sampler_for(rows, spec.train), 0, []
    for step in range(4):
        chosen = sampler.batch(consumed)
        consumed += len(chosen)
        batch = collate(rows, chosen, 1, causal=True)
        loss = answer_loss(model(**batch.inputs()).logits, batch) / rows.targets(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 4)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # As peft names them in its files.
    endings = re.compile(r"(?<=vector)\.default\.weight|\.default")
    saved = {endings.sub("", name): p.detach() for name, p in trained.items()}
    return spec, Adapted(losses, saved)


@pytest.mark.parametrize(
    ("engine", "micro_batch"), [("single", 7), ("ddp", 3), ("zero1", 2), ("zero2", 2), ("zero3", 3)]
)
def test_an_adapter_trains_as_in_a_plain_loop(
    adapted: tuple[TrainSpec, Adapted], tmp_path: Path, engine: str, micro_batch: int
) -> None:
    spec, reference = adapted
    ended = run(spec, tmp_path, engine, micro_batch)
    np.testing.assert_allclose(losses(ended), reference.losses, atol=1e-6)
    found = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert found.keys() == reference.weights.keys()
    worst = max(float((found[name] - weight).abs().max()) for name, weight in reference.weights.items())
    assert worst <= 1e-5
