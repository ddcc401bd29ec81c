"""Models of three shapes at sizes whose memory is worth measuring, rows that fill them, and one training of a few steps
in processes of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.config import Precision, load_train_spec
from launch.contract import Device, ExecutionPlan, ExitCode, RankResult
from launch.document import read_document
from tests.worlds import Launched, a_contract, start

Shape = Literal["bert", "gpt2", "llama"]
STEPS = 6

WORDS = {"bert": 8192, "gpt2": 16384, "llama": 32000}


@dataclass(frozen=True)
class Case:
    """One training."""

    shape: Shape
    length: int
    rows: int
    """Per forward pass of a rank."""
    engine: Literal["single", "ddp", "zero1", "zero2", "zero3"] = "single"
    precision: Precision = "fp32"
    checkpointing: bool = False
    loss: Literal["whole", "chunked"] = "chunked"
    offload: Literal["none", "optimizer", "all"] = "none"
    accumulation: int = 1
    allocator: Literal["fast", "tight"] = "tight"
    lora: bool = False
    dropout: float = 0.0
    copies: bool = False
    """Of the state, in shared memory."""
    hidden: int = 512
    layers: int = 8
    device: Device = "cpu"

    @property
    def model(self) -> str:
        return f"{self.shape}-{self.hidden}-{self.layers}"

    @property
    def world_size(self) -> int:
        """Two, on a CPU; there may be one GPU alone."""
        return 1 if self.engine == "single" or self.device == "cuda" else 2

    @property
    def name(self) -> str:
        parts = [self.shape, f"{self.rows}x{self.length}", self.engine, self.precision]
        parts += ["checkpointed"] * self.checkpointing + ["whole"] * (self.loss == "whole") + ["lora"] * self.lora
        parts += [f"offload-{self.offload}"] * (self.offload != "none") + [f"x{self.accumulation}"] * (
            self.accumulation > 1
        )
        return " ".join(parts + ["copies"] * self.copies + ["fast"] * (self.allocator == "fast"))


def word(number: int) -> str:
    """Four letters, which no tokenizer takes apart."""
    return "".join("abcdefghijklmnopqrst"[number // 20**place % 20] for place in range(4))


def write_model(shape: Shape, directory: Path, hidden: int = 512, layers: int = 8) -> Path:
    """Configuration, random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    size = WORDS[shape]
    tokenizer = Tokenizer(models.WordLevel({word(i): i for i in range(size)}, unk_token=word(1)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=word(0), unk_token=word(1), eos_token=word(2)
    ).save_pretrained(directory)
    torch.manual_seed(0)
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    model: Any
    if shape == "bert":
        model = BertModel(BertConfig(
            vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
            intermediate_size=4 * hidden, max_position_embeddings=512, pad_token_id=0,
        ))  # fmt: skip
    elif shape == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_embd=hidden, n_layer=layers, n_head=8, n_positions=1024, **ends
        ))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=11 * hidden // 4, max_position_embeddings=2048, tie_word_embeddings=False, **ends,
        ))  # fmt: skip
    model.save_pretrained(directory)
    return directory


def write_rows(shape: Shape, length: int, path: Path, rows: int = 256) -> Path:
    """Texts of `length` tokens, every second a little shorter: batches are padded, as real ones may be."""
    draw = random.Random(length)
    lines = ["text\tlabel"]
    for row in range(rows):
        words = " ".join(word(draw.randrange(3, WORDS[shape])) for _ in range(length - 3 * (row % 2)))
        lines.append(f"{words}\t{'ab'[row // 2 % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_job(case: Case, folder: Path, *, planned: bool = False) -> Path:
    """The job file of `case`; models and data are shared by cases. If it is to be `planned`, the planner is free."""
    model, data = folder / f"model-{case.model}", folder / f"{case.shape}-{case.length}.tsv"
    if not model.exists():
        write_model(case.shape, model, case.hidden, case.layers)
    if not data.exists():
        write_rows(case.shape, case.length, data)
    job: dict[str, Any] = {
        "name": "memory",
        "strategy": case.engine,
        "model": {
            "name_or_path": str(model),
            "task": "sequence-classification" if case.shape == "bert" else "causal-lm",
            "dropout": case.dropout,
        },
        "data": {"train": str(data), "max_length": case.length},
        "train": {
            "max_steps": STEPS,
            "group_by_length": False,  # rows of both lengths in a batch
            "global_batch_size": case.rows * case.world_size * case.accumulation,
            "micro_batch_size": case.rows,
            "precision": case.precision,
            "activation_checkpointing": case.checkpointing,
            "loss_mode": case.loss,
        },
    }
    if case.shape == "bert":
        del job["train"]["loss_mode"]
    if case.engine.startswith("zero"):
        job["offload"] = case.offload
    if case.lora:
        job["adapter"] = {"r": 16}
    if case.copies:
        job["checkpoint"] = {"every_steps": None, "memory_every_steps": 1}
    if planned:
        job["strategy"] = "auto"
        job["resources"] = {"num_processes": case.world_size}
        job["train"]["max_steps"] = 2
        for choice in ("micro_batch_size", "loss_mode", "activation_checkpointing"):
            job["train"].pop(choice, None)
    path = folder / f"{'planned' if planned else 'job'}-{abs(hash(case))}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def plan_of(case: Case) -> ExecutionPlan:
    return ExecutionPlan(
        engine=case.engine, world_size=case.world_size, device=case.device, micro_batch_size=case.rows,
        gradient_accumulation_steps=case.accumulation, precision=case.precision, offload=case.offload,
        activation_checkpointing=case.checkpointing, loss=case.loss, allocator=case.allocator,
    )  # fmt: skip


def begun(case: Case, folder: Path) -> Launched:
    """A training in fresh processes."""
    job = write_job(case, folder)
    run_dir = folder / f"run-{job.stem}"
    return start(a_contract(run_dir, plan_of(case), load_train_spec(read_document(job))), cold=True)


def results(case: Case, launched: Launched) -> list[RankResult]:
    """What each rank reports of itself, once all have ended."""
    ends = launched.wait(300)
    found = [ends[rank].result for rank in sorted(ends) if ends[rank].code == ExitCode.DONE]
    if len(found) != case.world_size:
        raise RuntimeError(f"{case.name} failed\n{launched.logs()}")
    return [result for result in found if result is not None]


def measured(case: Case, folder: Path) -> list[RankResult]:
    """What each rank of a training in fresh processes reports of itself."""
    return results(case, begun(case, folder))
