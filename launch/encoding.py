"""Columns to tokens, a thousand rows at a time: a fast tokenizer spreads a batch over its threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from launch.chat import Message, Tokens, encode
from launch.config import DataSpec
from launch.errors import DataError
from launch.tables import Columns

AT_ONCE = 1000  # rows
PARALLELISM = "TOKENIZERS_PARALLELISM"

T = TypeVar("T")


@contextlib.contextmanager
def all_cores(wanted: bool) -> Iterator[None]:
    """Lets tokenizers use every core meanwhile, if `wanted`. The launcher forbids it: its ranks share the cores, and
    afterwards threads and the forks of others do not go together."""
    before = os.environ.get(PARALLELISM)
    if wanted:
        os.environ[PARALLELISM] = "true"
    try:
        yield
    finally:
        if wanted and before is not None:
            os.environ[PARALLELISM] = before
        elif wanted:
            del os.environ[PARALLELISM]


def truncated(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text, special tokens included, no more than `max_length` of them."""
    found: list[list[int]] = []
    for batch in _batches(texts):
        found += tokenizer(list(batch), truncation=True, max_length=max_length)["input_ids"]
    return found


def encoded(part: Columns, data: DataSpec, tokenizer: PreTrainedTokenizerBase, name: str) -> list[Tokens]:
    """causal-lm: each row's tokens and targets, not yet cut to max_length. `name` is the part's, for errors.

    Raises:
        DataError: the chat template is missing, or does not suit the dialogues.
    """
    answers = data.loss_on == "answers"
    dialogues: list[list[Message]]
    if data.messages_column is not None:
        dialogues = part[data.messages_column]
    elif data.prompt_column is not None and data.response_column is not None:
        prompts, responses = part[data.prompt_column], part[data.response_column]
        if not tokenizer.chat_template:
            return _continued(prompts, responses, tokenizer, answers=answers)
        dialogues = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    else:
        return [Tokens(ids, [True] * len(ids)) for ids in _ended(part[data.text_column], tokenizer)]
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template to put dialogues into words",
            code="no-chat-template",
            field="data.messages_column",
            hint="name a file with one as data.chat_template",
        )

    found: list[Tokens] = []
    for batch in _batches(dialogues):
        found += encode(batch, [_named(dialogue, name) for dialogue in batch], tokenizer, answers=answers)
    return found


def _named(dialogue: list[Message], name: str) -> str:
    """A dialogue as errors name it: by its beginning, since after a split its number is not that in the file."""
    opening = next((message["content"] for message in dialogue if message["role"] != "system"), "")
    return f"the dialogue of the {name} part that begins with {opening[:60]!r}"


def _continued(
    prompts: Sequence[str], responses: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, answers: bool
) -> list[Tokens]:
    """Prompts and what follows each, of a model without a chat template."""
    heads = _tokenized(prompts, tokenizer)
    tails = _ended(responses, tokenizer, add_special_tokens=False)
    return [
        Tokens([*head, *tail], [not answers] * len(head) + [True] * len(tail))
        for head, tail in zip(heads, tails, strict=True)
    ]


def _ended(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> Iterator[list[int]]:
    """Token ids of each text, with the token that ends it, if there is one."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for ids in _tokenized(texts, tokenizer, add_special_tokens=add_special_tokens):
        yield [*ids, *end]


def _tokenized(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> Iterator[list[int]]:
    for batch in _batches(texts):
        yield from tokenizer(list(batch), add_special_tokens=add_special_tokens)["input_ids"]


def _batches(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
