"""Which tokens of a dialogue the loss is on, for templates as models in use have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from launch.chat import Message, checked, encode
from launch.errors import DataError
from tests.worlds import write_llama

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% elif (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
LAST_ANSWER_ONLY = (  # as templates that drop earlier reasoning: a turn reads otherwise once another follows
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'user' or loop.last %}{{ m.content }}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DIALOGUE: list[Message] = [
    {"role": "user", "content": "win a prize"},
    {"role": "assistant", "content": "stop, please"},
    {"role": "user", "content": "are you  home\nö"},
    {"role": "assistant", "content": " ok  thanks 😀\n\nsee you"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def tokenizer_with(llama: Path, template: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    assert "<|im_end|>" not in tokenizer.all_special_tokens, "as in many models"
    tokenizer.chat_template = template
    return tokenizer


def runs(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[bool, str]]:
    """Text of each run of tokens that are all learned, or all not."""
    found: list[tuple[bool, list[int]]] = []
    for token, value in zip(ids, learned, strict=True):
        if not found or found[-1][0] != value:
            found.append((value, []))
        found[-1][1].append(token)
    return [(value, str(tokenizer.decode(tokens))) for value, tokens in found]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            [
                (False, "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nwin a prize<|im_end|>\n"
                        "<|im_start|>assistant\n"),
                (True, "stop, please<|im_end|>"),
                (False, "\n<|im_start|>user\nare you  home\nö<|im_end|>\n<|im_start|>assistant\n"),
                (True, " ok  thanks 😀\n\nsee you<|im_end|>"),
                (False, "\n"),
            ],
        ),
        (
            LLAMA,
            [
                (False, "<s>[INST] win a prize [/INST]"),
                (True, " stop, please </s>"),
                (False, "[INST] are you  home\nö [/INST]"),
                (True, "  ok  thanks 😀\n\nsee you </s>"),
            ],
        ),
        (
            ZEPHYR,
            [
                (False, "<|user|>\nwin a prize</s>\n<|assistant|>\n"),
                (True, "stop, please</s>"),
                (False, "\n<|user|>\nare you  home\nö</s>\n<|assistant|>\n"),
                (True, " ok  thanks 😀\n\nsee you</s>"),
                (False, "\n"),
            ],
        ),
        (
            MARKED,
            [
                (False, "<|user|>win a prize<|assistant|>"),
                (True, "stop, please</s>"),
                (False, "<|user|>are you  home\nö<|assistant|>"),
                (True, " ok  thanks 😀\n\nsee you</s>"),
            ],
        ),
    ],
    ids=["chatml", "llama", "zephyr", "marked"],
)  # fmt: skip
def test_the_loss_is_on_every_answer_and_its_end(llama: Path, template: str, expected: list[tuple[bool, str]]) -> None:
    tokenizer = tokenizer_with(llama, template)
    ids, learned = encode([DIALOGUE], ["row 1"], tokenizer, answers=True)[0]
    assert runs(ids, learned, tokenizer) == expected
    assert ids == tokenizer.apply_chat_template(DIALOGUE, return_dict=True)["input_ids"]
    whole = encode([DIALOGUE], ["row 1"], tokenizer, answers=False)[0]
    assert (whole.ids, set(whole.learned)) == (ids, {True})


def test_a_template_that_rewrites_earlier_turns_is_refused(llama: Path) -> None:
    tokenizer = tokenizer_with(llama, LAST_ANSWER_ONLY)
    one_answer = encode([DIALOGUE[:2]], ["row 1"], tokenizer, answers=True)[0]
    assert runs(*one_answer, tokenizer)[-1] == (True, "stop, please</s>")
    with pytest.raises(DataError, match=r"row 7 of data\.train: the chat template writes turn 2") as caught:
        encode([DIALOGUE], ["row 7 of data.train"], tokenizer, answers=True)
    assert (caught.value.code, caught.value.field) == ("template-not-prefix-stable", "data.chat_template")


def test_what_a_template_refuses_is_told_with_its_row(llama: Path) -> None:
    tokenizer = tokenizer_with(llama, LLAMA)
    with pytest.raises(DataError, match=r"row 3: .*roles must alternate") as caught:
        encode([[DIALOGUE[0], *DIALOGUE]], ["row 3"], tokenizer, answers=True)
    assert caught.value.code == "template-refuses"


@pytest.mark.parametrize("template", [CHATML, LLAMA, ZEPHYR, MARKED])
@pytest.mark.parametrize("answers", [True, False])
def test_many_dialogues_are_as_each_by_itself(llama: Path, template: str, answers: bool) -> None:
    tokenizer = tokenizer_with(llama, template)
    dialogues = [DIALOGUE, DIALOGUE[:2], DIALOGUE[2:], DIALOGUE]
    names = ["1", "2", "3", "4"]
    each = [encode([one], [name], tokenizer, answers=answers)[0] for one, name in zip(dialogues, names, strict=True)]
    assert encode(dialogues, names, tokenizer, answers=answers) == each


@pytest.mark.parametrize(
    ("template", "codes"),
    [
        ("{% if messages[-1].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + LAST_ANSWER_ONLY,
         {"refused": "template-refuses", "unlearnable": "template-not-prefix-stable"}),
        ("{% if messages[-1].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
         "{% for m in messages %}{% if m.role == 'assistant' and messages[0].content != 'win a prize' %}"
         "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
         {"refused": "template-refuses", "unlearnable": "no-targets"}),
    ],
    ids=["unmarked", "marked"],
)  # fmt: skip
def test_of_several_dialogues_at_fault_the_first_is_named(llama: Path, template: str, codes: dict[str, str]) -> None:
    tokenizer = tokenizer_with(llama, template)
    fine = DIALOGUE[2:]
    faulty = {"refused": [*fine[:1], {"role": "assistant", "content": "bad"}], "unlearnable": DIALOGUE}
    for names in (["fine", "refused", "unlearnable"], ["fine", "unlearnable", "refused"]):
        with pytest.raises(DataError, match=f": {names[1]}: ") as caught:
            encode([faulty.get(name, fine) for name in names], names, tokenizer, answers=True)
        assert caught.value.code == codes[names[1]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "row 4 of data.test: `chat` is str, not a list"),
        ([], "no message is the assistant's"),
        ([DIALOGUE[0]], "no message is the assistant's"),
        ([DIALOGUE[1]], "the assistant speaks first"),
        ([{"from": "human", "value": "hi"}], "message 1 lacks `role` or `content`"),
        (["hi"], "message 1 lacks `role` or `content`"),
        ([DIALOGUE[0], {"role": "asistant", "content": "x"}], "message 2 has the role 'asistant'"),
        ([DIALOGUE[0], {"role": "assistant", "content": None}], r"message 2 \(assistant\) has no content"),
        ([{"role": "user", "content": [{"type": "text"}]}, DIALOGUE[1]], r"message 1 \(user\) has list as content"),
    ],
)
def test_malformed_rows_are_refused_by_number(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        checked(value, 4, "test", "chat")
    assert (caught.value.code, caught.value.field) == ("bad-messages", "data.messages_column")
    assert caught.value.hint
    if "asistant" in message:
        assert "did you mean `assistant`?" in caught.value.hint


def test_what_messages_carry_besides_is_left_out() -> None:
    with_more: list[Any] = [{**message, "weight": 1, "name": None} for message in DIALOGUE]
    assert checked(with_more, 1, "train", "messages") == DIALOGUE
