"""`vocabulary: used` is the same training with less to hold, on every engine, and the model directory is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.config import TrainSpec
from launch.contract import ExitCode
from launch.data import load_corpus
from launch.model import load_tokenizer
from launch.vocabulary import tokens_of
from tests.attempts import Job, losses
from tests.programs import told_by
from tests.worlds import a_spec, write_bert, write_messages

STEPS = 14
TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=147)
    return world


def job(world: Path, vocabulary: str, precision: str = "fp32", steps: int = STEPS) -> TrainSpec:
    return a_spec(
        world / "bert", world / "messages.tsv", model={"vocabulary": vocabulary}, checkpoint={"every_steps": steps},
        train={"max_steps": steps, "learning_rate": 1e-2, "precision": precision, "adam_epsilon": 1e-4},
    )  # fmt: skip


def unused_of(spec: TrainSpec) -> torch.Tensor:
    """Booleans by token: what none of the parts has."""
    corpus = load_corpus(spec, load_tokenizer(spec.model))
    table = load_file(Path(spec.model.name_or_path) / "model.safetensors")[TABLE.removeprefix("bert.")]
    unused = torch.ones(len(table), dtype=torch.bool)
    unused[torch.from_numpy(tokens_of(corpus.parts().values(), 0))] = False
    assert 5 < unused.sum() < len(table) - 30
    return unused


def test_moved_from_engine_to_engine(world: Path, tmp_path: Path) -> None:
    """Losses and rows that are used are those of the whole table; the others are the base's to the bit."""
    whole, used = Job(job(world, "whole"), tmp_path / "whole"), Job(job(world, "used"), tmp_path / "used")
    expected = losses(whole.run("single", 1))
    used.run("single", 1, stop_at=4)
    used.run("zero3", 2, stop_at=8)
    used.run("zero2", 2, stop_at=11)
    assert losses(used.run("ddp", 2)) == pytest.approx(expected, abs=2e-5)
    directory = Path(used.attempts[-1].contract.output_dir)
    reference = load_file(Path(whole.attempts[-1].contract.output_dir) / "model.safetensors")
    found = load_file(directory / "model.safetensors")
    unused = unused_of(used.spec)
    assert found.keys() == reference.keys()
    base = load_file(world / "bert" / "model.safetensors")[TABLE.removeprefix("bert.")]
    assert torch.equal(found[TABLE][unused], base[unused])
    assert not torch.equal(reference[TABLE][unused], base[unused]), "weight decay"
    reference[TABLE][unused] = base[unused]
    for name, weight in reference.items():
        assert float((found[name] - weight).abs().max()) < 1e-4, name
    held = used.catalogue.manifest(used.catalogue.listing().committed[0]).tensors
    assert held[f"exp_avg/{TABLE}"].shape[0] == int((~unused).sum())
    told_by("launch.checkpoint.export", [used.store, f"step-{STEPS}.attempt-4", str(tmp_path / "exported")])
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)


def test_other_held_out_data_are_no_other_tokens_for_the_same_rows(world: Path, tmp_path: Path) -> None:
    """As many tokens as before, one of them another: what was saved would be taken for that one's."""
    held_out = tmp_path / "test.tsv"
    held_out.write_text("text\tlabel\nb\tham\n")
    spec = job(world, "used")
    data = spec.data.model_copy(update={"split": None, "test": (str(held_out),)})
    used = Job(spec.model_copy(update={"data": data}), tmp_path / "used")
    used.run("single", 1, stop_at=2)
    held_out.write_text("text\tlabel\nc\tham\n")
    launched = used.begin("single", 1)
    error = launched.wait()[0].error
    assert error is not None, launched.logs()
    assert error.code == "data-changed"


def test_in_half_precision(world: Path, tmp_path: Path) -> None:
    """ZeRO-3 casts what it shards as it is made."""
    used = Job(job(world, "used", "bf16", steps=3), tmp_path)
    assert used.run("zero3", 2)[0].code == ExitCode.DONE
    found = load_file(Path(used.attempts[-1].contract.output_dir) / "model.safetensors")
    base = load_file(world / "bert" / "model.safetensors")[TABLE.removeprefix("bert.")]
    unused = unused_of(used.spec)
    assert torch.equal(found[TABLE][unused], base[unused].to(found[TABLE].dtype))
    assert not torch.equal(found[TABLE][~unused], base[~unused].to(found[TABLE].dtype))
