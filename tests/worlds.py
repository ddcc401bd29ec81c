"""Small worlds to train in: real model architectures with few weights, real tokenizers, ragged data, real launches.

Everything is written locally and is a pure function of its arguments; nothing needs a network.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.attempt import ENV_RUN_ID, told_to_torch
from launch.config import TrainSpec
from launch.contract import AttemptFiles, ExecutionPlan, NodeShare, RankExit, RunContract
from launch.engine_config import (
    accelerate_config,
    deepspeed_config,
    import_environment,
    launch_command,
    launch_environment,
)
from launch.sampler import micro_steps
from orchestrator.execute.processes import end_all, inherited
from orchestrator.execute.standby import Ordered, Standby

SPAM_WORDS, HAM_WORDS = (
    sentence.split()
    for sentence in (
        "win a free prize call now to claim your cash award reply stop please send the money before noon",
        "are you coming home for dinner tonight i will be late sorry see you at station love mum thanks ok",
    )
)
WORDS = SPAM_WORDS + HAM_WORDS


def write_messages(path: Path, rows: int = 200, seed: int = 0) -> Path:
    """A TSV of `rows` distinct texts of 1 to 40 words, some with a stray quotation mark, of two learnable classes."""
    draw = random.Random(seed)
    lines, seen = ["text\tlabel"], set()
    while len(seen) < rows:
        spam = draw.random() < 0.4
        pool = SPAM_WORDS if spam else HAM_WORDS
        words = [draw.choice(pool if draw.random() < 0.8 else WORDS) for _ in range(draw.randint(1, 40))]
        text = " ".join(words)
        if draw.random() < 0.1:
            text = '"' + text
        if text not in seen:
            seen.add(text)
            lines.append(f"{text}\t{'spam' if spam else 'ham'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_dialogues(path: Path, rows: int = 80, seed: int = 0) -> Path:
    """JSONL of prompts and responses of different lengths."""
    draw = random.Random(seed)
    with path.open("w") as out:
        for _ in range(rows):
            prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            response = " ".join(sorted(set(prompt.split()))[: draw.randint(1, 6)])
            out.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return path


def write_bert(directory: Path, hidden: int = 32, seed: int = 0, *, layers: int = 2, pooler: bool = True) -> Path:
    """A small BERT without a classification head, and a WordPiece tokenizer for WORDS."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [*special, *sorted(set(WORDS)), *sorted({letter for word in WORDS for letter in word} - set(WORDS)), '"']
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=pooler).save_pretrained(directory)
    return directory


def write_llama(directory: Path, hidden: int = 32, seed: int = 0, chat_template: str | None = None) -> Path:
    """A two-layer Llama, and a byte-level BPE tokenizer trained on WORDS, without a padding token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = _write_bpe(directory, chat_template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * hidden, max_position_embeddings=128, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_gpt2(directory: Path, hidden: int = 32, seed: int = 0, chat_template: str | None = None) -> Path:
    """A two-layer GPT-2, whose positions are learned, with the same tokenizer as the Llama."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = _write_bpe(directory, chat_template)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=hidden, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def _write_bpe(directory: Path, chat_template: str | None) -> int:
    """Writes the tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    ).save_pretrained(directory)
    return int(tokenizer.get_vocab_size())


def write_chats(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """JSONL of dialogues of one to three questions and answers."""
    draw = random.Random(seed)
    with path.open("w") as out:
        for _ in range(rows):
            messages = []
            for _ in range(draw.randint(1, 3)):
                asked = draw.choices(WORDS, k=draw.randint(1, 6))
                messages.append({"role": "user", "content": " ".join(asked)})
                messages.append({"role": "assistant", "content": " ".join(sorted(asked)[:3])})
            out.write(json.dumps({"messages": messages}) + "\n")
    return path


def a_spec(model_dir: Path, data_file: Path, /, **changes: Any) -> TrainSpec:
    """A short classification job; `changes` replace whole sections or, for `train` and `data`, single keys."""
    document: dict[str, Any] = {
        "name": "small",
        "strategy": "single",
        "model": {"name_or_path": str(model_dir), "task": "sequence-classification", "dropout": 0.0},
        "data": {"train": str(data_file), "split": {"test": 0.2, "stratify": True}, "max_length": 32},
        "train": {"max_steps": 4, "global_batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.1},
    }
    for key, change in changes.items():
        document[key] = {**document[key], **change} if key in ("train", "data", "model") else change
    return TrainSpec.model_validate_json(json.dumps(document))


def a_plan(spec: TrainSpec, engine: str, world_size: int, micro_batch_size: int, **changes: Any) -> ExecutionPlan:
    return ExecutionPlan.model_validate(
        {
            "engine": engine,
            "world_size": world_size,
            "device": "cpu",
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": micro_steps(spec.train.global_batch_size, world_size, micro_batch_size),
            "precision": spec.train.precision,
            "activation_checkpointing": bool(spec.train.activation_checkpointing),
            **changes,
        }
    )


def a_contract(run_dir: Path, plan: ExecutionPlan, spec: TrainSpec | None = None, **changes: Any) -> RunContract:
    contract = RunContract(
        run_id="small.1",
        job_id="small",
        attempt=1,
        plan=plan,
        nodes=(
            NodeShare(
                node="here",
                address="127.0.0.1",
                processes=plan.world_size,
                gpus=tuple(range(plan.world_size)) if plan.device == "cuda" else (),
            ),
        ),
        main_port=free_port(),
        run_dir=str(run_dir),
        output_dir=str(run_dir / "model"),
        checkpoint_dir=str(run_dir / "checkpoints"),
        tracker_dir=str(run_dir / "trackers"),
        spec=spec,
    )
    return contract.model_copy(update=changes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Launched:
    """The launchers of one attempt: one a node."""

    contract: RunContract
    files: AttemptFiles
    run_id: str
    """In the environment of every process: the contract's, made unique."""
    launchers: list[subprocess.Popen[bytes] | Ordered] = field(default_factory=list)

    def wait(self, timeout_s: float = 120) -> dict[int, RankExit]:
        """How each rank ended, by rank; ends what is left after `timeout_s`."""
        try:
            for launcher in self.launchers:
                launcher.wait(timeout_s)
        finally:
            self.end()
        return {
            rank: RankExit.model_validate_json(self.files.exit(rank).read_bytes())
            for rank in range(self.contract.plan.world_size)
            if self.files.exit(rank).exists()
        }

    def end(self) -> None:
        """End every process of the attempt that is still there; ranks live in sessions of their own."""
        assert end_all(ENV_RUN_ID, self.run_id) == []
        for launcher in self.launchers:
            launcher.wait(30)

    def wait_for(self, what: str, timeout_s: float = 60) -> None:
        """Until rank 0's progress holds `what`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            progress = self.files.progress(0)
            if progress.exists() and what in progress.read_text():
                return
            assert self.launchers[0].poll() is None, self.logs()
            time.sleep(0.05)
        raise AssertionError(f"no {what} within {timeout_s} s\n{self.logs()}")

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-3000:] for path in sorted(self.files.run_dir.glob("**/log"))]
        texts += [path.read_text(errors="replace")[-3000:] for path in self.files.run_dir.glob("launcher-*.log")]
        return "\n".join(texts)


@functools.cache
def standby() -> Standby:
    """Imports are paid for once a session; `cold` starts a launcher as a first attempt does."""
    found = Standby({**inherited(), **import_environment("cpu"), "HF_HUB_OFFLINE": "1"})
    atexit.register(found.close)
    deadline = time.monotonic() + 120
    while not found.ready:
        assert found.alive(), "the standby ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def start(
    contract: RunContract, environment: dict[str, str] | None = None, module: str = "launch", *, cold: bool = False
) -> Launched:
    """Start every node's launcher through generated configuration files, as an executor does. On GPUs always cold."""
    files = AttemptFiles(contract.run_dir)
    files.run_dir.mkdir(parents=True, exist_ok=True)
    contract.write(files.contract)
    deepspeed_file = None
    if contract.plan.zero_stage:
        deepspeed_file = str(files.deepspeed_config)
        optim = contract.spec.train if contract.spec else None
        files.deepspeed_config.write_text(json.dumps(deepspeed_config(optim, contract.plan)))
    launched = Launched(contract, files, f"{contract.run_id}-{os.getpid()}-{time.monotonic_ns()}")
    for index, node in enumerate(contract.nodes):
        config = accelerate_config(contract.plan, contract.nodes, index, contract.main_port, deepspeed_file)
        path = files.accelerate_config(index)
        path.write_text(yaml.safe_dump(config))
        command = launch_command(sys.executable, path, files.contract)
        command[command.index("launch")] = module
        env = {
            **inherited(),
            **launch_environment(contract.plan, node),
            "HF_HUB_OFFLINE": "1",
            ENV_RUN_ID: launched.run_id,
            **(environment or {}),
        }
        cwd, log_file = Path(__file__).parents[1], files.launcher_log(index)
        launcher: subprocess.Popen[bytes] | Ordered | None
        if cold or contract.command is not None or contract.plan.device == "cuda":
            with log_file.open("wb") as log:
                launcher = subprocess.Popen(
                    command, env=told_to_torch(env), cwd=cwd, stdout=log, stderr=log, start_new_session=True
                )
        else:
            launcher = standby().order(tuple(command), env, str(cwd), log_file)
        assert launcher is not None
        launched.launchers.append(launcher)
    return launched
