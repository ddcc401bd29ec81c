"""What people get wrong first: every fault is refused through the real command, named, placed, and given a way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main

HERE = "# HERE"  # marks the line that the error must name

TRAINING = """\
name: spam
model:
  name_or_path: models/tiny
  task: sequence-classification
data:
  train: data.tsv
train:
  max_steps: 10
"""
COMMAND = """\
name: job
run: [python, script.py]
"""
BOMB = "a: &a [1,2,3,4,5,6,7,8,9]\n" + "\n".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


@dataclass(frozen=True)
class Bad:
    """One fault, and what is said of it."""

    name: str
    text: str | bytes
    code: str
    field: str | None = None
    hint: str = ""
    overrides: tuple[str, ...] = ()
    files: tuple[tuple[str, str | bytes], ...] = ()
    path: str = "job.yaml"
    line: int | None = None
    message: str = ""

    @property
    def expected_line(self) -> int | None:
        if isinstance(self.text, str) and HERE in self.text:
            return 1 + self.text[: self.text.index(HERE)].count("\n")
        return self.line


def training(*changes: tuple[str, str], more: str = "") -> str:
    """The training job with `changes` (old, new) and `more` at its end."""
    text = TRAINING
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text + more


def in_train(line: str) -> str:
    return training(more=f"  {line} {HERE}\n")


def at_top(line: str) -> str:
    return training(more=f"{line} {HERE}\n")


def command(line: str) -> str:
    return f"{COMMAND}{line} {HERE}\n"


def with_data(lines: str) -> str:
    return training(("data.tsv", f"data.tsv\n  {lines}"))


def data(source: str) -> str:
    return training(("train: data.tsv", f"train: {source} {HERE}"))


KEYS = [
    Bad("unknown-key", at_top("colour: red"), "unknown-key", "colour", "the keys here are: adapter, after, array"),
    Bad("unknown-key-nested", in_train("colour: red"), "unknown-key", "train.colour", "adam_beta1, adam_beta2"),
    Bad("near-miss", in_train("learning_rat: 1"), "unknown-key", "train.learning_rat", "mean `learning_rate`?"),
    Bad("foreign-name", in_train("num_train_epochs: 1"), "unknown-key", "train.num_train_epochs", "mean `epochs`?"),
    Bad("wrong-section", at_top("learning_rate: 1"), "unknown-key", "learning_rate", "mean `train.learning_rate`?"),
    Bad("foreign-elsewhere", at_top("lr: 0.1"), "unknown-key", "lr", "mean `train.learning_rate`?"),
    Bad("unknown-key-of-a-command", command("priorty: low"), "unknown-key", "priorty", "mean `priority`?"),
    Bad("merge-key", training(("  max_steps", f"  <<: {{seed: 1}} {HERE}\n  max_steps")),
        "unknown-key", "train.<<", "merge key is not read"),
    Bad("unknown-key-in-env", command("env: {A: {from: B}}"), "unknown-key", "env.A.from", "mean `from_env`?"),
    Bad("missing-key", training(("  task: sequence-classification\n", ""), ("model:", f"model: {HERE}")),
        "missing-key", "model.task", "add `task:`"),
    Bad("missing-section", training(("data:\n  train: data.tsv\n", ""), ("name: spam", f"name: spam {HERE}")),
        "missing-key", "data", "add `data:` with keys of: chat_template"),
    Bad("empty-section", training(("train:\n  max_steps: 10", f"train: {HERE}")),
        "wrong-type", "train", "its keys, indented below it: activation_checkpointing", message="is empty"),
    Bad("text-for-a-section", training(("train:\n  max_steps: 10", f"train: fast {HERE}")),
        "wrong-type", "train", "its keys", message='is "fast"; it must be a section'),
]  # fmt: skip

VALUES = [
    Bad("no-id-to-come-after", at_top("after: [spam-x1y2z, Spam]"), "bad-name", "after[1]", "`tuneyard submit`"),
    Bad("after-twice", at_top("after: [spam-x1y2z, spam-x1y2z]"), "duplicate-value", "after[1]", "name it once"),
    Bad("array-for-one-job", at_top("array: 3"), "is-array", "array", "--set array=null"),
    Bad("no-array", at_top("array: three"), "wrong-type", "array", "a whole number, or a section of names and values"),
    Bad("bound-without-an-array", at_top("array_at_once: 3"), "inconsistent", "array_at_once", "add `array`"),
    Bad("place-in-an-array", at_top("array_of: {id: a, index: 0}"), "reserved-name", "array_of", "write `array`"),
    Bad("text-for-a-number", training(("max_steps: 10", f"max_steps: ten {HERE}")),
        "wrong-type", "train.max_steps", "write a whole number", message='is "ten"'),
    Bad("fraction-for-a-whole-number", training(("max_steps: 10", f"max_steps: 1.5 {HERE}")),
        "wrong-type", "train.max_steps", "write a whole number"),
    Bad("number-for-text", training(("name: spam", f"name: 7 {HERE}")), "wrong-type", "name", 'in quotes: "7"'),
    Bad("text-for-a-switch", in_train("activation_checkpointing: sure"),
        "wrong-type", "train.activation_checkpointing", "write true or false"),
    Bad("yes-is-text", in_train("activation_checkpointing: yes"),
        "wrong-type", "train.activation_checkpointing", "write true or false"),
    Bad("text-for-a-list", at_top("trackers: tensorboard"), "wrong-type", "trackers", "in brackets: [tensorboard]"),
    Bad("item-of-a-list", at_top("trackers: [tensorbord]"), "unknown-value", "trackers[0]", "mean `tensorboard`?"),
    Bad("text-for-auto-or-a-list", at_top("adapter: {target_modules: q_proj}"),
        "wrong-type", "adapter.target_modules", "in brackets: [q_proj]", message="one of: auto, all-linear or a list"),
    Bad("unknown-value", at_top("strategy: zero4"), "unknown-value", "strategy", "did you mean `zero"),
    Bad("unknown-task", training(("task: sequence-classification", f"task: classification {HERE}")),
        "unknown-value", "model.task", "mean `sequence-classification`?"),
    Bad("too-small", training(("max_steps: 10", f"max_steps: 0 {HERE}")),
        "out-of-range", "train.max_steps", "at least 1", message="is 0; it must be at least 1"),
    Bad("not-positive", in_train("learning_rate: 0.0"), "out-of-range", "train.learning_rate", "above 0"),
    Bad("too-large", in_train("adam_beta1: 1.0"), "out-of-range", "train.adam_beta1", "below 1"),
    Bad("empty-text", training(("models/tiny", f'"" {HERE}')), "out-of-range", "model.name_or_path", "give at least"),
    Bad("no-data-files", training(("data.tsv", f"[] {HERE}")), "out-of-range", "data.train", "give at least one"),
    Bad("not-a-number", in_train("learning_rate: .nan"), "wrong-type", "train.learning_rate", "a finite number"),
    Bad("infinite", in_train("learning_rate: .inf"), "wrong-type", "train.learning_rate", "a finite number"),
    Bad("overflowing", in_train("learning_rate: 1e999"), "wrong-type", "train.learning_rate", "a finite number"),
    Bad("endless-digits", in_train(f"seed: {'1' * 5000}"), "out-of-range", "train.seed", "a smaller number"),
    Bad("many-digits", in_train(f"seed: {'1' * 40}"), "out-of-range", "train.seed", "below 4294967296"),
    Bad("no-text", training(("models/tiny", f'"a\\0b" {HERE}')), "not-text", "model.name_or_path", "remove the escape"),
    Bad("half-a-character", training(("models/tiny", f'"a\\ud800b" {HERE}')),
        "not-text", "model.name_or_path", "remove the escape"),
    Bad("bad-duration", at_top("max_duration: two hours"), "bad-duration", "max_duration", "30m, 2h or 1d"),
    Bad("negative-duration", at_top("max_duration: -5"), "out-of-range", "max_duration", "above 0"),
    Bad("bad-priority", at_top("priority: hihg"), "unknown-value", "priority", "did you mean `high`?"),
    Bad("priority-out-of-range", at_top("priority: 5000"), "out-of-range", "priority", "at most 1000"),
    Bad("bad-name", training(("name: spam", f"name: My Job {HERE}")), "bad-name", "name", "did you mean `my-job`?"),
    Bad("traversing-name", training(("name: spam", f"name: ../../etc {HERE}")), "bad-name", "name", "`etc`?"),
    Bad("name-with-a-newline", training(("name: spam", f'name: "spam\\n" {HERE}')), "bad-name", "name", "`spam`?"),
    Bad("traversing-queue", at_top("queue: ../other"), "bad-name", "queue", "lower-case letters"),
    Bad("bad-accelerator", at_top("resources: {accelerator: '../x'}"),
        "bad-name", "resources.accelerator", "GPU type such as H100"),
    Bad("bounds-upside-down", at_top('resources: {num_processes: "8..2"}'),
        "out-of-range", "resources.num_processes", "ascending order such as 2..8"),
    Bad("no-processes", at_top("resources: {num_processes: 0}"),
        "out-of-range", "resources.num_processes", "at least 1"),
    Bad("processes-as-a-list", at_top("resources: {num_processes: [2]}"),
        "wrong-type", "resources.num_processes", "at least 1"),
    Bad("secret-by-value", command("env: {HF_TOKEN: hf_abc}"),
        "secret-by-value", "env.HF_TOKEN", "write `HF_TOKEN: {from_env: HF_TOKEN}`"),
    Bad("the-yards-own-variable", command("env: {TUNEYARD_HOME: /x}"),
        "reserved-name", "env.TUNEYARD_HOME", "another name"),
    Bad("number-in-env", command("env: {THREADS: 4}"), "wrong-type", "env.THREADS", 'in quotes: "4"'),
    Bad("bad-variable-name", command("env: {A-B: x}"), "bad-name", "env.A-B", "letters, digits and underscores"),
]  # fmt: skip

TOGETHER = [
    Bad("run-and-model", TRAINING + f"run: [python] {HERE}\n", "run-and-model", "run", "remove `run`"),
    Bad("neither", f"name: idle {HERE}\n", "nothing-to-do", None, "tuneyard init"),
    Bad("two-validations", with_data(f"validation: data.tsv\n  split: {{validation: 0.1}} {HERE}"),
        "inconsistent", "data.split.validation", "keep one of the two"),
    Bad("split-leaves-nothing", with_data(f"split:\n    test: 0.6 {HERE}\n    validation: 0.5"),
        "inconsistent", "data.split.test", "sum below 1"),
    Bad("steps-and-epochs", in_train("epochs: 3"), "inconsistent", "train.epochs", "keep one"),
    Bad("neither-steps-nor-epochs", training(("train:\n  max_steps: 10", f"train: {HERE}\n  seed: 1")),
        "inconsistent", "train", "such as `epochs: 3`"),
    Bad("early-stopping-without-evaluations", in_train("early_stopping: {patience: 1}"),
        "inconsistent", "train.early_stopping", "add `eval_every:`"),
    Bad("metric-of-another-task", in_train("eval_every: 1\n  early_stopping: {metric: perplexity}"),
        "unknown-value", "train.early_stopping.metric", "loss, accuracy, f1_macro, mcc"),
    Bad("best-without-evaluations", in_train("keep_best: true"),
        "inconsistent", "train.keep_best", "add `eval_every:`"),
    Bad("two-warm-ups", in_train("warmup_steps: 3\n  warmup_ratio: 0.1"),
        "inconsistent", "train.warmup_ratio", "keep one of the two"),
    Bad("two-decays", in_train("schedule: wsd\n  decay_steps: 3\n  decay_ratio: 0.1"),
        "inconsistent", "train.decay_ratio", "keep one of the two"),
    Bad("decay-of-another-schedule", in_train("decay_steps: 3"),
        "inconsistent", "train.decay_steps", "schedule: wsd"),
    Bad("adafactor-sharded", training(more=f"  optimizer: adafactor {HERE}\nstrategy: zero2\n"),
        "inconsistent", "train.optimizer", "`strategy: ddp`"),
    Bad("8-bit-sharded", training(more=f"  optimizer: adamw-8bit {HERE}\nstrategy: zero3\n"),
        "inconsistent", "train.optimizer", "`strategy: ddp`"),
    Bad("freeze-under-an-adapter", training(more=f"  freeze: '*' {HERE}\nadapter: {{}}\n"),
        "inconsistent", "train.freeze", "remove `freeze`"),
    Bad("part-of-a-vocabulary-under-an-adapter",
        training(("classification", f"classification\n  vocabulary: used {HERE}"), more="adapter: {}\n"),
        "inconsistent", "model.vocabulary", "take `whole`", message="an adapter leaves them"),
    Bad("part-of-a-vocabulary-for-logits",
        training(("sequence-classification", f"causal-lm\n  vocabulary: used {HERE}")),
        "inconsistent", "model.vocabulary", "take `whole`", message="needs all rows for its logits"),
    Bad("prompt-without-response", training(("data.tsv", f"data.tsv\n  prompt_column: a {HERE}")),
        "inconsistent", "data.prompt_column", "add `response_column`"),
    Bad("messages-and-prompt", training(("data.tsv",
        f"data.tsv\n  prompt_column: a\n  response_column: b\n  messages_column: c {HERE}")),
        "inconsistent", "data.messages_column", "keep `messages_column`"),
    Bad("chat-template-for-no-dialogue", training(("data.tsv", f"data.tsv\n  chat_template: a {HERE}")),
        "inconsistent", "data.chat_template", "add `messages_column`"),
    Bad("messages-for-classes", training(("data.tsv", f"data.tsv\n  messages_column: a {HERE}")),
        "inconsistent", "data.messages_column", "`task: causal-lm`"),
    Bad("packing-for-classes", training(("data.tsv", f"data.tsv\n  packing: true {HERE}")),
        "inconsistent", "data.packing", "`task: causal-lm`"),
    Bad("samples-of-classes", in_train("samples: 2"), "inconsistent", "train.samples", "`task: causal-lm`"),
    Bad("stratified-groups", with_data(f"split:\n    test: 0.2\n    stratify: true\n    group_column: text {HERE}"),
        "inconsistent", "data.split.group_column", "keep one"),
    Bad("offload-without-zero", training(more=f"strategy: ddp\noffload: optimizer {HERE}\n"),
        "inconsistent", "offload", "strategy: zero2"),
    Bad("offload-all-with-zero2", training(more=f"strategy: zero2\noffload: all {HERE}\n"),
        "inconsistent", "offload", "`strategy: zero3`"),
    Bad("offload-path-without-zero3", training(more=f"strategy: zero2\noffload_path: /disk {HERE}\n"),
        "inconsistent", "offload_path", "`strategy: zero3`"),
    Bad("offload-path-for-nothing", training(more=f"strategy: zero3\noffload: none\noffload_path: /disk {HERE}\n"),
        "inconsistent", "offload_path", "`offload: optimizer`"),
    Bad("offload-path-not-absolute", training(more=f"strategy: zero3\noffload: all\noffload_path: disk {HERE}\n"),
        "invalid-value", "offload_path", "the whole path"),
    Bad("best-of-weights-on-a-disk", training(
        more=f"  eval_every: 1\n  keep_best: true {HERE}\nstrategy: zero3\noffload: all\noffload_path: /disk\n"),
        "inconsistent", "train.keep_best", "`offload: optimizer`"),
    Bad("single-with-two", training(more=f"strategy: single\nresources:\n  num_processes: 2 {HERE}\n"),
        "inconsistent", "resources.num_processes", "ask for 1"),
    Bad("more-processes-than-rows", in_train("global_batch_size: 2\nresources: {num_processes: 4}"),
        "inconsistent", "resources.num_processes", "at most 2 processes"),
    Bad("fp16-on-cpu", training(more=f"  precision: fp16 {HERE}\nresources: {{accelerator: cpu}}\n"),
        "inconsistent", "train.precision", "bf16 or fp32"),
    Bad("int8-on-a-gpu", training(more=f"  precision: int8 {HERE}\nresources: {{accelerator: A100}}\n"),
        "inconsistent", "train.precision", "accelerator: cpu"),
    Bad("impossible-gang", COMMAND + f"resources:\n  num_processes: 64 {HERE}\n",
        "impossible-gang", "resources.num_processes", "ask for at most 4 processes"),
    Bad("no-such-gpu", COMMAND + f"resources:\n  accelerator: H100000 {HERE}\n",
        "impossible-gang", "resources.accelerator", "another accelerator"),
]  # fmt: skip

FILES = [
    Bad("empty-file", "", "not-a-mapping", None, "tuneyard init", line=1, message="empty"),
    Bad("comments-alone", "# nothing\n", "not-a-mapping", None, "tuneyard init", line=1),
    Bad("a-list", f"\n- name: x {HERE}\n", "not-a-mapping", None, "`key: value`", message="this is a list"),
    Bad("a-word", "hello\n", "not-a-mapping", None, "`key: value`", line=1, message="this is a single value"),
    Bad("tab", "name: x\ntrain:\n\tmax_steps: 1\n", "invalid-yaml", None, "spaces, not tabs", line=3),
    Bad("open-bracket", "name: x\nrun: [python\n", "invalid-yaml", None, "brackets", line=3),
    Bad("two-documents", "name: x\n---\nname: y\n", "invalid-yaml", None, "", line=2),
    Bad("unknown-alias", f"name: x\nrun: *missing {HERE}\n", "invalid-yaml"),
    Bad("control-character", "name: x\x01\n", "invalid-yaml", None, "YAML file"),
    Bad("duplicate-key", COMMAND + f"name: other {HERE}\n", "duplicate-key", "name", "the other is on line 1"),
    Bad("list-as-key", f"[a, b]: 1 {HERE}\n", "invalid-yaml", None, "quote keys"),
    Bad("alias-bomb", COMMAND + BOMB, "alias-bomb", "e", "remove the YAML aliases", line=7),
    Bad("recursive-alias", f"name: x\nrun: &r {HERE}\n  - *r\n", "recursive-alias", "run", "remove the alias"),
    Bad("deep", COMMAND + f"env: {'[' * 60}{']' * 60} {HERE}\n", "too-deep", "env", "never closed"),
    Bad("very-deep", COMMAND + f"env: {'[' * 20_000}\n", "too-deep", None, "never closed"),
    Bad("latin-1", "name: caf\xe9\n".encode("latin-1"), "not-text", None, "save the file as UTF-8"),
    Bad("too-much", "#" * (1 << 20) + "\nname: x\n", "file-too-large", None, "the data instead"),
    Bad("absent", COMMAND, "file-not-found", None, "did you mean", path="jub.yaml"),
    Bad("a-directory", COMMAND, "file-not-found", None, "job.yaml", path="."),
    Bad("a-pipe", COMMAND, "file-not-found", None, "save the job in a file", path="pipe"),
]  # fmt: skip

NAMED = [
    Bad("absent-model", training(("models/tiny", f"models/tyni {HERE}")),
        "file-not-found", "model.name_or_path", "models/tiny?"),
    Bad("absent-model-elsewhere", training(("models/tiny", f"./nowhere/tiny {HERE}")),
        "file-not-found", "model.name_or_path", "there is no directory"),
    Bad("model-of-an-unknown-user", training(("models/tiny", f"~nobody-here/x/y {HERE}")),
        "file-not-found", "model.name_or_path", "there is no directory"),
    Bad("model-with-an-endless-name", training(("models/tiny", f"./{'m' * 300} {HERE}")),
        "file-not-found", "model.name_or_path", "paths are relative"),
    Bad("not-a-model", training(("models/tiny", f"models {HERE}")),
        "not-a-model", "model.name_or_path", "models/tiny?"),
    Bad("broken-config", training(("models/tiny", f"models/broken {HERE}")), "not-a-model", "model.name_or_path",
        "save_pretrained", files=(("models/broken/config.json", "{"),)),
    Bad("no-weights", training(("models/tiny", f"models/empty {HERE}")), "not-a-model", "model.name_or_path",
        "model.safetensors", files=(("models/empty/config.json", '{"model_type": "bert"}'),)),
    Bad("absent-data", data("dat.tsv"), "file-not-found", "data.train", "data.tsv?"),
    Bad("absent-second-file", training(("train: data.tsv", f"train:\n    - data.tsv\n    - zzz.csv {HERE}")),
        "file-not-found", "data.train[1]", "relative to the job file"),
    Bad("missing-column", training(("data.tsv", f"data.tsv\n  text_column: txt {HERE}")),
        "missing-column", "data.text_column", "did you mean `text`?"),
    Bad("missing-default-column", training(("\ndata:", f"\ndata: {HERE}"), ("data.tsv", "other.csv")),
        "missing-column", "data.text_column",
        "did you mean `texts`?", files=(("other.csv", "texts,label\na,b\n"),), message="no column `text`"),
    Bad("missing-messages-column", training(("sequence-classification", "causal-lm"),
        ("data.tsv", f"chat.jsonl\n  messages_column: message {HERE}")), "missing-column", "data.messages_column",
        "did you mean `messages`?", files=(("chat.jsonl", '{"messages": []}\n'),)),
    Bad("missing-group-column", with_data(f"split: {{test: 0.2, group_column: person}} {HERE}"),
        "missing-column", "data.split.group_column", "the columns are: text, label"),
    Bad("absent-chat-template", training(("sequence-classification", "causal-lm"), ("data.tsv",
        f"chat.jsonl\n  messages_column: messages\n  chat_template: chat.jnja {HERE}")),
        "file-not-found", "data.chat_template", "chat.jinja?",
        files=(("chat.jsonl", '{"messages": []}\n'), ("chat.jinja", "x"))),
    Bad("empty-data", data("empty.tsv"), "empty-data", "data.train", "the right file?", files=(("empty.tsv", ""),)),
    Bad("header-alone", data("head.tsv"), "empty-data", "data.train", "the right file?",
        files=(("head.tsv", "text\tlabel\n"),), message="a header line and no rows"),
    Bad("unknown-ending", data("data.xlsx"), "unknown-format", "data.train", ".csv, .tsv, .jsonl",
        files=(("data.xlsx", "x"),)),
    Bad("not-json", data("data.jsonl"), "not-json", "data.train", "one JSON object a line",
        files=(("data.jsonl", "text: hello\n"),)),
    Bad("json-list", data("list.jsonl"), "not-json", "data.train", "one JSON object a line",
        files=(("list.jsonl", "[1, 2]\n"),)),
    Bad("deep-json", data("deep.jsonl"), "not-json", "data.train", "one JSON object a line",
        files=(("deep.jsonl", "[" * 100_000),)),
    Bad("not-parquet", data("data.parquet"), "not-parquet", "data.train", "write it again",
        files=(("data.parquet", b"PAR1 but nothing more of it"),)),
    Bad("empty-parquet", data("none.parquet"), "not-parquet", "data.train", "write it again",
        files=(("none.parquet", b""),)),
    Bad("not-text-data", data("wide.csv"), "not-text", "data.train", "save it as UTF-8",
        files=(("wide.csv", "text,label\n".encode("utf-16")),)),
    Bad("endless-field", data("wide.csv"), "not-csv", "data.train", "the right file?",
        files=(("wide.csv", "t" * 200_000 + ",label\na,b\n"),)),
    Bad("folder-of-files", data("models"), "not-a-dataset", "data.train", "name the files"),
    Bad("command-not-found", f"name: x\nrun: [no-such-program, a] {HERE}\n",
        "command-not-found", "run[0]", "on the PATH"),
    Bad("command-as-one-word", f"name: x\nrun: [python script.py] {HERE}\n",
        "command-not-found", "run[0]", "[python, script.py]"),
    Bad("command-as-text", f"name: x\nrun: python script.py {HERE}\n",
        "wrong-type", "run", "in brackets: [python, script.py]"),
    Bad("not-executable", f"name: x\nrun: [./script.py] {HERE}\n",
        "command-not-found", "run[0]", "run: [python, ./script.py]"),
    Bad("script-not-found", f"name: x\nrun:\n  - python\n  - scirpt.py {HERE}\n",
        "file-not-found", "run[1]", "script.py?"),
    Bad("working-dir-not-found", command("working_dir: nowhere"), "file-not-found", "working_dir", "make it"),
]  # fmt: skip

OVERRIDES = [
    Bad("set-without-equals", COMMAND, "bad-override", "name", "--set train.learning_rate=3e-5", ("name",)),
    Bad("set-without-a-key", COMMAND, "bad-override", None, "--set train", ("=1",)),
    Bad("set-into-a-value", TRAINING, "bad-override", "name.first", "--set 'name=...'", ("name.first=x",)),
    Bad("set-into-a-list", COMMAND, "bad-override", "run.0", "--set 'run=...'", ("run.0=x",),
        message="`run` holds a list"),
    Bad("set-bad-yaml", TRAINING, "bad-override", "data.train", "quote it", ("data.train=[a",)),
    Bad("set-not-a-number", TRAINING, "bad-override", "train.learning_rate", "a finite number",
        ("train.learning_rate=.nan",)),
    Bad("set-unknown-key", TRAINING, "unknown-key", "train.sed", "mean `seed`?", ("train.sed=1",)),
    Bad("set-unknown-section", TRAINING, "unknown-key", "trian", "mean `train`?", ("trian.seed=1",)),
    Bad("set-wrong-type", TRAINING, "wrong-type", "train.seed", "a whole number", ("train.seed=x",)),
    Bad("set-too-wide", COMMAND, "impossible-gang", "resources.num_processes", "at most 4",
        ("resources.num_processes=64",)),
    Bad("set-absent-data", TRAINING, "file-not-found", "data.train", "relative", ("data.train=./nowhere.tsv",)),
]  # fmt: skip

TABLE = [*KEYS, *VALUES, *TOGETHER, *FILES, *NAMED, *OVERRIDES]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job file's directory with a model, data and a script; TUNEYARD_HOME is `home` in it and does not exist."""
    for name in [name for name in os.environ if name.startswith("TUNEYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNEYARD_CPU_SLOTS", "4")
    folder = tmp_path / "work"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "models" / "tiny" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "models" / "tiny" / "model.safetensors").touch()
    (folder / "data.tsv").write_text("text\tlabel\nhello\tham\n")
    (folder / "script.py").write_text("print('never run')\n")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Told:
    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[dict[str, Any]]:
        last = json.loads(self.out.strip().splitlines()[-1])
        assert set(last) == {"errors"}
        errors: list[dict[str, Any]] = last["errors"]
        assert all(set(error) == {"code", "message", "field", "file", "line", "hint"} for error in errors)
        return errors


@pytest.fixture
def tuneyard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """The command itself, in this process."""

    def call(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["tuneyard", *arguments])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        return Told(ending.value.code if isinstance(ending.value.code, int) else 0, out, err)

    return call


def write(folder: Path, bad: Bad) -> None:
    content = bad.text if isinstance(bad.text, bytes) else bad.text.encode()
    (folder / "job.yaml").write_bytes(content)
    for name, inside in bad.files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(inside if isinstance(inside, bytes) else inside.encode())


def arguments_of(bad: Bad) -> list[str]:
    return [bad.path, *(word for override in bad.overrides for word in ("--set", override))]


def check(bad: Bad, told: Told, folder: Path) -> None:
    """What holds for every refusal."""
    assert told.status == 2
    (error,) = told.errors
    assert error["code"] == bad.code, error
    assert error["field"] == bad.field, error
    assert error["line"] == bad.expected_line, error
    assert error["file"] == (f"--set {bad.overrides[0]}" if bad.overrides else bad.path), error
    assert error["hint"]
    assert bad.hint in error["hint"], error
    assert bad.message in error["message"], error
    assert len(error["message"]) < 600
    # People read the same on stderr.
    where = error["file"] + (f":{error['line']}" if error["line"] else "")
    for part in (f"error[{bad.code}]: ", f"--> {where}\n", error["hint"], error["message"]):
        assert part in told.err
    assert bad.field is None or f"field: {bad.field}\n" in told.err
    for jargon in ("Traceback", "pydantic", "Value error", "Input should", "extra_forbidden", "NoneType", "~~"):
        assert jargon not in told.err
    # Nothing is stored.
    assert not (folder.parent / "home").exists()


def test_the_table_has_no_name_twice() -> None:
    names = [bad.name for bad in TABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_run_refuses(bad: Bad, folder: Path, tuneyard: Callable[..., Told]) -> None:
    write(folder, bad)
    check(bad, tuneyard("run", *arguments_of(bad), "-o", "json"), folder)


@pytest.mark.parametrize("text", [TRAINING, COMMAND], ids=["training", "command"])
def test_the_files_that_the_faults_are_put_into_are_good(text: str, folder: Path) -> None:
    from orchestrator.cli.files import read_job

    (folder / "job.yaml").write_text(text)
    read_job(folder / "job.yaml", None)


def test_all_faults_of_a_file_are_told_at_once(folder: Path, tuneyard: Callable[..., Told]) -> None:
    text = training(("name: spam", "name: Bad Name"), ("max_steps: 10", "max_steps: 0\n  learning_rat: 1\n  seed: x"))
    (folder / "job.yaml").write_text(text + "queu: a\nstrategy: zero9\n")
    told = tuneyard("run", "job.yaml", "-o", "json")
    assert told.status == 2
    assert [(error["line"], error["code"], error["field"]) for error in told.errors] == [
        (1, "bad-name", "name"),
        (8, "out-of-range", "train.max_steps"),
        (9, "unknown-key", "train.learning_rat"),
        (10, "wrong-type", "train.seed"),
        (11, "unknown-key", "queu"),
        (12, "unknown-value", "strategy"),
    ]
    assert told.err.count("error[") == 6


def test_all_that_a_job_names_is_looked_at_at_once(folder: Path, tuneyard: Callable[..., Told]) -> None:
    (folder / "job.yaml").write_text(training(("models/tiny", "./nothing"), ("data.tsv", "[a.tsv, data.tsv, b.tsv]")))
    told = tuneyard("run", "job.yaml", "-o", "json")
    assert [error["field"] for error in told.errors] == ["model.name_or_path", "data.train[0]", "data.train[2]"]


def test_a_misspelt_kind_of_job_names_the_key(folder: Path, tuneyard: Callable[..., Told]) -> None:
    (folder / "job.yaml").write_text("name: x\nmodle: {name_or_path: models/tiny}\n")
    told = tuneyard("run", "job.yaml", "-o", "json")
    assert [error["code"] for error in told.errors] == ["nothing-to-do", "unknown-key"]
    assert "`model`" in told.errors[1]["hint"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("flags", [["-o", "json"], ["-ojson"], ["--output=json"], ["--output", "json"]])
def test_every_spelling_of_json_gets_json(flags: list[str], tuneyard: Callable[..., Told]) -> None:
    assert tuneyard("run", "none.yaml", *flags).errors[0]["code"] == "file-not-found"


@pytest.mark.usefixtures("folder")
def test_a_file_named_json_does_not_ask_for_json(tuneyard: Callable[..., Told]) -> None:
    assert tuneyard("run", "json").out == ""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "job.yaml", "--colour"], ["ls", "--limit", "x"], ["lss"], ["up", "--nodes", "0"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_bad_input(arguments: list[str], tuneyard: Callable[..., Told]) -> None:
    told = tuneyard(*arguments, "-o", "json")
    assert told.status == 2
    assert told.errors[0]["code"] == "usage"
    assert told.errors[0]["message"] in " ".join(told.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "many"), ("PORT", "70000"), ("TICK", "0"), ("CPU_SLOTS", "0"), ("LEASH", "-1")],
)
def test_a_bad_setting_is_named(
    name: str, value: str, folder: Path, tuneyard: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "job.yaml").write_text(COMMAND)
    monkeypatch.setenv(f"TUNEYARD_{name}", value)
    told = tuneyard("run", "job.yaml", "-o", "json")
    assert told.status == 2
    assert (told.errors[0]["code"], told.errors[0]["field"]) == ("bad-setting", f"TUNEYARD_{name}")
    assert f"TUNEYARD_{name}" in told.errors[0]["hint"]


REAL = [bad for bad in TABLE if bad.name in ("near-miss", "latin-1", "impossible-gang")]


@pytest.mark.parametrize("bad", REAL, ids=lambda bad: bad.name)
def test_a_real_process_refuses(bad: Bad, folder: Path) -> None:
    write(folder, bad)
    # A yard is needed only to learn that the gang is too large for it; all else is refused before one is asked.
    verb = "run" if bad.name == "impossible-gang" else "submit"
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", verb, *arguments_of(bad), "-o", "json"],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    check(bad, Told(done.returncode, done.stdout, done.stderr), folder)
