"""From the job file's data section to tokenised rows, the same on every rank.

On each node one rank makes them and the others read them from its cache, as later attempts do; where there is no cache,
every rank makes them. The ranks compare fingerprints before the first step (train.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from launch.chat import Tokens
from launch.config import DataSpec, OptimSpec, TrainSpec
from launch.encoding import all_cores, encoded, truncated
from launch.errors import DataError
from launch.header import columns_of
from launch.packing import block_diagonal, first_fit
from launch.parts import split_parts
from launch.sampler import Indices, Sampler
from launch.tables import Columns
from launch.token_cache import Entry, cache_from_environment
from launch.token_key import corpus_key

IGNORED = -100  # transformers' mark for a position without a target
ARRAYS = ("tokens", "offsets", "labels", "learned", "starts")
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of one part, flat: row i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None = None
    """sequence-classification: the class of each row."""
    learned: npt.NDArray[np.bool_] | None = None
    """causal-lm: for each token, whether it is a target. A text's first never is: nothing stands before it."""
    starts: npt.NDArray[np.int64] | None = None
    """Packed rows: where in `tokens` each text begins. Each row begins with one."""
    known_fingerprint: str | None = field(default=None, repr=False, compare=False)
    """Of rows out of the cache: hashing them takes longer than reading them."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """sequence-classification: the class of each row."""
        assert self.labels is not None
        return self.labels

    @property
    def target_mask(self) -> npt.NDArray[np.bool_]:
        """causal-lm: for each token, whether it is a target."""
        assert self.learned is not None
        return self.learned

    def targets(self, rows: Indices) -> int:
        """causal-lm: how many tokens of `rows` are predicted."""
        mask = self.target_mask
        return sum(int(mask[self.offsets[row] : self.offsets[row + 1]].sum()) for row in rows)

    def packed(self, capacity: int, seed: int) -> Rows:
        """The same texts, several to a row of at most `capacity` tokens, as a pure function of content and seed."""
        mask = self.target_mask
        packs = first_fit(self.lengths, capacity, self.fingerprint(), seed)
        order = np.concatenate(packs)
        tokens = np.concatenate([self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in order])
        learned = np.concatenate([mask[self.offsets[row] : self.offsets[row + 1]] for row in order])
        ends = np.cumsum(self.lengths[order])
        last = np.cumsum([len(pack) for pack in packs]) - 1
        return Rows(
            tokens,
            np.concatenate([[0], ends[last]]),
            learned=learned,
            starts=np.concatenate([[0], ends[:-1]]),
        )

    def fingerprint(self) -> str:
        """Hash of the content: equal fingerprints mean equal training data in the same order."""
        return self.known_fingerprint or self._hash

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256()
        for array in self.arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that there are, by name, in the order in which the fingerprint takes them."""
        found = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in found.items() if array is not None}


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
    dropped: dict[str, int] = field(default_factory=dict)
    """causal-lm: rows of each part that were left out because no target token lies within max_length."""

    def parts(self) -> dict[str, Rows]:
        """The parts that there are, by name."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: rows for name, rows in found.items() if rows is not None}

    def entry(self) -> Entry:
        """All of it, for the cache."""
        parts = self.parts()
        arrays = {f"{part}.{name}": array for part, rows in parts.items() for name, array in rows.arrays().items()}
        facts = {"labels": json.dumps(self.labels), "dropped": json.dumps(self.dropped)}
        return Entry(arrays, facts | {f"{part}.fingerprint": rows.fingerprint() for part, rows in parts.items()})

    @classmethod
    def of_entry(cls, entry: Entry) -> Corpus:
        """What `entry` was made of."""
        rows: dict[str, Rows] = {}
        for part in PARTS:
            arrays: dict[str, Any] = {name: entry.arrays.get(f"{part}.{name}") for name in ARRAYS}
            if arrays["tokens"] is not None:
                rows[part] = Rows(**arrays, known_fingerprint=entry.facts[f"{part}.fingerprint"])
        labels, dropped = json.loads(entry.facts["labels"]), json.loads(entry.facts["dropped"])
        return cls(rows["train"], rows.get("validation"), rows.get("test"), tuple(labels), dropped)


@dataclass(frozen=True)
class Batch:
    """Padded model inputs, each of shape (rows, longest row), and what they are compared with."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """Packed rows: (rows, 1, longest, longest), or None where the positions say it (flash attention)."""
    targets: torch.Tensor
    """sequence-classification: classes, (rows,). causal-lm: token ids or IGNORED, (rows, longest row)."""
    position_ids: torch.Tensor | None = None
    """Packed rows: the position of each token in its own text."""
    predicting: torch.Tensor | None = None
    """causal-lm: flat indices into (rows, longest row) of the positions whose next token is a target."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """This batch with every tensor as `change` makes it."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if one is None else change(one) for name, one in tensors.items()}
        return Batch(**changed)

    def to(self, device: torch.device) -> Batch:
        """On `device`; from pinned memory the copy does not hold up the host."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        named = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **{name: value for name, value in named.items() if value is not None}}


def load_corpus(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """What build_corpus makes, out of the cache if it was made before.

    Raises:
        DataError: whatever makes the data unfit, with the field at fault.
        SpecError: the environment gives the cache an impossible limit.
    """
    cache = cache_from_environment()
    if cache is None or not tokenizer.is_fast:  # a slow tokenizer does not tell all that it is
        return build_corpus(spec, tokenizer)

    def build(alone: bool) -> Entry:
        if not alone:
            return build_corpus(spec, tokenizer).entry()
        with all_cores() as cores:
            return build_corpus(spec, tokenizer, cores).entry()

    # A tokenizer keeps how it was last called, in what the key takes of it and in what is exported: let that be the
    # same whether or not this rank makes the rows.
    if spec.model.task == "sequence-classification":
        truncated([""], tokenizer, spec.data.max_length)
    else:
        tokenizer([""])
    return Corpus.of_entry(cache.fetch(lambda: corpus_key(spec, tokenizer), build))


def build_corpus(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, cores: int = 1) -> Corpus:
    """Read, deduplicate, split, number the classes and tokenise, on so many cores.

    Raises:
        DataError: whatever makes the data unfit, with the field at fault.
    """
    parts = split_parts(spec.data, columns_of(spec), classes=spec.model.task == "sequence-classification")
    if spec.model.task == "sequence-classification":
        labels, dropped = class_names(parts["train"][spec.data.label_column]), {}
        rows = {name: _classified(part, spec.data, labels, tokenizer, name) for name, part in parts.items()}
    else:
        labels = ()
        tokens = {name: encoded(part, spec.data, tokenizer, name, cores) for name, part in parts.items()}
        rows = {name: _useful(found, spec.data, name) for name, found in tokens.items()}
        dropped = {name: len(tokens[name]) - len(rows[name]) for name in rows}
        if spec.data.packing:
            rows["train"] = rows["train"].packed(spec.data.max_length, spec.train.seed)
    return Corpus(rows["train"], rows.get("validation"), rows.get("test"), labels, dropped)


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
    tokens = truncated(part[data.text_column], tokenizer, data.max_length)
    return Rows(*_flat(tokens), labels=np.asarray([numbers[value] for value in values], dtype=np.int64))


def _useful(encoded: list[Tokens], data: DataSpec, name: str) -> Rows:
    """Rows cut to max_length, without those whose answers all lie beyond it: they have nothing to learn from."""
    cut = [Tokens(ids[: data.max_length], learned[: data.max_length]) for ids, learned in encoded]
    useful = [tokens for tokens in cut if any(tokens.learned[1:])]
    if not useful:
        raise DataError(
            f"no row of data.{name} has a target token within {data.max_length} tokens",
            code="no-targets",
            field="data.max_length",
            hint="raise data.max_length, or shorten the prompts",
        )
    flat, offsets = _flat([tokens.ids for tokens in useful])
    learned = np.fromiter(chain.from_iterable(tokens.learned for tokens in useful), dtype=np.bool_, count=len(flat))
    learned[offsets[:-1]] = False
    return Rows(flat, offsets, learned=learned)


def _flat(tokens: list[list[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=int(offsets[-1]))
    return flat, offsets


def collate(rows: Rows, chosen: Indices, pad_token_id: int, *, causal: bool, varlen: bool = False) -> Batch:
    """`chosen` rows as tensors on the CPU, padded on the right to the longest of them.

    With `varlen` (packed rows, flash attention), one after the other in a single row without padding or mask: the
    restarting positions keep the texts apart.
    """
    lengths = rows.offsets[chosen + 1] - rows.offsets[chosen]
    shape = (len(chosen), int(lengths.max()))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for i, row in enumerate(chosen):
        here = slice(rows.offsets[row], rows.offsets[row + 1])
        ids = rows.tokens[here]
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        if causal:
            targets[i, : len(ids)] = np.where(rows.target_mask[here], ids, IGNORED)
    if not causal:
        targets = rows.classes[chosen]
    inputs, compared = torch.from_numpy(input_ids), torch.from_numpy(targets)
    if rows.starts is None:
        return Batch(inputs, torch.from_numpy(mask), compared, predicting=predicting(compared) if causal else None)
    positions, segments = (torch.from_numpy(array) for array in _places(rows, chosen, shape))
    if varlen:
        there = torch.from_numpy(mask).bool()
        inputs, compared, positions = (tensor[there][None] for tensor in (inputs, compared, positions))
        return Batch(inputs, None, compared, positions, predicting(compared))
    return Batch(inputs, block_diagonal(segments), compared, positions, predicting(compared))


def predicting(targets: torch.Tensor) -> torch.Tensor:
    """Flat indices of the positions of `targets`, (rows, longest), whose next token is one."""
    # A row's first token never is a target, so no row's last position predicts the first of the next.
    return (targets.flatten()[1:] != IGNORED).nonzero().flatten()


def _places(rows: Rows, chosen: Indices, shape: tuple[int, int]) -> tuple[Indices, Indices]:
    """Each token's position in its text, and the number of its text in the row; padding has the number -1."""
    assert rows.starts is not None
    positions, segments = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    for i, row in enumerate(chosen):
        first, end = rows.offsets[row], rows.offsets[row + 1]
        starts = rows.starts[np.searchsorted(rows.starts, first) : np.searchsorted(rows.starts, end)] - first
        segments[i, : end - first] = np.searchsorted(starts, np.arange(end - first), side="right") - 1
        positions[i, : end - first] = np.arange(end - first) - starts[segments[i, : end - first]]
    return positions, segments
