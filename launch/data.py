"""From the job file's data section to tokenised rows, the same on every rank.

Every rank does all of it: the result is a few numpy arrays, and doing it once would need a place that all nodes
share. The ranks compare fingerprints before the first step (train.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from launch.config import DataSpec, OptimSpec, SplitSpec, TrainSpec
from launch.errors import DataError
from launch.header import columns_of
from launch.sampler import Indices, Sampler, shuffled
from launch.tables import Columns, read_columns

IGNORED = -100  # transformers' mark for a position without a target
TOKENIZE_AT_ONCE = 1000  # rows


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of one part, flat: row i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    """sequence-classification: the class. causal-lm: position in the row of its first target token."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def targets(self, rows: Indices) -> int:
        """causal-lm: how many tokens of `rows` are predicted; position 0 has nothing before it."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        return int((lengths - np.maximum(self.labels[rows], 1)).clip(min=0).sum())

    def fingerprint(self) -> str:
        """Hash of the content: equal fingerprints mean equal training data in the same order."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]


def sampler_for(rows: Rows, optim: OptimSpec) -> Sampler:
    """The order in which a job trains on `rows`."""
    lengths = rows.lengths if optim.group_by_length else None
    return Sampler(rows.fingerprint(), optim.seed, len(rows), optim.global_batch_size, lengths)


@dataclass(frozen=True)
class Corpus:
    """All parts of a job's data."""

    train: Rows
    validation: Rows | None
    test: Rows | None
    labels: tuple[str, ...]
    """Names of the classes by number; empty for causal-lm."""


@dataclass(frozen=True)
class Batch:
    """Padded model inputs, each of shape (rows, longest row), and what they are compared with."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    """sequence-classification: classes, (rows,). causal-lm: token ids or IGNORED, (rows, longest row)."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


def load_corpus(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read, deduplicate, split, number the classes and tokenise.

    Raises:
        DataError: whatever makes the data unfit, with the field at fault.
    """
    parts = split_parts(spec.data, columns_of(spec), classes=spec.model.task == "sequence-classification")
    if spec.model.task == "sequence-classification":
        labels = class_names(parts["train"][spec.data.label_column])
        rows = {name: _classified(part, spec.data, labels, tokenizer, name) for name, part in parts.items()}
    else:
        labels = ()
        rows = {name: _continued(part, spec.data, tokenizer, name) for name, part in parts.items()}
    return Corpus(rows["train"], rows.get("validation"), rows.get("test"), labels)


def split_parts(data: DataSpec, columns: dict[str, str], *, classes: bool) -> dict[str, Columns]:
    """Columns of each part that the job has: `train` always, `validation` and `test` from files or by the split."""
    parts = {"train": read_columns(data.train, columns, "train")}
    for part in ("validation", "test"):
        sources = getattr(data, part)
        if sources is not None:
            parts[part] = read_columns(sources, columns, part)
    for name, part_columns in parts.items():
        _check_values(part_columns, columns, name)
    texts = [column for field, column in columns.items() if field != "label_column"]
    if data.deduplicate:
        _deduplicate(parts, texts)
    if data.split is not None:
        labels = parts["train"][columns["label_column"]] if classes else None
        for name, chosen in _cut(len(parts["train"][texts[0]]), labels, data.split).items():
            source = parts.pop("train") if name == "rest" else parts["train"]
            parts["train" if name == "rest" else name] = _select(source, chosen)
    return parts


def _check_values(part: Columns, columns: dict[str, str], name: str) -> None:
    for field, column in columns.items():
        for row, value in enumerate(part[column]):
            if value is None or (value == "" and field == "label_column"):
                raise DataError(
                    f"row {row + 1} of data.{name} has no `{column}`",
                    code="missing-value",
                    field=f"data.{field}",
                    hint="fill it in, or remove the row",
                )
            if field != "label_column" and not isinstance(value, str):
                raise DataError(
                    f"row {row + 1} of data.{name}: `{column}` is {type(value).__name__}, not text",
                    code="not-text",
                    field=f"data.{field}",
                    hint="name the column that holds the text",
                )


def _deduplicate(parts: dict[str, Columns], texts: Sequence[str]) -> None:
    """Keep each text once, and keep it held out if it is held out: training gives way to test and validation."""
    seen: set[tuple[str, ...]] = set()
    for name in ("test", "validation", "train"):
        if name in parts:
            keep = []
            for row, key in enumerate(zip(*(parts[name][column] for column in texts), strict=True)):
                if key not in seen:
                    seen.add(key)
                    keep.append(row)
            parts[name] = _select(parts[name], np.asarray(keep, dtype=np.int64))
    if not parts["train"][texts[0]]:
        raise DataError(
            "every training text is repeated in the held-out files",
            field="data.deduplicate",
            hint="check that data.train and data.test are different files",
        )


def _cut(rows: int, labels: list[Any] | None, split: SplitSpec) -> dict[str, Indices]:
    """Row numbers of the parts cut off, and of the `rest` last; each in the order of the source."""
    order = shuffled(rows, "split", split.seed)
    if split.stratify and labels is not None:
        names = [str(label) for label in labels]
        groups = [order[[names[row] == name for row in order]] for name in sorted(set(names))]
    else:
        groups = [order]
    cut: dict[str, list[Indices]] = {"test": [], "validation": [], "rest": []}
    for group in groups:
        tests, validations = round(len(group) * split.test), round(len(group) * split.validation)
        for name, chosen in zip(cut, np.split(group, [tests, tests + validations]), strict=True):
            cut[name].append(chosen)
    result = {}
    for name, share in (("test", split.test), ("validation", split.validation), ("rest", 1.0)):
        chosen = np.sort(np.concatenate(cut[name]))
        if share > 0 and not len(chosen):
            raise DataError(
                f"{rows} rows are too few: the split leaves none for {'training' if name == 'rest' else name}",
                code="empty-split",
                field="data.split" if name == "rest" else f"data.split.{name}",
                hint="add data, or change the shares",
            )
        if share > 0:
            result[name] = chosen
    return result


def _select(part: Columns, rows: Indices) -> Columns:
    return {column: [values[row] for row in rows] for column, values in part.items()}


def class_names(values: list[Any]) -> tuple[str, ...]:
    """The classes in the order of their numbers: sorted, as numbers where all of them are.

    Raises:
        DataError: fewer than two classes.
    """
    unique = {str(value) for value in values}
    if len(unique) < 2:
        raise DataError(
            f"the training data has one class only: {unique.pop()!r}",
            code="one-class",
            field="data.label_column",
            hint="classification needs at least two",
        )
    numbers = all(value.lstrip("-").isdigit() for value in unique)
    return tuple(sorted(unique, key=int) if numbers else sorted(unique))


def _classified(
    part: Columns, data: DataSpec, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, name: str
) -> Rows:
    numbers = {label: number for number, label in enumerate(labels)}
    values = [str(value) for value in part[data.label_column]]
    for row, value in enumerate(values):
        if value not in numbers:
            raise DataError(
                f"row {row + 1} of data.{name} has the label {value!r}, which no training row has",
                code="unseen-label",
                field=f"data.{name}",
                hint=f"the classes are: {', '.join(labels)}",
            )
    texts = part[data.text_column]
    tokens: list[list[int]] = []
    for start in range(0, len(texts), TOKENIZE_AT_ONCE):
        encoded = tokenizer(texts[start : start + TOKENIZE_AT_ONCE], truncation=True, max_length=data.max_length)
        tokens.extend(encoded["input_ids"])
    return _flat(tokens, [numbers[value] for value in values])


def _continued(part: Columns, data: DataSpec, tokenizer: PreTrainedTokenizerBase, name: str) -> Rows:
    tokens, starts = [], []
    if data.prompt_column is not None and data.response_column is not None:
        for prompt, response in zip(part[data.prompt_column], part[data.response_column], strict=True):
            ids, start = _answered(prompt, response, tokenizer)
            tokens.append(ids[: data.max_length])
            starts.append(start)
    else:
        for text in part[data.text_column]:
            ids = [*tokenizer(text)["input_ids"], *_end(tokenizer)]
            tokens.append(ids[: data.max_length])
            starts.append(0)
    # A row whose response begins beyond max_length has nothing to learn from.
    useful = [i for i, (ids, start) in enumerate(zip(tokens, starts, strict=True)) if len(ids) > max(start, 1)]
    if not useful:
        raise DataError(
            f"no row of data.{name} has a target token within {data.max_length} tokens",
            code="no-targets",
            field="data.max_length",
            hint="raise data.max_length, or shorten the prompts",
        )
    return _flat([tokens[i] for i in useful], [starts[i] for i in useful])


def _answered(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of a dialogue of one turn, and where the response starts in them."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": response}], tokenize=False, add_generation_prompt=False
        )
        assert isinstance(asked, str)
        assert isinstance(whole, str)
        # Templates that strip or rewrite the dialogue's start break the prefix; then the response is put after it.
        answered = whole[len(asked) :] if whole.startswith(asked) else response + (tokenizer.eos_token or "")
        head = tokenizer(asked, add_special_tokens=False)["input_ids"]
        return [*head, *tokenizer(answered, add_special_tokens=False)["input_ids"]], len(head)
    head = tokenizer(prompt)["input_ids"]
    return [*head, *tokenizer(response, add_special_tokens=False)["input_ids"], *_end(tokenizer)], len(head)


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _flat(tokens: list[list[int]], labels: list[int]) -> Rows:
    offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    flat = np.fromiter((token for ids in tokens for token in ids), dtype=np.int32, count=int(offsets[-1]))
    return Rows(flat, offsets, np.asarray(labels, dtype=np.int64))


def collate(rows: Rows, chosen: Indices, pad_token_id: int, *, causal: bool) -> Batch:
    """`chosen` rows as tensors on the CPU, padded on the right to the longest of them."""
    lengths = rows.offsets[chosen + 1] - rows.offsets[chosen]
    shape = (len(chosen), int(lengths.max()))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for i, row in enumerate(chosen):
        ids = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]]
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        start = rows.labels[row]
        if causal:
            targets[i, start : len(ids)] = ids[start:]
    if not causal:
        targets = rows.labels[chosen]
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(targets))
