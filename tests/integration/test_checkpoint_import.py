"""Stock checkpoints of DeepSpeed and Accelerate become model directories with the same weights; bad ones do not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.programs import told_by
from tests.reshard import ENV_TASK
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert", hidden=96)
    write_messages(world / "messages.tsv", rows=60)
    return world


def stock(world: Path, engine: str, precision: str = "fp32") -> Path:
    """Written by two ranks, with the embeddings frozen; once for each engine and precision."""
    name = f"{engine}-{precision}"
    if not (world / f"{name}.pt").exists():
        spec = a_spec(
            world / "bert", world / "messages.tsv", data={"split": None},
            train={"precision": precision, "freeze": ["bert.embeddings.*"]},
        )  # fmt: skip
        contract = a_contract(world / "runs" / name, a_plan(spec, engine, 2, 4), spec)
        launched = start(contract, {ENV_TASK: json.dumps({"root": str(world), "stock": name})}, module="tests.reshard")
        launched.wait()
        assert (world / f"{name}.pt").exists(), launched.logs()
    return world / name


def convert(source: Path, model: Path, output: Path, status: int = 0, *, alone: bool = False) -> dict[str, Any]:
    """What the program prints; `alone` in a process of its own, as it is used."""
    words = [str(source), str(output), "--model", str(model)]
    return told_by("launch.checkpoint.stock", words, status, alone=alone)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("ddp", "fp32"), ("zero1", "fp32"), ("zero2", "bf16"), ("zero3", "fp32"), ("zero3", "bf16")],
)
def test_the_weights_are_those_that_were_trained(world: Path, tmp_path: Path, engine: str, precision: str) -> None:
    done = convert(stock(world, engine, precision), world / "bert", tmp_path / "model", alone=engine == "zero2")
    assert done["kind"] == ("accelerate" if engine == "ddp" else f"deepspeed-{engine}")
    found = load_file(tmp_path / "model" / "model.safetensors")
    held = torch.load(world / f"{engine}-{precision}.pt", weights_only=True)
    trained = {name.removeprefix("weight/"): t for name, t in held.items() if name.startswith("weight/")}
    assert len(trained) > 20
    assert all(torch.equal(found[name].view(-1), tensor) for name, tensor in trained.items())
    base = load_file(world / "bert" / "model.safetensors")["embeddings.word_embeddings.weight"]
    frozen = found["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(frozen, base, rtol=0, atol=0.02 if precision == "bf16" else 0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")(["win a prize"], return_tensors="pt")
    assert model(input_ids=tokens["input_ids"]).logits.shape == (1, 2)


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("fault", ["rank-missing", "torn", "latest-names-nothing", "harmful", "nothing"])
def test_what_is_not_whole_is_refused(world: Path, tmp_path: Path, fault: str) -> None:
    source = tmp_path / "stock"
    shutil.copytree(stock(world, "zero2", "bf16"), source)
    second = next(source.glob("*/*rank_1_*_optim_states.pt"))
    if fault == "rank-missing":
        second.unlink()
    elif fault == "torn":
        second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    elif fault == "latest-names-nothing":
        (source / "latest").write_text("global_step9")
    elif fault == "harmful":
        rewritten = tmp_path / "rewritten.pt"
        with zipfile.ZipFile(second) as old, zipfile.ZipFile(rewritten, "w") as new:
            for name in old.namelist():
                harmful = name.endswith("data.pkl")
                new.writestr(name, pickle.dumps(Harmful(tmp_path / "ran"), protocol=2) if harmful else old.read(name))
        rewritten.replace(second)
    else:
        shutil.rmtree(source)
        source.mkdir()
    error = convert(source, world / "bert", tmp_path / "model", status=1)["error"]
    expected = {"harmful": "import-unsafe", "nothing": "import-unknown"}
    assert error["code"] == expected.get(fault, "import-incomplete")
    assert error["hint"]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()
