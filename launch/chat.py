"""Dialogues to tokens, and which of them the assistant says.

The model's own chat template writes the dialogue. Where it has generation markers, they say what the assistant's
part is. Where it has none, the dialogue is rendered up to each answer, with and without it: the difference is the
answer and its end of turn. That holds only if what a template writes for the first turns does not change when more
follow, which is checked for every answer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from launch.errors import DataError

Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokens(NamedTuple):
    """One row's token ids, and whether the loss is on each."""

    ids: list[int]
    learned: list[bool]


def checked(value: Any, row: int, part: str, column: str) -> list[Message]:
    """`value`, found in `row` (1-based) of data.`part`, as messages of role and content alone.

    Raises:
        DataError: it is no such list, or nothing in it can be learned.
    """

    def bad(what: str, hint: str) -> DataError:
        return DataError(
            f"row {row} of data.{part}: {what}", code="bad-messages", field="data.messages_column", hint=hint
        )

    if not isinstance(value, list):
        hint = f"`{column}` must hold a list of {{role, content}}"
        raise bad(f"`{column}` is {type(value).__name__}, not a list of messages", hint)
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise bad(f"message {number} lacks `role` or `content`", "each message is {role: ..., content: ...}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise bad(f"message {number} has the role {role!r}", f"{hint}roles are: {', '.join(ROLES)}")
        if not isinstance(content, str):
            found = "no content" if content is None else f"{type(content).__name__} as content, not text"
            raise bad(f"message {number} ({role}) has {found}", "fill it in, or remove the row")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise bad("no message is the assistant's", "remove the row: there is nothing to learn from it")
    if messages[0]["role"] == "assistant":
        raise bad("the assistant speaks first", "put what it answers before it, or a system message")
    return messages


def encode(
    dialogues: Sequence[Sequence[Message]], names: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, answers: bool
) -> list[Tokens]:
    """The tokens of each dialogue; learned are the assistant's turns, with the token that ends each, or all tokens.

    `names` are those of the dialogues in errors.

    Raises:
        DataError: the template refuses a dialogue, or what it writes does not tell the answers apart. Of several
            dialogues at fault, the first is named.
    """
    assert isinstance(tokenizer.chat_template, str)
    if answers and MARKER.search(tokenizer.chat_template):
        return _marked(dialogues, names, tokenizer)
    if not answers:
        texts = [render(messages, tokenizer, where) for messages, where in zip(dialogues, names, strict=True)]
        return [Tokens(ids, [True] * len(ids)) for ids in _tokenized(texts, tokenizer)["input_ids"]]
    written = [_written(messages, tokenizer, where) for messages, where in zip(dialogues, names, strict=True)]
    encoded = _tokenized([text for text, _ in written], tokenizer, offsets=True)
    return [
        Tokens(ids, _inside(offsets, spans))
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True)
    ]


def _written(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and where in it the answers are."""
    whole = render(messages, tokenizer, where)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:number], tokenizer, where, ask=True)
            last = number == len(messages) - 1
            after = whole if last else render(messages[: number + 1], tokenizer, where)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"{where}: the chat template writes turn {number + 1} otherwise when another follows or precedes "
                    "it, so the answer cannot be told from the prompt",
                    code="template-not-prefix-stable",
                    field="data.chat_template",
                    hint="give a template with {% generation %} markers, or set loss_on: all",
                )
            spans.append((len(before), _end_of_turn(after, len(before), tokenizer)))
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer does not tell where its tokens lie in the text",
            code="slow-tokenizer",
            field="data.chat_template",
            hint="give the model's directory a tokenizer.json, or a template with {% generation %} markers",
        )
    return whole, spans


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str, *, ask: bool = False) -> str:
    """What the template writes; with `ask`, up to where the assistant begins to speak.

    Raises:
        DataError: the template refuses the dialogue.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except TemplateError as problem:
        raise _refused(problem, where) from problem
    assert isinstance(text, str)
    return text


def _refused(problem: TemplateError, where: str) -> DataError:
    return DataError(
        f"{where}: the chat template refuses the dialogue: {problem}",
        code="template-refuses",
        field="data.chat_template",
        hint="many templates want user and assistant in turns, after at most one system message",
    )


def _marked(
    dialogues: Sequence[Sequence[Message]], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [list(messages) for messages in dialogues],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except TemplateError as problem:
        if len(dialogues) == 1:
            raise _refused(problem, names[0]) from problem
        # Which of them it was is not said.
        one_by_one = zip(dialogues, names, strict=True)
        return [tokens for messages, where in one_by_one for tokens in _marked([messages], [where], tokenizer)]
    found = []
    for where, ids, mask in zip(names, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if not any(mask):
            raise DataError(
                f"{where}: no token lies within the chat template's generation markers",
                code="no-targets",
                field="data.chat_template",
                hint="put {% generation %} ... {% endgeneration %} around what the assistant says",
            )
        found.append(Tokens(list(ids), [bool(value) for value in mask]))
    return found


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, offsets: bool = False) -> Any:
    # The template writes the special tokens itself.
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets)


def _end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn that begins at `start` and ends `text` ends for the model: white space after the token that
    ends a turn is never generated, since generation stops there."""
    bare = text.rstrip()
    return len(bare) if len(bare) > start and bare.endswith(_marks(tokenizer)) else len(text)


@lru_cache(maxsize=1)  # reading them takes longer than a short dialogue, and one tokenizer reads all of them
def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that the tokenizer cuts out before all others. Not every model names the end of a turn among its
    special tokens."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token overlaps one of `spans`, which are in order.

    A token is taken to begin where the one before ended: byte-level tokenizers trim the space that belongs to it.
    """
    learned, behind, span = [], 0, 0
    for start, end in offsets:
        begin = min(start, behind)
        while span < len(spans) and spans[span][1] <= begin:
            span += 1
        learned.append(span < len(spans) and begin < spans[span][1] and end > spans[span][0])
        behind = max(behind, end)
    return learned
