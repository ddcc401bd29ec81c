"""A LoRA adapter for SmolLM2 on ChatterBot's dialogues: Tuneyard's loop beside TRL's SFTTrainer.

    python -m benchmarks.train_trl [--steps 24] [--seeds 3]

Same model in fp32 under bf16 autocast, same rows, template and split (by unique answer), adapter, batch of 8 rows in
random order (no grouping by length: that is faster, but another training), AdamW, cosine schedule, cores; each run in a
process of its own. TRL learns completions alone, as it does by default with
prompts and completions, and its gradient checkpointing, on by default, is off. Samples/s are over the training loop,
from the end of the first step to the end of the last. The answer loss is measured by one and the same function, in
fp32, on the saved adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training import ours, speed
from launch.config import TrainSpec, load_train_spec
from launch.document import read_document

EXAMPLE = Path(__file__).resolve().parents[1] / "configs" / "jobs" / "smollm2-chat.yaml"
BATCH = 8
LIMIT = 1.3


def overrides(steps: int, seed: int) -> list[str]:
    return [
        "strategy=single", "resources.num_processes=1", "train.precision=bf16", f"train.max_steps={steps}",
        "train.eval_every=null", "train.early_stopping=null", "train.samples=0", f"train.seed={seed}",
        "train.group_by_length=false", "train.weight_decay=0.0",
        f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}",
    ]  # fmt: skip


def job(steps: int, seed: int) -> TrainSpec:
    return load_train_spec(read_document(EXAMPLE, overrides(steps, seed)))


def sft(steps: int, seed: int, output: Path) -> float:
    """Train by TRL in this process and save the adapter. Returns samples a second."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from launch.header import columns_of
    from launch.model import load_tokenizer
    from launch.parts import split_parts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = job(steps, seed)
    assert spec.adapter is not None
    part = split_parts(spec.data, columns_of(spec), classes=False)["train"]
    assert spec.data.prompt_column
    assert spec.data.response_column
    rows = [
        {"prompt": [{"role": "user", "content": ask}], "completion": [{"role": "assistant", "content": answer}]}
        for ask, answer in zip(part[spec.data.prompt_column], part[spec.data.response_column], strict=True)
    ]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

    optim = spec.train
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec.model.name_or_path, dtype=torch.float32),
        processing_class=load_tokenizer(spec.model),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec.adapter.r, lora_alpha=int(spec.adapter.alpha), target_modules="all-linear"
        ),
        args=SFTConfig(
            output_dir=str(output), max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, bf16=True,
            learning_rate=optim.learning_rate, lr_scheduler_type=optim.schedule, warmup_steps=optim.warmup_steps,
            max_length=spec.data.max_length, seed=seed, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(output))
    return speed([marks], BATCH)


def answer_loss(adapter: Path) -> float:
    """Mean cross-entropy of the held-out answers' tokens, in fp32."""
    import numpy as np
    import torch
    from peft import AutoPeftModelForCausalLM

    from launch.data import collate, load_corpus
    from launch.model import load_tokenizer

    spec = job(1, 0)
    tokenizer = load_tokenizer(spec.model)
    rows = load_corpus(spec, tokenizer).test
    assert rows is not None
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            chosen = np.arange(start, min(start + 16, len(rows)))
            batch = collate(rows, chosen, int(tokenizer.pad_token_id), causal=True)
            logits = model(**batch.inputs()).logits[:, :-1]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten(), reduction="sum")
            )
    return total / rows.targets(np.arange(len(rows)))


def in_a_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.train_trl", *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads(told.stdout.strip().splitlines()[-1])


def compared(steps: int, seeds: int) -> dict[str, Any]:
    """vs_trl_ratio: the median over seeds of the ratio of speeds; and the answer losses with their spread."""
    rates: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        for seed in range(seeds):
            here = folder / f"ours-{seed}"
            rates["ours"].append(speed([ours(EXAMPLE, folder, here.name, overrides(steps, seed)).marks], BATCH))
            losses["ours"].append(in_a_process("--measure", str(folder / "runs" / here.name / "model")))
            there = folder / f"trl-{seed}"
            rates["trl"].append(in_a_process("--steps", str(steps), "--sft", str(there), "--seed", str(seed)))
            losses["trl"].append(in_a_process("--measure", str(there)))
            for who in ("ours", "trl"):
                print(
                    f"{who:<5} seed {seed} {rates[who][-1]:6.2f} samples/s, loss {losses[who][-1]:.4f}", file=sys.stderr
                )
    gap = statistics.mean(losses["ours"]) - statistics.mean(losses["trl"])
    # The standard error of a difference of two means: what two such sets of runs differ by for no reason.
    noise = (sum(statistics.variance(losses[who]) / seeds for who in losses)) ** 0.5 if seeds > 1 else 0.0
    return {
        "vs_trl_ratio": round(statistics.median(a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)), 2),
        "answer_loss": {who: [round(loss, 4) for loss in found] for who, found in losses.items()},
        "answer_loss_gap": round(gap, 4),
        "answer_loss_noise": round(noise, 4),
        "answer_loss_equal": abs(gap) <= 2 * noise,
        "causal_samples_per_s": {who: [round(rate, 2) for rate in found] for who, found in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sft:
        print(json.dumps(sft(options.steps, options.seed, options.sft)))
    elif options.measure:
        print(json.dumps(answer_loss(options.measure)))
    else:
        figures = compared(options.steps, options.seeds)
        figures["within_limits"] = figures["vs_trl_ratio"] >= LIMIT and figures["answer_loss_equal"]
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
