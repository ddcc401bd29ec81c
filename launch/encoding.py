"""Columns to tokens, a thousand rows at a time: a fast tokenizer spreads a batch over its threads.

What comes before it in a dialogue, the chat template, is Python and takes longer. Many dialogues are therefore shared
out to processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from launch.chat import Message, Tokens, encode
from launch.config import DataSpec
from launch.errors import DataError
from launch.tables import Columns

AT_ONCE = 1000  # rows
MANY = 10_000
"""Dialogues that are worth processes of their own, which take two seconds to start."""
MAX_PROCESSES = 16  # of some 0.3 GB each
PARALLELISM = "TOKENIZERS_PARALLELISM"

T = TypeVar("T")


@contextlib.contextmanager
def all_cores() -> Iterator[int]:
    """Lets this process meanwhile use every core that its launcher may; yields how many these are.

    A rank has its share of the cores, and tokenizers no threads: afterwards the ranks are at work side by side.
    """
    told, mine = os.environ.get(PARALLELISM), os.sched_getaffinity(0)
    cores = os.sched_getaffinity(os.getppid()) | mine
    os.environ[PARALLELISM] = "true"
    os.sched_setaffinity(0, cores)
    try:
        yield len(cores)
    finally:
        os.sched_setaffinity(0, mine)
        if told is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = told


def truncated(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of each text, special tokens included, no more than `max_length` of them."""
    found: list[list[int]] = []
    for batch in _batches(texts):
        found += tokenizer(list(batch), truncation=True, max_length=max_length)["input_ids"]
    return found


def encoded(part: Columns, data: DataSpec, tokenizer: PreTrainedTokenizerBase, name: str, cores: int) -> list[Tokens]:
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

    encoder = Encoder(tokenizer, name, answers)
    batches = list(_batches(dialogues))
    if cores == 1 or len(dialogues) < MANY:
        return [tokens for batch in batches for tokens in encoder(batch)]
    with ProcessPoolExecutor(
        min(cores, MAX_PROCESSES, len(batches)),
        multiprocessing.get_context("spawn"),  # a fork would have locks of the threads that it has not
        initializer=_become_worker,
        initargs=(encoder,),
    ) as workers:
        return [tokens for found in workers.map(_encoded_by_worker, batches) for tokens in found]


@dataclass(frozen=True)
class Encoder:
    """Encodes dialogues of one part."""

    tokenizer: PreTrainedTokenizerBase
    part: str
    answers: bool

    def __call__(self, dialogues: Sequence[list[Message]]) -> list[Tokens]:
        names = [_named(dialogue, self.part) for dialogue in dialogues]
        return encode(dialogues, names, self.tokenizer, answers=self.answers)


_encoder: Encoder
"""In a worker: sent once, since it holds the vocabulary."""


def _become_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ[PARALLELISM] = "false"  # the workers are as many as the cores
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what the whole group gets is for the rank to obey
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else a worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encoded_by_worker(dialogues: Sequence[list[Message]]) -> list[Tokens]:
    return _encoder(dialogues)


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
