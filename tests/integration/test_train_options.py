"""Options of the optimisation mean the same on every engine: each is compared with a plain PyTorch loop.

The options are combined, so that few runs cover them. In one of them rank 0's loss is not a number in step 3: the
reference, which has no such trouble, just leaves that step out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import matthews_corrcoef
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.optimization import Adafactor

from launch.config import CheckpointSpec, TrainSpec
from launch.contract import ExitCode, ProgressLine, RankExit, RankResult, TrainSummary
from launch.data import Corpus, Rows, collate, load_corpus, sampler_for
from launch.model import drawn, load_tokenizer
from launch.sampler import Indices
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

ENGINES = [("single", 1, 16), ("ddp", 2, 3), ("zero2", 2, 3), ("zero3", 2, 8)]
STEPS = 12
SKIPPED = 2  # 0-based
KEY_BIASES = "*.key.bias"  # the loss does not depend on them: their gradients are rounding noise, their signs chance


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=147)
    return world


def job(world: Path, **train: object) -> TrainSpec:
    common = {"max_steps": STEPS, "max_grad_norm": 0.1, "freeze": [KEY_BIASES], "adam_epsilon": 1e-4}
    return a_spec(world / "bert", world / "messages.tsv", train={**common, **train})


def run(
    spec: TrainSpec,
    directory: Path,
    engine: str,
    world_size: int,
    micro_batch: int,
    mutant: str | None = None,
    **contract_changes: object,
) -> dict[int, RankExit]:
    contract = a_contract(directory, a_plan(spec, engine, world_size, micro_batch), spec, **contract_changes)
    launched = start(contract) if mutant is None else start(contract, {"MUTANT": mutant}, module="tests.mutants")
    ended = launched.wait()
    assert len(ended) == world_size, launched.logs()
    return ended


def result_of(ended: dict[int, RankExit]) -> tuple[RankResult, TrainSummary]:
    assert {exit_.code for exit_ in ended.values()} == {ExitCode.DONE}, ended[0].error
    result = ended[0].result
    assert result is not None
    assert result.train is not None
    return result, result.train


@dataclass
class Reference:
    """A textbook loop: one process, the whole batch at once."""

    spec: TrainSpec
    corpus: Corpus = field(init=False)
    model: PreTrainedModel = field(init=False)
    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, tuple[float, dict[str, torch.Tensor]]] = field(default_factory=dict)
    """By steps taken: loss on the test part, and the weights then."""

    def __post_init__(self) -> None:
        self.corpus = load_corpus(self.spec, load_tokenizer(self.spec.model))
        self.model = AutoModelForSequenceClassification.from_pretrained(
            self.spec.model.name_or_path, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        with torch.no_grad():
            self.model.classifier.weight.copy_(drawn(self.model.classifier.weight.shape, "classifier.weight", 0, 0.02))
            self.model.classifier.bias.zero_()

    def logits(self, rows: Rows, chosen: Indices) -> torch.Tensor:
        batch = collate(rows, chosen, 0, causal=False)
        logits: torch.Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        loss_function: torch.nn.CrossEntropyLoss,
        factor: Callable[[int], float],
        *,
        skip: int | None = None,
        eval_every: int = STEPS,
    ) -> None:
        rows, test = self.corpus.train, self.corpus.test
        assert test is not None
        sampler = sampler_for(rows, self.spec.train)
        peaks = [group["lr"] for group in optimizer.param_groups]
        consumed = 0
        for step in range(STEPS):
            batch = sampler.batch(consumed)
            consumed += len(batch)
            if step != skip:
                loss = loss_function(self.logits(rows, batch), torch.from_numpy(rows.classes[batch]))
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 0.1)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor(step)
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(loss.item())
            if (step + 1) % eval_every == 0 or step + 1 == STEPS:
                weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
                with torch.no_grad():
                    logits = self.logits(test, torch.arange(len(test)).numpy())
                held_out = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels))
                self.evaluations[step + 1] = (held_out.item(), weights)


def groups(model: PreTrainedModel, rate: Callable[[str], float], frozen: Callable[[str], bool]) -> list[dict[str, Any]]:
    """One group a parameter: the simplest way to give each its own rate and weight decay."""
    found = []
    for name, parameter in model.named_parameters():
        if frozen(name):
            parameter.requires_grad = False
        else:
            decays = "bias" not in name and "LayerNorm" not in name
            found.append({"params": [parameter], "lr": rate(name), "weight_decay": 0.1 if decays else 0.0})
    return found


def differences(model_dir: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every single weight."""
    found = load_file(model_dir / "model.safetensors")
    assert found.keys() == weights.keys()
    return torch.cat([(found[name] - weight).abs().flatten() for name, weight in weights.items()])


@pytest.fixture(scope="module")
def everything(world: Path) -> TrainSpec:
    return job(
        world,
        learning_rate=1e-2,
        schedule="wsd",
        warmup_ratio=0.1,
        decay_steps=4,
        layer_decay=0.7,
        freeze=[KEY_BIASES, "bert.embeddings.position_*"],
        label_smoothing=0.1,
        class_weights={"spam": 2.5},
        eval_every=5,  # and at the end
        keep_best=True,
        on_nonfinite="skip",
    )


@pytest.fixture(scope="module")
def reference(everything: TrainSpec) -> Reference:
    found = Reference(everything)

    def rate(name: str) -> float:
        depth = 3  # of two layers: the pooler and the head are above them
        if "embeddings" in name:
            depth = 0
        elif "encoder.layer." in name:
            depth = 1 + int(name.split("encoder.layer.")[1][0])
        return float(1e-2 * 0.7 ** (3 - depth))

    parts = groups(found.model, rate, lambda name: "key.bias" in name or "position" in name)
    shape = [0, 1 / 2, 1, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    assert list(found.corpus.labels) == ["ham", "spam"]
    found.train(
        torch.optim.AdamW(parts, eps=1e-4),
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.5]), label_smoothing=0.1),
        lambda step: shape[step],
        skip=SKIPPED,
        eval_every=5,
    )
    return found


@pytest.mark.parametrize(("engine", "world_size", "micro_batch"), ENGINES)
def test_all_options_together_train_as_the_reference(
    everything: TrainSpec, reference: Reference, tmp_path: Path, engine: str, world_size: int, micro_batch: int
) -> None:
    ended = run(everything, tmp_path, engine, world_size, micro_batch, mutant="nan-at-3")
    result, summary = result_of(ended)
    best = min(reference.evaluations, key=lambda step: reference.evaluations[step][0])
    held_out, weights = reference.evaluations[best]
    assert best < STEPS, "the best weights should not be the last"
    worst = float(differences(tmp_path / "model", weights).max())
    off = max(abs(found - wanted) for found, wanted in zip(summary.losses, reference.losses, strict=True))
    print(f"{engine}: losses differ by {off:.1e}, the best weights by {worst:.1e}")
    assert off <= 1e-6
    assert worst <= 1e-5
    assert (summary.steps, summary.skipped_steps, summary.best_step) == (STEPS, 1, best)
    lines = [ProgressLine.model_validate_json(line) for line in (tmp_path / "rank-0/progress.jsonl").open()]
    assert [line.step for line in lines if line.skipped] == [SKIPPED + 1]

    # What is exported is what was measured.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    test = reference.corpus.test
    assert test is not None
    batch = collate(test, torch.arange(len(test)).numpy(), 0, causal=False)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert result.metrics is not None
    assert result.metrics["loss"] == pytest.approx(held_out, abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels))
    assert result.metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert result.metrics["mcc"] == pytest.approx(matthews_corrcoef(test.labels, logits.argmax(-1).numpy()))
    assert f"those of step {best}, the best evaluation" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(("engine", "world_size", "micro_batch"), ENGINES)
def test_lion_is_the_same_on_every_engine(
    lion: Reference, tmp_path: Path, engine: str, world_size: int, micro_batch: int
) -> None:
    result, summary = result_of(run(lion.spec, tmp_path, engine, world_size, micro_batch))
    off = max(abs(found - wanted) for found, wanted in zip(summary.losses, lion.losses, strict=True))
    apart = differences(tmp_path / "model", lion.evaluations[STEPS][1])
    print(f"{engine}: losses differ by {off:.1e}, weights by {apart.max():.1e}, {int((apart > 1e-5).sum())} by > 1e-5")
    assert off <= 1e-6
    assert float(apart.max()) <= 1e-5
    trained = sum(p.numel() for p in lion.model.parameters() if p.requires_grad)
    share = 4 * trained / (world_size if engine.startswith("zero") else 1)
    assert result.moment_bytes == pytest.approx(share, rel=0.01), "one moment in fp32 for each weight"


@pytest.fixture(scope="module")
def lion(world: Path) -> Reference:
    found = Reference(job(world, optimizer="lion", learning_rate=1e-3, schedule="cosine", class_weights="balanced"))

    class Lion(torch.optim.Optimizer):
        """As in the paper's listing."""

        def __init__(self, parts: list[dict[str, Any]]) -> None:
            super().__init__(parts, {})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    m = self.state[p].get("m", torch.zeros_like(p))
                    c = 0.9 * m + 0.1 * p.grad
                    p -= group["lr"] * (torch.sign(c) + group["weight_decay"] * p)
                    self.state[p]["m"] = 0.99 * m + 0.01 * p.grad

    parts = groups(found.model, lambda _: 1e-3, lambda name: "key.bias" in name)
    labels = torch.from_numpy(found.corpus.train.labels)
    balanced = len(labels) / (2 * torch.bincount(labels))
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item()) for step in range(STEPS)]
    found.train(Lion(parts), torch.nn.CrossEntropyLoss(weight=balanced), lambda step: cosine[step])
    return found


@pytest.mark.parametrize(("engine", "world_size", "micro_batch"), ENGINES[:2])
def test_adafactor_is_transformers_own(
    world: Path, tmp_path: Path, engine: str, world_size: int, micro_batch: int
) -> None:
    spec = job(world, optimizer="adafactor", learning_rate=1e-3, schedule="constant")
    reference = Reference(spec)
    parts = groups(reference.model, lambda _: 1e-3, lambda name: "key.bias" in name)
    optimizer = Adafactor(parts, lr=1e-3, scale_parameter=False, relative_step=False)
    reference.train(optimizer, torch.nn.CrossEntropyLoss(), lambda _: 1.0)
    result, summary = result_of(run(spec, tmp_path, engine, world_size, micro_batch))
    off = max(abs(found - wanted) for found, wanted in zip(summary.losses, reference.losses, strict=True))
    worst = float(differences(tmp_path / "model", reference.evaluations[STEPS][1]).max())
    print(f"{engine}: losses differ by {off:.1e}, weights by {worst:.1e}")
    assert off <= 1e-6
    assert worst <= 1e-5
    shapes = [p.shape for p in reference.model.parameters() if p.requires_grad]
    factors = sum(sum(shape) if len(shape) == 2 else shape[0] for shape in shapes)
    assert result.moment_bytes == 4 * factors


def test_the_best_weights_outlive_a_restart(world: Path, tmp_path: Path) -> None:
    """They are of step 2; the first attempt ends after step 5, the second goes on from step 4."""
    spec = job(world, learning_rate=5e-3, schedule="constant", class_weights={"spam": 12.0}, eval_every=2)
    reference = Reference(spec)
    parts = groups(reference.model, lambda _: 5e-3, lambda name: "key.bias" in name)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 12.0]))
    reference.train(torch.optim.AdamW(parts, eps=1e-4), loss, lambda _: 1.0, eval_every=2)
    assert min(reference.evaluations, key=lambda step: reference.evaluations[step][0]) == 2
    spec = spec.model_copy(
        update={
            "train": spec.train.model_copy(update={"keep_best": True}),
            "checkpoint": CheckpointSpec(every_steps=2),
        }
    )
    shared = str(tmp_path / "checkpoints")
    first = run(spec, tmp_path / "first", "zero3", 2, 8, mutant="crash-at-6", checkpoint_dir=shared)
    assert first[0].code == ExitCode.CRASH
    _, summary = result_of(run(spec, tmp_path / "second", "zero3", 2, 8, checkpoint_dir=shared, attempt=2))
    assert (summary.steps, summary.best_step) == (STEPS, 2)
    assert float(differences(tmp_path / "second" / "model", reference.evaluations[2][1]).max()) <= 1e-5


def test_a_loss_that_stays_not_finite_ends_the_job(world: Path, tmp_path: Path) -> None:
    ended = run(job(world, max_steps=20, on_nonfinite="skip"), tmp_path, "single", 1, 16, mutant="nan-from-3")
    assert ended[0].code == ExitCode.USER_ERROR
    error = ended[0].error
    assert error is not None
    assert (error.code, error.message) == ("loss-not-finite", "the loss is nan at step 13, after 10 skipped steps")
