"""Dialogues shared out to processes, and the cores that are lent for it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import launch.encoding
from launch.chat import Message
from launch.config import DataSpec
from launch.encoding import PARALLELISM, all_cores, encoded
from launch.errors import DataError
from launch.model import load_tokenizer
from tests.worlds import a_spec, write_llama

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role + ':' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat(asked: str, answered: str = "stop") -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.encoding, "AT_ONCE", 2)
    monkeypatch.setattr(launch.encoding, "MANY", 5)
    tokenizer = load_tokenizer(a_spec(write_llama(tmp_path / "llama"), tmp_path).model)
    tokenizer.chat_template = TEMPLATE
    data = DataSpec(train=("unread",), messages_column="chat")
    part = {"chat": [chat("win a prize" * times) for times in range(1, 8)]}
    assert encoded(part, data, tokenizer, "train", 2) == encoded(part, data, tokenizer, "train", 1)


def test_an_error_of_a_process_arrives_whole() -> None:
    problem = DataError("a", code="b", field="c", hint="d")
    assert pickle.loads(pickle.dumps(problem)).as_dict() == problem.as_dict()


WORKING = """
import multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
from launch.encoding import Encoder, _become_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(1, context, initializer=_become_worker, initargs=(Encoder(None, "train", True),))
    print(workers.submit(os.getpid).result(), flush=True)
    sys.stdin.readline()
"""


def test_a_worker_ends_with_its_parent_and_not_before() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    worker.terminate()
    with pytest.raises(psutil.TimeoutExpired):
        worker.wait(0.1)
    parent.kill()
    parent.communicate()
    worker.wait(10)


@pytest.mark.parametrize("told", ["false", None])
def test_the_cores_are_lent_for_a_while(monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    if told is None:
        monkeypatch.delenv(PARALLELISM, raising=False)
    else:
        monkeypatch.setenv(PARALLELISM, told)
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        with all_cores() as cores:
            assert cores == len(os.sched_getaffinity(0)) == len(every)
            assert os.environ[PARALLELISM] == "true"
        assert os.sched_getaffinity(0) == {min(every)}
        assert os.environ.get(PARALLELISM) == told
    finally:
        os.sched_setaffinity(0, every)
