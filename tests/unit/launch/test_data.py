"""Deduplication, splitting, class numbers, tokens and targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from launch.config import TrainSpec
from launch.data import IGNORED, class_names, collate, load_corpus
from launch.errors import DataError, SpecError
from launch.header import columns_of
from launch.model import load_tokenizer
from launch.parts import split_parts
from tests.worlds import a_spec, write_bert, write_llama


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def table(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def a_job(tmp_path: Path, bert: Path, rows: list[tuple[str, Any]], **data: Any) -> TrainSpec:
    return a_spec(bert, table(tmp_path / "train.jsonl", rows), data={"split": None, **data})


def parts(spec: TrainSpec) -> dict[str, list[str]]:
    return {name: part["text"] for name, part in split_parts(spec.data, columns_of(spec), classes=True).items()}


ROWS = [(f"text {i}", "ab"[i % 5 == 0]) for i in range(100)]


def test_the_split_is_seeded_complete_and_stratified(tmp_path: Path, bert: Path) -> None:
    spec = a_job(tmp_path, bert, ROWS, split={"test": 0.2, "validation": 0.1, "seed": 3, "stratify": True})
    cut = parts(spec)
    assert {name: len(texts) for name, texts in cut.items()} == {"train": 70, "test": 20, "validation": 10}
    assert sorted(text for texts in cut.values() for text in texts) == sorted(text for text, _ in ROWS)
    labels = dict(ROWS)
    assert sum(labels[text] == "b" for text in cut["test"]) == 4
    assert parts(spec) == cut
    other = a_job(tmp_path, bert, ROWS, split={"test": 0.2, "validation": 0.1, "seed": 4, "stratify": True})
    assert parts(other) != cut


def test_repeated_texts_stand_on_one_side_only(tmp_path: Path, bert: Path) -> None:
    twice = [*ROWS, *ROWS]
    cut = parts(a_job(tmp_path, bert, twice, deduplicate=True, split={"test": 0.5}))
    assert len(cut["train"]) == len(cut["test"]) == 50
    assert not set(cut["train"]) & set(cut["test"])
    held_out = table(tmp_path / "test.jsonl", ROWS[:10])
    cut = parts(a_job(tmp_path, bert, twice, deduplicate=True, test=str(held_out)))
    assert (len(cut["train"]), len(cut["test"])) == (90, 10)


def test_a_group_stands_on_one_side_only(tmp_path: Path, bert: Path) -> None:
    rows = [(f"text {i}", f"{'ab'[i % 2]}{i % 23}") for i in range(100)]
    group_of = dict(rows)
    for seed in range(5):
        split = {"test": 0.2, "validation": 0.1, "seed": seed, "group_column": "label"}
        cut = parts(a_job(tmp_path, bert, rows, split=split))
        groups = [{group_of[text] for text in texts} for texts in cut.values()]
        assert sum(len(part) for part in groups) == len(set(group_of.values()))
        assert sorted(text for texts in cut.values() for text in texts) == sorted(group_of)
        assert 20 <= len(cut["test"]) <= 24
        assert 6 <= len(cut["validation"]) <= 14
    with pytest.raises(DataError) as caught:
        parts(a_job(tmp_path, bert, [("a", "x"), ("b", "x")], split={"test": 0.5, "group_column": "label"}))
    assert caught.value.code == "empty-split"


def test_classes_are_numbered_in_sorted_order() -> None:
    assert class_names(["spam", "ham", "spam"]) == ("ham", "spam")
    assert class_names(["10", "9", "-1"]) == ("-1", "9", "10")
    assert class_names([2, 10, 1]) == ("1", "2", "10")


@pytest.mark.parametrize(
    ("rows", "data", "code", "field"),
    [
        ([("a", "x"), ("b", "x")], {}, "one-class", "data.label_column"),
        ([("a", "x"), ("b", None)], {}, "missing-value", "data.label_column"),
        ([("a", "x"), ("b", "")], {}, "missing-value", "data.label_column"),
        ([(None, "x"), ("b", "y")], {}, "missing-value", "data.text_column"),
        ([(7, "x"), ("b", "y")], {}, "not-text", "data.text_column"),
        ([("a", "x"), ("b", "y")], {"split": {"test": 0.1}}, "empty-split", "data.split.test"),
        ([("a", "x"), ("b", "y")], {"split": {"test": 0.9}}, "empty-split", "data.split"),
    ],
)
def test_unfit_data_is_refused(
    tmp_path: Path, bert: Path, rows: list[tuple[Any, Any]], data: dict[str, Any], code: str, field: str
) -> None:
    spec = a_job(tmp_path, bert, rows, **data)
    with pytest.raises(DataError) as caught:
        load_corpus(spec, load_tokenizer(spec.model))
    assert (caught.value.code, caught.value.field) == (code, field)
    assert caught.value.hint


def test_a_held_out_label_that_no_training_row_has_is_refused(tmp_path: Path, bert: Path) -> None:
    held_out = table(tmp_path / "test.jsonl", [("c", "z")])
    spec = a_job(tmp_path, bert, [("a", "x"), ("b", "y")], test=str(held_out))
    with pytest.raises(DataError, match=r"row 1 of data\.test has the label 'z'") as caught:
        load_corpus(spec, load_tokenizer(spec.model))
    assert caught.value.hint == "the classes are: x, y"


def test_rows_are_truncated_and_padded_to_the_longest_of_a_batch(tmp_path: Path, bert: Path) -> None:
    spec = a_job(tmp_path, bert, [("win " * 50, "x"), ("win a prize", "y"), ("ok", "x")], max_length=10)
    corpus = load_corpus(spec, load_tokenizer(spec.model))
    assert corpus.labels == ("x", "y")
    assert np.diff(corpus.train.offsets).tolist() == [10, 5, 3]
    batch = collate(corpus.train, np.array([2, 1]), 0, causal=False)
    assert batch.input_ids.shape == (2, 5)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.input_ids[0, 3:].tolist() == [0, 0]
    assert batch.targets.tolist() == [0, 1]


def test_the_fingerprint_is_the_contents(tmp_path: Path, bert: Path) -> None:
    def fingerprint(rows: list[tuple[str, str]]) -> str:
        spec = a_job(tmp_path, bert, rows)
        return load_corpus(spec, load_tokenizer(spec.model)).train.fingerprint()

    rows = [("win a prize", "x"), ("ok", "y"), ("see you", "x")]
    assert fingerprint(rows) == fingerprint(list(rows))
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([("win a prize", "y"), ("ok", "x"), ("see you", "x")])


def causal(tmp_path: Path, llama: Path, rows: list[dict[str, str]], **data: Any) -> TrainSpec:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return a_spec(llama, path, model={"task": "causal-lm"}, data={"split": None, **data})


DIALOGUE = {"prompt_column": "prompt", "response_column": "response"}


def targets(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of the tokens that each row's loss is on."""
    rows = load_corpus(spec, tokenizer).train
    batch = collate(rows, np.arange(len(rows)), 0, causal=True)
    assert rows.targets(np.arange(len(rows))) == int((batch.targets[:, 1:] != IGNORED).sum())
    return [tokenizer.decode(row[row != IGNORED]) for row in batch.targets]


def test_the_loss_is_on_the_response_alone(tmp_path: Path, llama: Path) -> None:
    spec = causal(tmp_path, llama, [{"prompt": "win a prize", "response": "stop"}], **DIALOGUE)
    tokenizer = load_tokenizer(spec.model)
    assert targets(spec, tokenizer) == ["stop</s>"]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert targets(spec, tokenizer) == ["stop\n"]


def test_a_text_is_all_target_and_ends(tmp_path: Path, llama: Path) -> None:
    spec = causal(tmp_path, llama, [{"text": "win a prize"}])
    tokenizer = load_tokenizer(spec.model)
    assert tokenizer.pad_token == "</s>"
    assert targets(spec, tokenizer) == [" a prize</s>"], "nothing stands before the first token"


def test_rows_without_a_target_within_max_length_are_left_out(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "win " * 30, "response": "ok"}, {"prompt": "win", "response": "stop"}]
    spec = causal(tmp_path, llama, rows, max_length=20, **DIALOGUE)
    tokenizer = load_tokenizer(spec.model)
    assert targets(spec, tokenizer) == ["stop</s>"]
    spec = causal(tmp_path, llama, rows[:1], max_length=20, **DIALOGUE)
    with pytest.raises(DataError) as caught:
        load_corpus(spec, tokenizer)
    assert caught.value.code == "no-targets"


CHATML = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATML_OF_THE_SECOND = "user:ok</s>assistant:love</s>"


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_dialogues_come_out_of_every_kind_of_file(tmp_path: Path, llama: Path) -> None:
    rows = [{"messages": chat("win a prize", "stop", "why", "sorry")}, {"messages": chat("ok", "love")}]
    (tmp_path / "template.jinja").write_text(CHATML)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        spec = a_spec(
            llama,
            tmp_path / name,
            model={"task": "causal-lm"},
            data={
                "split": None,
                "max_length": 96,
                "messages_column": "messages",
                "deduplicate": True,
                "chat_template": str(tmp_path / "template.jinja"),
            },
        )
        tokenizer = load_tokenizer(spec.model, spec.data.chat_template)
        assert targets(spec, tokenizer) == ["stop</s>sorry</s>", "love</s>"]
        everything = spec.model_copy(update={"data": spec.data.model_copy(update={"loss_on": "all"})})
        whole = tokenizer(CHATML_OF_THE_SECOND)["input_ids"]
        assert targets(everything, tokenizer)[1] == tokenizer.decode(whole[1:])
    with pytest.raises(DataError) as caught:
        load_corpus(spec, load_tokenizer(spec.model))
    assert caught.value.code == "no-chat-template"
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'ok' else 'a' }}"
    with pytest.raises(DataError, match="the train part that begins with 'ok': the chat template refuses") as caught:
        load_corpus(everything, tokenizer)
    assert caught.value.code == "template-refuses"


def test_rows_whose_answers_are_cut_off_are_counted(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "win " * 30, "response": "ok"}, {"prompt": "win", "response": "stop " * 30}]
    spec = causal(tmp_path, llama, rows, max_length=20, **DIALOGUE)
    corpus = load_corpus(spec, load_tokenizer(spec.model))
    assert corpus.dropped == {"train": 1}
    assert corpus.train.lengths.tolist() == [20]
    packed = spec.model_copy(update={"data": spec.data.model_copy(update={"packing": True})})
    assert load_corpus(packed, load_tokenizer(spec.model)).dropped == {"train": 1}


def test_a_template_that_is_no_file_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_tokenizer(causal(tmp_path, llama, [{"text": "a"}]).model, str(tmp_path / "absent.jinja"))
    assert (caught.value.code, caught.value.field) == ("file-unreadable", "data.chat_template")
