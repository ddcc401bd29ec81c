"""Packs: every row once, none too long, none seeing another; and the training they give is that without packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from launch.config import TrainSpec
from launch.data import IGNORED, Batch, Rows, collate, load_corpus
from launch.errors import SpecError
from launch.model import load_tokenizer
from launch.packing import OPEN_PACKS, check_packable, first_fit
from tests.references import answer_loss
from tests.worlds import a_spec, write_dialogues, write_gpt2, write_llama


def some_rows(lengths: list[int]) -> Rows:
    """Texts of the given lengths whose tokens are all different."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    learned = np.arange(offsets[-1]) % 3 != 0
    learned[offsets[:-1]] = False
    return Rows(np.arange(offsets[-1], dtype=np.int32), offsets, learned=learned)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@given(LENGTHS, st.integers(40, 90), st.integers(0, 3))
def test_every_row_is_in_one_pack_and_none_is_too_long(lengths: list[int], capacity: int, seed: int) -> None:
    sizes = np.asarray(lengths)
    packs = first_fit(sizes, capacity, "content", seed)
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
    filled = [int(sizes[pack].sum()) for pack in packs]
    assert max(filled) <= capacity
    assert sum(2 * size <= capacity for size in filled) <= 1, "two packs that are half empty would have been one"
    again = first_fit(sizes, capacity, "content", seed)
    assert [pack.tolist() for pack in packs] == [pack.tolist() for pack in again]


def test_more_packs_than_are_kept_open() -> None:
    sizes = np.concatenate([np.full(3 * OPEN_PACKS, 60), np.full(OPEN_PACKS, 40)])
    packs = first_fit(sizes, 100, "content", 0)
    assert sorted(np.concatenate(packs)) == list(range(len(sizes)))
    assert max(int(sizes[pack].sum()) for pack in packs) <= 100
    assert len(packs) < 3.2 * OPEN_PACKS


@given(LENGTHS, st.integers(40, 90))
def test_a_token_sees_its_own_text_and_nothing_after_itself(lengths: list[int], capacity: int) -> None:
    rows = some_rows(lengths)
    packed = rows.packed(capacity, seed=1)
    everything = np.arange(len(packed))
    assert packed.lengths.max() <= capacity
    assert packed.targets(everything) == rows.targets(np.arange(len(rows)))
    batch = collate(packed, everything, -1, causal=True)
    assert batch.attention_mask is not None
    assert batch.position_ids is not None
    text_of = np.repeat(np.arange(len(rows)), rows.lengths)
    place_in = np.concatenate([np.arange(length) for length in rows.lengths])
    seen = []
    for i in everything:
        ids = batch.input_ids[i][batch.input_ids[i] >= 0].numpy()
        seen.extend(ids.tolist())
        expected = (text_of[ids][:, None] == text_of[ids][None, :]) & np.tri(len(ids), dtype=bool)
        assert (batch.attention_mask[i, 0, : len(ids), : len(ids)].numpy() == expected).all()
        assert not batch.attention_mask[i, 0, : len(ids), len(ids) :].any()
        assert batch.attention_mask[i, 0].any(dim=-1).all(), "a token that sees nothing has no softmax"
        assert (batch.position_ids[i, : len(ids)].numpy() == place_in[ids]).all()
        targets = batch.targets[i, : len(ids)].numpy()
        assert (targets == np.where(rows.target_mask[ids], ids, IGNORED)).all()
    assert sorted(seen) == list(range(int(rows.offsets[-1])))
    flat = collate(packed, everything, -1, causal=True, varlen=True)
    assert flat.attention_mask is None
    assert flat.position_ids is not None
    assert flat.input_ids[0].tolist() == packed.tokens.tolist()
    assert flat.position_ids[0].tolist() == place_in[packed.tokens].tolist()


def test_packs_depend_on_content_and_seed() -> None:
    lengths = [3 + i % 17 for i in range(60)]
    packs = some_rows(lengths).packed(64, seed=0)
    assert packs.fingerprint() == some_rows(lengths).packed(64, seed=0).fingerprint()
    assert packs.fingerprint() != some_rows(lengths).packed(64, seed=1).fingerprint()


def spec_of(model: Path, data: Path, **changes: object) -> TrainSpec:
    return a_spec(
        model,
        data,
        model={"task": "causal-lm"},
        data={"split": None, "max_length": 96, "prompt_column": "prompt", "response_column": "response", **changes},
    )


def loss_and_gradients(model: torch.nn.Module, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = answer_loss(model(**batch.inputs()).logits, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("write", [write_llama, write_gpt2], ids=["llama", "gpt2"])
def test_packed_training_is_unpacked_training(tmp_path: Path, write: object) -> None:
    assert callable(write)
    spec = spec_of(write(tmp_path / "model"), write_dialogues(tmp_path / "rows.jsonl", rows=40), packing=True)
    tokenizer = load_tokenizer(spec.model)
    packed = load_corpus(spec, tokenizer).train
    rows = load_corpus(spec_of(tmp_path / "model", tmp_path / "rows.jsonl"), tokenizer).train
    assert len(packed) < len(rows) / 2
    terms = rows.targets(np.arange(len(rows)))
    assert terms == packed.targets(np.arange(len(packed)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    plain, wanted = loss_and_gradients(model, collate(rows, np.arange(len(rows)), 1, causal=True))
    together = collate(packed, np.arange(len(packed)), 1, causal=True)
    loss, gradients = loss_and_gradients(model, together)
    assert loss / terms == pytest.approx(plain / terms, abs=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient / terms, wanted[name] / terms, rtol=0, atol=1e-5, msg=name)
    # What would go wrong without the mask is far larger than the tolerance.
    assert together.attention_mask is not None
    leaky = Batch(
        together.input_ids, torch.ones_like(together.attention_mask).tril(), together.targets, together.position_ids
    )
    assert abs(loss_and_gradients(model, leaky)[0] - plain) / terms > 1e-4


def test_a_model_that_cannot_keep_rows_apart_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    with pytest.raises(SpecError, match="runs eager") as caught:
        check_packable(eager, 64)
    assert (caught.value.code, caught.value.field) == ("cannot-pack", "model.attn_implementation")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    check_packable(model, 64)
    model.config.sliding_window = 32
    with pytest.raises(SpecError, match="looks back 32 tokens"):
        check_packable(model, 64)
    check_packable(model, 32)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(SpecError, match="layers of type linear_attention"):
        check_packable(model, 32)
