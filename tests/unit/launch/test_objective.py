"""How a loss is computed is found out before the first batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel, PreTrainedModel

from launch.config import LossMode, OptimSpec
from launch.engine import Engine
from launch.errors import SpecError
from launch.footprint import TracedEngine
from launch.objective import check_loss_mode, objective_of
from tests.worlds import a_spec, write_bert, write_gpt2, write_llama

CPU = torch.device("cpu")


class Halved(GPT2LMHeadModel):
    """Does something to its logits."""

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def a_model(folder: Path, kind: str) -> PreTrainedModel:
    if kind == "bert":
        return AutoModelForSequenceClassification.from_pretrained(write_bert(folder))
    model = AutoModelForCausalLM.from_pretrained(write_llama(folder) if kind == "llama" else write_gpt2(folder))
    if kind == "halved":
        model.__class__ = Halved
    return model


def probed(model: PreTrainedModel, wished: LossMode) -> LossMode:
    task = "causal-lm" if model.get_output_embeddings() is not None else "sequence-classification"
    objective = objective_of(a_spec(Path("/m"), Path("/d"), model={"task": task}), model, None, wished)
    return objective.probe(cast(Engine, TracedEngine(model, None)), CPU)


@pytest.mark.parametrize(
    ("kind", "wished", "found"),
    [
        ("llama", "chunked", "chunked"),
        ("llama", "whole", "whole"),
        ("gpt2", "chunked", "chunked"),
        ("halved", "chunked", "whole"),
        ("bert", "chunked", "whole"),
    ],
)
def test_chunks_are_made_where_the_model_allows_it_and_they_are_wished(
    tmp_path: Path, kind: str, wished: LossMode, found: LossMode
) -> None:
    assert probed(a_model(tmp_path / "m", kind), wished) == found


def test_finding_out_draws_no_random_numbers_and_leaves_no_gradients(tmp_path: Path) -> None:
    model = a_model(tmp_path / "m", "gpt2").train()  # with dropout
    state = torch.get_rng_state()
    assert probed(model, "chunked") == "chunked"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("wished", ["chunked", "whole"])
def test_both_are_the_same_training(tmp_path: Path, wished: LossMode) -> None:
    model = a_model(tmp_path / "m", "llama").eval()
    spec = a_spec(Path("/m"), Path("/d"), model={"task": "causal-lm"})
    engine = cast(Engine, TracedEngine(model, None))
    ids = torch.arange(24).view(2, 12) + 3
    batch: Any = SimpleNamespace(
        targets=ids,
        predicting=torch.tensor([0, 3, 12, 20]),
        inputs=lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    )
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits.flatten(0, 1)[batch.predicting],
        ids.flatten()[batch.predicting + 1],
        reduction="sum",
    )
    objective = objective_of(spec, model, None, wished)
    assert objective.probe(engine, CPU) == wished
    torch.testing.assert_close(objective.summed(engine, batch), expected)


def test_chunks_that_were_asked_for_by_name_are_not_quietly_left_out() -> None:
    asked = OptimSpec(max_steps=1, loss_mode="chunked")
    check_loss_mode(asked, "chunked")
    with pytest.raises(SpecError) as told:
        check_loss_mode(asked, "whole")
    assert (told.value.code, told.value.field, bool(told.value.hint)) == (
        "loss-mode-not-available",
        "train.loss_mode",
        True,
    )
    for wish in (None, "whole"):
        check_loss_mode(asked.model_copy(update={"loss_mode": wish}), "whole")
