"""What is traced without memory, against models that are there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

import launch.footprint
from launch.attempt import ExitCode
from launch.config import TrainSpec
from launch.dropout import drop_cheaply
from launch.engine import Engine
from launch.engine_config import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from launch.footprint import (
    DTYPES,
    Mode,
    NoMemory,
    TracedEngine,
    batch_of,
    convert,
    depth_of,
    footprint,
    modes,
    optimizer_bytes,
    passes_of,
    rows_to_trace,
    traced_model,
    traces,
)
from launch.footprint_record import Footprint
from launch.instructions import NO_INT8, multiplies_int8
from launch.int8 import multiply_in_int8
from launch.layers import by_layer
from launch.ledger import Ledger
from launch.model import build_model, weight_decay_groups
from launch.objective import objective_of
from launch.optimizers import make_optimizer, state_bytes
from tests.worlds import a_spec, write_bert, write_gpt2, write_llama

ROWS = (1, 3)
LENGTH = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_llama(world / "llama")
    write_gpt2(world / "gpt2")
    return world


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 tokens, so that small batches have several."""
    monkeypatch.setattr(launch.head, "CHUNK_BYTES", 16 * 4 * 320)


@pytest.fixture
def narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these multiply bytes, too, where they are asked to."""
    monkeypatch.setattr(launch.int8, "NARROWEST", 16)


def a_job(world: Path, kind: str, **changes: Any) -> TrainSpec:
    """With the dropout of its configuration; nothing is read of the data."""
    task = "sequence-classification" if kind == "bert" else "causal-lm"
    model = {"task": task, "dropout": 0.1} | changes.pop("model", {})
    return a_spec(world / kind, world / "none.tsv", model=model, data={"max_length": LENGTH}, **changes)


def built(spec: TrainSpec, *, checkpointing: bool = False) -> PreTrainedModel:
    """As train.py does."""
    labels = ("0", "1") if spec.model.task == "sequence-classification" else ()
    model = build_model(spec, labels, 0, checkpointing=checkpointing)
    drop_cheaply(model)
    return model


def ledger_of(spec: TrainSpec, mode: Mode) -> Iterator[tuple[int, ...]]:
    """A real pass for each of ROWS: beside gradients, with them, at the loss, in bytes."""
    model = built(spec, checkpointing=mode.checkpointing)
    if mode.native:
        convert(model, DTYPES[mode.precision])
    if mode.precision == "int8":
        multiply_in_int8(model)
    model.train()
    objective = objective_of(spec, model, None, mode.loss)
    engine = cast(Engine, TracedEngine(model, None if mode.native else DTYPES[mode.precision]))
    assert objective.probe(engine, torch.device("cpu")) == mode.loss
    model.train()
    ledger = Ledger(BUCKET_ELEMENTS)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.ignore(tensor)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: ledger.note_gradient(cast(Any, weight.grad)))
    for rows in ROWS:
        batch = batch_of(spec, rows, LENGTH, "cpu")
        if not spec.data.packing:
            assert batch.attention_mask is not None
            batch.attention_mask[0, -1] = (
                0  # else transformers sees that it needs no mask; a trace takes it to need one
            )
        before = ledger.live
        ledger.forget_peaks()
        with ledger:
            loss = objective.summed(engine, batch.map(torch.clone)) / 2.0
            at_loss = ledger.live
            loss.backward()
        yield tuple(top - before for top in (ledger.most_beside, ledger.most, at_loss))
        del loss
        model.zero_grad()


LORA = {"adapter": {"type": "lora", "r": 4}}
PACKED = {"data": {"packing": True, "max_length": LENGTH}}
CASES = [
    pytest.param("bert", LORA, Mode("fp32", False, True, "whole"), id="bert-lora-checkpointing"),
    pytest.param("bert", {}, Mode("bf16", False, False, "whole"), id="bert-autocast"),
    pytest.param("bert", {}, Mode("bf16", True, False, "whole"), id="bert-native"),
    pytest.param("bert", {}, Mode("int8", False, False, "whole"), id="bert-int8"),
    pytest.param("llama", LORA, Mode("int8", False, True, "chunked"), id="llama-lora-int8-checkpointing"),
    pytest.param("llama", {}, Mode("fp32", False, True, "chunked"), id="llama-chunked-checkpointing"),
    pytest.param("llama", PACKED, Mode("bf16", False, False, "chunked"), id="llama-packed-autocast"),
    pytest.param("llama", LORA, Mode("bf16", True, True, "whole"), id="llama-lora-native-checkpointing"),
    pytest.param("gpt2", {}, Mode("bf16", True, False, "chunked"), id="gpt2-native"),
    pytest.param("gpt2", LORA, Mode("fp32", False, False, "chunked"), id="gpt2-lora"),
]


@pytest.mark.usefixtures("small_chunks", "narrow_layers")
@pytest.mark.parametrize(("kind", "changes", "mode"), CASES)
def test_a_trace_is_what_a_real_model_makes(world: Path, kind: str, changes: dict[str, Any], mode: Mode) -> None:
    data = changes.get("data", {})
    spec = a_job(world, kind, train={"precision": mode.precision}, **{k: v for k, v in changes.items() if k != "data"})
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=data)})
    if mode.precision == "int8" and not multiplies_int8():
        pytest.skip(NO_INT8)
    real = list(ledger_of(spec, mode))
    with NoMemory():
        traced = traces(spec, mode, ROWS, LENGTH, "cpu", None)
    for found, expected in zip(traced, real, strict=True):
        assert found.loss == mode.loss
        assert (found.beside, found.most, found.at_loss) == pytest.approx(expected, rel=0.005, abs=512)
        assert found.at_loss <= found.beside <= found.most
        assert found.beside <= found.reducing <= found.halving


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_a_model_without_memory_has_the_real_ones_parameters(world: Path, kind: str, changes: dict[str, Any]) -> None:
    spec = a_job(world, kind, **changes)
    real = {name: (weight.shape, weight.requires_grad) for name, weight in built(spec).named_parameters()}
    with NoMemory():
        model = traced_model(spec, checkpointing=False, device="cpu")
        assert {name: (weight.shape, weight.requires_grad) for name, weight in model.named_parameters()} == real


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("changes", [LORA, {"train": {"freeze": ["bert.embeddings.*"]}}], ids=["lora", "freeze"])
def test_an_optimizer_remembers_what_it_does_really(world: Path, optimizer: str, changes: dict[str, Any]) -> None:
    spec = a_job(world, "bert", **(changes | {"train": {"optimizer": optimizer, **changes.get("train", {})}}))
    model = built(spec)
    groups = weight_decay_groups(model, spec.train.weight_decay)
    real = make_optimizer(by_layer(groups, model, spec.train.layer_decay), spec.train)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    ledger = Ledger()
    for parameter in model.parameters():
        ledger.ignore(parameter)
        if parameter.grad is not None:
            ledger.ignore(parameter.grad)
    with ledger:
        real.step()
    with NoMemory():
        kept, beside = optimizer_bytes(spec, traced_model(spec, checkpointing=False, device="cpu"))
    assert kept == state_bytes(real) > 0
    assert beside == ledger.most - ledger.live


@pytest.fixture(scope="module")
def whole(world: Path) -> tuple[TrainSpec, Footprint]:
    """As a job of a yard is traced, with all that is open, but for checkpointing to make it short."""
    spec = a_job(world, "llama", strategy="auto", train={"activation_checkpointing": False, "micro_batch_size": 3})
    return spec, footprint(spec)


def test_a_footprint_counts_the_real_model(whole: tuple[TrainSpec, Footprint]) -> None:
    spec, found = whole
    sizes = [parameter.numel() for parameter in built(spec).parameters()]
    assert (found.source, found.reason, found.length) == ("traced", None, LENGTH)
    assert (found.parameters, found.trainable) == (sum(sizes), sum(sizes))
    assert found.moments_bytes == 8 * sum(sizes)
    assert found.small == sum(size for size in sizes if size <= PERSISTENT_ELEMENTS)
    assert found.largest == max(sizes)
    assert found.vocabulary * 32 == max(sizes)
    assert found.buffers_bytes > 0
    assert found.runtime_bytes is not None
    assert found.runtime_bytes > found.code_bytes > 1 << 20


def test_a_footprint_has_a_pass_for_every_plan_that_is_open(whole: tuple[TrainSpec, Footprint]) -> None:
    _, found = whole
    ways = {(one.native, one.activation_checkpointing, one.loss) for one in found.passes}
    assert ways == {(False, False, "chunked"), (False, False, "whole")}
    for one in found.passes:
        assert 3 in cast(Any, one.beside_gradients).rows, "the micro-batch that the job file asks for"
        assert one.with_gradients.at(3) >= one.beside_gradients.at(3) >= one.at_loss.at(3) > 0


def test_what_the_job_file_fixes_is_not_traced_otherwise(world: Path) -> None:
    def ways(kind: str = "llama", **keys: Any) -> list[tuple[str, bool, bool, str]]:
        return [tuple(mode) for mode in modes(a_job(world, kind, **keys))]

    assert len(ways(strategy="auto", train={"precision": "bf16"})) == 8
    assert len(ways(strategy="auto")) == 4, "in fp32 nothing is cast"
    assert {native for _, native, *_ in ways(strategy="zero2", train={"precision": "bf16"})} == {True}
    assert {native for _, native, *_ in ways(strategy="ddp", train={"precision": "bf16"})} == {False}
    fixed = {"activation_checkpointing": True, "loss_mode": "whole"}
    assert ways(train=fixed) == [("fp32", False, True, "whole")]
    open_ = ways(strategy="zero2", train=fixed | {"precision": "auto"})
    assert open_ == [("fp32", False, True, "whole"), ("bf16", True, True, "whole")]
    assert {loss for *_, loss in ways("bert")} == {"whole"}
    assert ways(strategy="auto", train=fixed | {"precision": "int8"}) == [("int8", False, True, "whole")]


def test_rows_are_where_chunks_are_full() -> None:
    spec = a_spec(Path("/m"), Path("/d"), model={"task": "causal-lm"})
    one, full, twice = rows_to_trace(spec, 1024, 128256)
    assert (one, twice) == (1, 2 * full)
    assert 4 * 128256 * 1024 * (full - 1) >= launch.head.CHUNK_BYTES
    assert rows_to_trace(a_spec(Path("/m"), Path("/d")), 64, 100) == (1, 8)


def test_a_deep_model_is_extrapolated_from_a_few_layers(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((world / "llama" / "config.json").read_bytes()) | {"num_hidden_layers": 13}
    folder = world / "deep"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))  # neither weights nor a tokenizer
    spec = a_job(world, "deep")
    with NoMemory():
        assert depth_of(traced_model(spec, checkpointing=False, device="cpu")) == 13
    with NoMemory():
        few = passes_of(spec, Mode("fp32", False, False, "whole"), (1, 4), LENGTH, "cpu", 13)
        monkeypatch.setattr(launch.footprint, "DEEP", 13)
        every = passes_of(spec, Mode("fp32", False, False, "whole"), (1, 4), LENGTH, "cpu", 13)
    for name in ("beside_gradients", "with_gradients", "while_reducing", "while_halving", "at_loss"):
        for rows in (1, 4):
            found, expected = (getattr(one, name).at(rows) for one in (few, every))
            assert found == pytest.approx(expected, rel=0.01), (name, rows)


def test_as_a_program_it_ends_with_one_line_of_json(world: Path) -> None:
    """A job file as a yard takes it: `strategy: auto`, and keys that are not for training. With an adapter and a head
    that is trained with it, which has ended in a crash after the last line."""
    job = {
        "name": "job", "strategy": "auto", "resources": {"num_processes": 2}, "priority": 3,
        "model": {"name_or_path": "bert", "task": "sequence-classification"}, "data": {"train": "none.tsv"},
        "train": {"max_steps": 1, "activation_checkpointing": False}, "adapter": {"type": "lora"},
    }  # fmt: skip
    (world / "job.yaml").write_text(json.dumps(job))
    argv = [sys.executable, "-m", "launch.footprint", "--config", str(world / "job.yaml")]
    argv += ["--set", "data.max_length=16", "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Footprint.model_validate_json(done.stdout.splitlines()[-1]).length == 16


def test_as_a_program_it_refuses_what_is_no_model(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = a_job(world, "nowhere", strategy="auto")
    (world / "spec.json").write_text(spec.model_dump_json())
    monkeypatch.setattr(sys, "argv", ["launch.footprint", "--spec", str(world / "spec.json")])
    with pytest.raises(SystemExit) as ended:
        launch.footprint.main()
    assert ended.value.code == ExitCode.USER_ERROR
    told = capsys.readouterr()
    assert told.out == ""
    assert "error[model-not-loaded]" in told.err
