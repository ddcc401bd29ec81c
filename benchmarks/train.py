"""Fine-tuning MiniLM on SMS Spam on this CPU: Tuneyard's loop beside the textbook's and transformers' Trainer.

    python -m benchmarks.train [--steps 150] [--scaling-steps 40] [--repeats 2] [--seeds 3] [--without-trl]

Same model, rows, split, steps, batch of 16, learning rate, seed and cores for all; each in a process of its own. The
textbook loop pads every row to 128 tokens, in fp32, with AdamW as it comes and no clipping of gradients, so nobody
clips; the Trainer runs with its defaults beside that (pads to the longest row of a batch, fp32) and with bf16; Tuneyard
trains the part of the vocabulary that the data use, and stands against textbook and default in what this processor
multiplies fastest: bf16, where it has instructions for it, else int8, where it has those, else fp32; beside that in
what `precision: auto` takes, which is never int8. Samples/s are over the training loop alone, from the end of the first
step to the end of the last; macro-F1 is over the same test rows, and the mean of `--seeds` trainings, for one
differs from the next by as much as it may be lower. Then, at a global batch of 64, two processes (DDP, ZeRO-2) beside
one process that uses both cores. Last, a LoRA adapter beside TRL (benchmarks/train_trl.py).

A shared machine slows any run for some seconds at a time. So all of them run `--repeats` times, in turn, each repeat
the same steps on the same rows, and a step takes what it took in its fastest repeat: the same rule for everybody.
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
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.training import Run, ours, speed
from launch.config import load_train_spec
from launch.document import read_document
from launch.instructions import multiplies_bf16, multiplies_int8

EXAMPLE = Path(__file__).resolve().parents[1] / "configs" / "jobs" / "sms-spam.yaml"
PADDED = 128
BATCH = 16
LIMITS = {
    "vs_textbook_ratio": 8.0,
    "vs_trainer_default_ratio": 4.0,
    "vs_trainer_fp32_ratio": 1.7,
    "vs_trainer_bf16_ratio": 2.0,
    "ddp_scaling_ratio": 0.9,
    "zero2_scaling_ratio": 0.65,
}
F1_TOLERANCE = 0.01


def overrides(steps: int, precision: str, seed: int = 0) -> list[str]:
    return [
        "strategy=single", f"train.seed={seed}", f"train.precision={precision}", f"train.max_steps={steps}",
        "train.eval_every=null",
        f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", f"data.max_length={PADDED}",
        "train.max_grad_norm=null", "model.vocabulary=used",
    ]  # fmt: skip


def peer(name: str, steps: int, seed: int) -> Run:
    """Train by a peer's loop, in this process."""
    import numpy as np
    import torch
    from sklearn.metrics import f1_score

    from launch.data import Rows, load_corpus
    from launch.model import load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = load_train_spec(read_document(EXAMPLE, overrides(steps, "fp32", seed)))
    tokenizer = load_tokenizer(spec.model)
    corpus = load_corpus(spec, tokenizer)
    assert corpus.test is not None

    def examples(rows: Rows) -> list[dict[str, Any]]:
        assert rows.labels is not None
        return [
            {"input_ids": rows.tokens[start:end].tolist(), "labels": int(label)}
            for (start, end), label in zip(pairwise(rows.offsets), rows.labels, strict=True)
        ]

    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

    set_seed(spec.train.seed)
    model = AutoModelForSequenceClassification.from_pretrained(spec.model.name_or_path, num_labels=len(corpus.labels))
    train: Any = examples(corpus.train)
    test = examples(corpus.test)
    collate = DataCollatorWithPadding(tokenizer)
    marks: list[float] = []
    if name == "textbook":
        pad = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=PADDED)
        loader: Any = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True, collate_fn=pad)
        optimizer = torch.optim.AdamW(model.parameters(), lr=spec.train.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        model.train()
        while len(marks) < steps:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                marks.append(time.monotonic())
                if len(marks) == steps:
                    break
    else:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                marks.append(time.monotonic())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True,
                learning_rate=spec.train.learning_rate, seed=spec.train.seed, bf16=name == "trainer-bf16",
                max_grad_norm=0.0, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            Trainer(
                model=model,
                args=arguments,
                train_dataset=train,
                data_collator=collate,
                callbacks=[Clock()],
            ).train()
    model.eval()
    predicted: list[int] = []
    with torch.no_grad():
        for start in range(0, len(test), 64):
            batch = collate([{"input_ids": one["input_ids"]} for one in test[start : start + 64]])
            predicted += model(**batch).logits.argmax(-1).tolist()
    f1 = float(f1_score(np.array(corpus.test.labels), predicted, average="macro"))
    return Run(marks, f1)


def peer_in_a_process(name: str, steps: int, seed: int) -> Run:
    command = [sys.executable, "-m", "benchmarks.train", "--peer", name, "--steps", str(steps), "--seed", str(seed)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    told = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if told.returncode:
        raise RuntimeError(f"{name} ended with {told.returncode}\n{told.stderr[-4000:]}")
    return Run(*json.loads(told.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--scaling-steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="trainings whose macro-F1 are averaged")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without-trl", action="store_true", help="leave the causal language model out")
    parser.add_argument("--peer", choices=("textbook", "trainer", "trainer-bf16"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(peer(options.peer, options.steps, options.seed)))
        return
    runs: dict[str, list[Run]] = {}
    at_64 = [
        "train.precision=fp32", f"train.max_steps={options.scaling_steps}", "train.eval_every=null",
        "train.global_batch_size=64", "model.vocabulary=used",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)

        def gang(name: str, engine: str, processes: int) -> Run:
            sets = [*at_64, f"strategy={engine}", f"train.micro_batch_size={64 // processes}"]
            return ours(EXAMPLE, folder, name, sets, processes)

        def alone(precision: str, seed: int) -> Run:
            name = f"ours-{precision}-{seed}"
            return ours(EXAMPLE, folder, name, overrides(options.steps, precision, seed))

        contenders: dict[str, Callable[[int], Run]] = {
            "ours-bf16": lambda seed: alone("bf16", seed),
            **({"ours-int8": lambda seed: alone("int8", seed)} if multiplies_int8() else {}),
            "trainer": lambda seed: peer_in_a_process("trainer", options.steps, seed),
            "ours-fp32": lambda seed: alone("fp32", seed),
            "trainer-bf16": lambda seed: peer_in_a_process("trainer-bf16", options.steps, seed),
            "textbook": lambda seed: peer_in_a_process("textbook", options.steps, seed),
        }
        gangs: dict[str, Callable[[int], Run]] = {
            "one-64": lambda _: gang("one-64", "single", 1),
            "ddp-64": lambda _: gang("ddp-64", "ddp", 2),
            "zero2-64": lambda _: gang("zero2-64", "zero2", 2),
        }

        def told(name: str, run: Run) -> Run:
            rate = speed([run.marks], 64 if name in gangs else BATCH)
            print(f"{name:<14} {rate:7.1f} samples/s  macro-F1 {run.f1_macro:.4f}", file=sys.stderr)
            return run

        for _ in range(options.repeats):
            for name, train in (contenders | gangs).items():
                runs.setdefault(name, []).append(told(name, train(0)))
        by_seed = {name: [runs[name][0].f1_macro] for name in contenders}
        for seed in range(1, options.seeds):
            for name, train in contenders.items():
                by_seed[name].append(told(name, train(seed)).f1_macro)
    rate = {
        name: speed([run.marks for run in found], 64 if name.endswith("-64") else BATCH) for name, found in runs.items()
    }
    f1 = {name: statistics.mean(found) for name, found in by_seed.items()}
    auto = "ours-bf16" if multiplies_bf16() else "ours-fp32"
    fastest = auto if multiplies_bf16() or not multiplies_int8() else "ours-int8"
    figures: dict[str, Any] = {
        "vs_textbook_ratio": rate[fastest] / rate["textbook"],
        "vs_trainer_default_ratio": rate[fastest] / rate["trainer"],
        "auto_vs_textbook_ratio": rate[auto] / rate["textbook"],
        "auto_vs_trainer_default_ratio": rate[auto] / rate["trainer"],
        "vs_trainer_fp32_ratio": rate["ours-fp32"] / rate["trainer"],
        "vs_trainer_bf16_ratio": rate["ours-bf16"] / rate["trainer-bf16"],
        "ddp_scaling_ratio": rate["ddp-64"] / rate["one-64"],
        "zero2_scaling_ratio": rate["zero2-64"] / rate["one-64"],
    }
    figures = {name: round(value, 2) for name, value in figures.items()}
    peers = max(f1["textbook"], f1["trainer"], f1["trainer-bf16"])
    figures["fastest"], figures["auto"] = fastest, auto
    figures["f1_macro"] = {name: round(value, 4) for name, value in f1.items()}
    figures["f1_macro_by_seed"] = {name: [round(one, 4) for one in found] for name, found in by_seed.items()}
    figures["samples_per_s"] = {name: round(value, 1) for name, value in rate.items()}
    figures["f1_no_lower"] = min(found for name, found in f1.items() if name.startswith("ours")) >= peers - F1_TOLERANCE
    limits = dict(LIMITS)
    good = bool(figures["f1_no_lower"])
    if not options.without_trl:
        from benchmarks.train_trl import LIMIT, compared

        figures |= compared(steps=24, seeds=3)
        limits["vs_trl_ratio"] = LIMIT
        good = good and figures["answer_loss_equal"]
    figures["limits"] = limits
    figures["within_limits"] = good and all(figures[name] >= limit for name, limit in limits.items())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
