"""The training is the job's, not the hardware's: any engine, world size and micro-batch gives the same weights.

They are compared with a plain PyTorch loop written here, whose only shared parts are the order of the rows and the
draw of the new head. Four mutants of the real program show that the comparison can fail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from launch.config import TrainSpec
from launch.contract import ExitCode, RankExit
from launch.data import load_corpus, sampler_for
from launch.model import drawn, load_tokenizer
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

STEPS = 20
# The last batch of an epoch has 5 rows: 3 and 2 on two ranks, so one of them runs a dummy micro-batch of 2.
ROWS = 147
ENGINES = [
    ("single", 1, 16),
    ("single", 1, 2),
    ("ddp", 2, 8),
    ("ddp", 2, 2),
    ("zero1", 2, 8),
    ("zero1", 2, 2),
    ("zero2", 2, 8),
    ("zero2", 2, 2),
    ("zero3", 2, 8),
    ("zero3", 2, 2),
]


@dataclass(frozen=True)
class Outcome:
    """What is compared of a run."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    world = tmp_path_factory.mktemp("world")
    return a_spec(
        write_bert(world / "bert"),
        write_messages(world / "messages.tsv", rows=ROWS),
        train={
            "max_steps": STEPS,
            "global_batch_size": 16,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.1,
            # A key's bias has no gradient but rounding noise, which a smaller epsilon would blow up to whole steps.
            "adam_epsilon": 1e-4,
        },
    )


@pytest.fixture(scope="module")
def reference(spec: TrainSpec) -> Outcome:
    """The textbook loop: one process, the whole batch at once, nothing clever."""
    corpus = load_corpus(spec, load_tokenizer(spec.model))
    rows = corpus.train
    sampler = sampler_for(rows, spec.train)
    assert len(rows) % 16 == 5, "the last batch of an epoch should be odd"
    model = AutoModelForSequenceClassification.from_pretrained(
        spec.model.name_or_path,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    with torch.no_grad():
        model.classifier.weight.copy_(drawn(model.classifier.weight.shape, "classifier.weight", 0, 0.02))
        model.classifier.bias.zero_()
    vectors = re.compile(r"bias|LayerNorm")
    decayed = [p for name, p in model.named_parameters() if not vectors.search(name)]
    others = [p for name, p in model.named_parameters() if vectors.search(name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, eps=1e-4
    )
    losses, consumed = [], 0
    for step in range(STEPS):
        batch = sampler.batch(consumed)
        consumed += len(batch)
        texts = [rows.tokens[rows.offsets[row] : rows.offsets[row + 1]] for row in batch]
        width = max(len(text) for text in texts)
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], dtype=torch.long)
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = functional.cross_entropy(logits, torch.from_numpy(rows.classes[batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Outcome(losses, {name: p.detach().clone() for name, p in model.named_parameters()})


def run(
    spec: TrainSpec, directory: Path, engine: str, world_size: int, micro_batch: int, mutant: str | None = None
) -> dict[int, RankExit]:
    contract = a_contract(directory, a_plan(spec, engine, world_size, micro_batch), spec)
    launched = start(contract) if mutant is None else start(contract, {"MUTANT": mutant}, module="tests.mutants")
    ended = launched.wait()
    assert len(ended) == world_size, launched.logs()
    assert {exit_.code for exit_ in ended.values()} == {ExitCode.DONE}, launched.logs()
    return ended


def outcome(ended: dict[int, RankExit], directory: Path) -> Outcome:
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    return Outcome(list(result.train.losses), load_file(directory / "model" / "model.safetensors"))


def distance(found: Outcome, reference: Outcome) -> tuple[float, float]:
    """The largest difference of a step's loss, and of a weight after the last step."""
    assert len(found.losses) == len(reference.losses) == STEPS
    assert found.weights.keys() == reference.weights.keys()
    losses = np.abs(np.subtract(found.losses, reference.losses)).max()
    weights = max(float((found.weights[name] - weight).abs().max()) for name, weight in reference.weights.items())
    return float(losses), weights


def compare(found: Outcome, reference: Outcome) -> None:
    """Raises AssertionError where losses differ by more than 1e-6 or weights by more than 1e-5."""
    losses, weights = distance(found, reference)
    print(f"losses differ by {losses:.1e}, weights by {weights:.1e}")
    assert losses <= 1e-6
    assert weights <= 1e-5


@pytest.fixture(scope="module")
def single(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RankExit]:
    return run(spec, tmp_path_factory.mktemp("single"), "single", 1, 16)


def test_the_reference_moves(spec: TrainSpec, reference: Outcome) -> None:
    """Otherwise a loop that trains nothing would compare well."""
    before = load_file(Path(spec.model.name_or_path) / "model.safetensors")
    moved = [(reference.weights[f"bert.{name}"] - weight).abs().max() for name, weight in before.items()]
    assert float(torch.stack(moved).median()) > 0.01


@pytest.mark.parametrize(("engine", "world_size", "micro_batch"), ENGINES)
def test_every_engine_trains_as_the_reference(
    spec: TrainSpec,
    reference: Outcome,
    single: dict[int, RankExit],
    tmp_path: Path,
    engine: str,
    world_size: int,
    micro_batch: int,
) -> None:
    ended = run(spec, tmp_path, engine, world_size, micro_batch)
    compare(outcome(ended, tmp_path), reference)
    whole = single[0].result
    assert whole is not None
    for rank in range(world_size):
        result = ended[rank].result
        assert result is not None
        assert result.engine == engine
        assert result.zero_stage == (int(engine[-1]) if engine.startswith("zero") else 0)
        assert result.world_size == world_size
        share = 1 / world_size if engine.startswith("zero") else 1
        assert result.moment_bytes == pytest.approx(share * whole.moment_bytes, rel=0.01)
        # fp32 ZeRO keeps an fp32 master of this rank's part: half the size of the two moments.
        master = result.moment_bytes / 2 if engine.startswith("zero") else 0
        assert result.master_bytes == pytest.approx(master, rel=0.01)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_what_a_gpu_does_ahead_and_late_changes_nothing(
    spec: TrainSpec, reference: Outcome, tmp_path: Path, engine: str
) -> None:
    compare(outcome(run(spec, tmp_path, engine, 2, 3, mutant="late"), tmp_path), reference)


@pytest.mark.parametrize(
    ("mutant", "engine", "micro_batch"),
    [
        ("no-clip", "zero2", 8),
        ("no-weight-decay", "zero3", 8),
        ("mean-of-means", "ddp", 3),
        ("no-averaging", "ddp", 8),
    ],
)
def test_a_wrong_training_is_told_apart(
    spec: TrainSpec, reference: Outcome, tmp_path: Path, mutant: str, engine: str, micro_batch: int
) -> None:
    found = outcome(run(spec, tmp_path, engine, 2, micro_batch, mutant), tmp_path)
    assert distance(found, reference)[1] > 1e-4, "the mutant trains as it should: is it a mutant?"
    with pytest.raises(AssertionError, match=r"assert .* <= 1e-0[56]"):
        compare(found, reference)
