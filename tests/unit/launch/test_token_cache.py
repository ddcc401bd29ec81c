"""What the cache gives is what would have been made; and a cache that is broken, full or shared does no harm."""

from __future__ import annotations

import datetime
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

import launch.data
from launch.config import TrainSpec
from launch.data import Corpus, Rows, build_corpus, load_corpus
from launch.errors import DataError, SpecError
from launch.model import load_tokenizer
from launch.token_cache import ARRAYS, DIGEST, ENV_CACHE, ENV_LIMIT, Entry, TokenCache, cache_from_environment
from launch.token_key import corpus_key
from tests.worlds import a_spec, write_bert, write_chats, write_dialogues, write_llama, write_messages

ENTRY = Entry(
    {"a": np.arange(1000, dtype=np.int32), "b": np.array([True, False, True]), "c": np.zeros(0, dtype=np.int64)},
    {"labels": '["ham", "ä"]'},
)
TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
PROMPTS = {"prompt_column": "prompt", "response_column": "response"}
KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "classification": ("rows.tsv", {"deduplicate": True, "split": {"test": 0.2, "validation": 0.1}}, None),
    "text": ("prompts.jsonl", {"text_column": "response"}, None),
    "prompts": ("prompts.jsonl", PROMPTS, None),
    "prompts-by-template": ("prompts.jsonl", PROMPTS, TEMPLATE),
    "dialogues": ("chats.jsonl", {"messages_column": "messages"}, TEMPLATE),
    "dialogues-marked": ("chats.jsonl", {"messages_column": "messages"}, MARKED),
    "all-tokens": ("chats.jsonl", {"messages_column": "messages", "loss_on": "all"}, TEMPLATE),
    "packed": ("chats.jsonl", {"messages_column": "messages", "packing": True}, TEMPLATE),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data; read only."""
    folder = tmp_path_factory.mktemp("world")
    write_bert(folder / "bert")
    write_llama(folder / "llama")
    write_messages(folder / "rows.tsv", rows=60)
    write_dialogues(folder / "prompts.jsonl", rows=30)
    write_chats(folder / "chats.jsonl", rows=30)
    return folder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the entries of a test are."""
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def a_job(world: Path, kind: str, **changes: Any) -> TrainSpec:
    name, data, _ = KINDS[kind]
    data = {"split": {"test": 0.2}, "max_length": 24, **data, **changes.pop("data", {})}
    if kind == "classification":
        return a_spec(world / "bert", world / name, data=data, **changes)
    return a_spec(world / "llama", world / name, model={"task": "causal-lm"}, data=data, **changes)


def a_tokenizer(spec: TrainSpec, kind: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(spec.model)
    tokenizer.chat_template = KINDS[kind][2]
    return tokenizer


def assert_same(found: Corpus, wanted: Corpus) -> None:
    assert (found.labels, found.dropped) == (wanted.labels, wanted.dropped)
    assert list(found.parts()) == list(wanted.parts())
    for name, rows in wanted.parts().items():
        arrays = found.parts()[name].arrays()
        assert list(arrays) == list(rows.arrays())
        for field, array in rows.arrays().items():
            assert arrays[field].dtype == array.dtype
            np.testing.assert_array_equal(arrays[field], array)
        assert found.parts()[name].fingerprint() == Rows(**rows.arrays()).fingerprint()


@contextmanager
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(launch.data, "build_corpus", lambda *_: pytest.fail("made, though it is in the cache"))
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cached_is_what_would_be_made(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spec = a_job(world, kind)
    tokenizers = [a_tokenizer(spec, kind) for _ in range(3)]
    wanted = build_corpus(spec, tokenizers[0])
    assert_same(load_corpus(spec, tokenizers[1]), wanted)
    with nothing_is_made(monkeypatch):
        assert_same(load_corpus(spec, tokenizers[2]), wanted)
    saved = []
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(number))
        saved.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert saved[0] == saved[1] == saved[2], "what is exported tells whether the cache was used"


def test_a_slow_tokenizer_is_not_cached(world: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = a_job(world, "classification")
    tokenizer = a_tokenizer(spec, "classification")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    load_corpus(spec, tokenizer)
    assert not root.exists()


def key_of(spec: TrainSpec, change: Callable[[PreTrainedTokenizerBase], object] | None = None) -> str:
    tokenizer = load_tokenizer(spec.model, spec.data.chat_template)
    if change is not None:
        change(tokenizer)
    return corpus_key(spec, tokenizer)


def test_the_key_is_what_decides_the_rows(world: Path, tmp_path: Path) -> None:
    job = a_job(world, "dialogues")
    one, other = shutil.copy(world / "chats.jsonl", tmp_path), tmp_path / "other.jsonl"
    other.write_bytes(Path(one).read_bytes().replace(b"win", b"won", 1))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    seeded = {"seed": 1, "max_steps": 1}
    keys = [
        key_of(job),
        key_of(a_job(world, "dialogues", data={"train": str(other)})),
        key_of(a_job(world, "dialogues", data={"train": [str(one), str(other)]})),
        key_of(a_job(world, "dialogues", data={"train": [str(other), str(one)]})),
        key_of(a_job(world, "dialogues", data={"validation": str(one)})),
        key_of(a_job(world, "dialogues", data={"test": str(one), "split": None})),
        key_of(a_job(world, "dialogues", data={"max_length": 25})),
        key_of(a_job(world, "dialogues", data={"loss_on": "all"})),
        key_of(a_job(world, "dialogues", data={"deduplicate": True})),
        key_of(a_job(world, "dialogues", data={"split": {"test": 0.2, "seed": 1}})),
        key_of(a_job(world, "dialogues", data={"chat_template": str(tmp_path / "template.jinja")})),
        key_of(a_job(world, "packed")),
        key_of(a_job(world, "packed", train=seeded)),
        key_of(job, lambda tokenizer: tokenizer.add_tokens(["dinner"])),
        key_of(job, lambda tokenizer: setattr(tokenizer, "truncation_side", "left")),
        key_of(job, lambda tokenizer: setattr(tokenizer, "eos_token", "<s>")),
    ]
    assert len(set(keys)) == len(keys)
    moved = a_job(world, "dialogues", data={"train": str(one)}, name="another", train={"learning_rate": 1.0, "seed": 1})
    assert key_of(moved) == keys[0]
    assert key_of(moved.model_copy(update={"model": moved.model.model_copy(update={"dropout": 0.5})})) == keys[0]


def test_the_same_bytes_under_another_ending_are_other_data(tmp_path: Path, world: Path) -> None:
    comma, tab = tmp_path / "rows.csv", tmp_path / "rows.tsv"
    for path in (comma, tab):
        shutil.copy(world / "rows.tsv", path)
    jobs = [a_job(world, "classification", data={"train": str(path)}) for path in (comma, tab)]
    assert key_of(jobs[0]) != key_of(jobs[1])


def test_a_saved_dataset_is_known_by_its_files(tmp_path: Path, world: Path) -> None:
    def saved(name: str, text: str) -> str:
        rows = {"text": [text, "ok"], "label": ["x", "y"]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
        return key_of(a_job(world, "classification", data={"train": str(tmp_path / name)}))

    key = saved("one", "win")
    assert saved("two", "won") != key
    (tmp_path / "one").rename(tmp_path / "three")
    assert key_of(a_job(world, "classification", data={"train": str(tmp_path / "three")})) == key


def test_what_the_hub_says_of_a_dataset_is_in_the_key(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(world, "classification", data={"train": "org/name"})
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]})
    keys = []
    for commit in ("1" * 16, "2" * 16):
        rows._fingerprint = commit
        monkeypatch.setattr("launch.tables._hub_dataset", lambda *_: rows)
        keys.append(key_of(job))
    assert keys[0] != keys[1]


def test_a_template_that_writes_the_date_is_cached_for_a_day(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2100, 1, 1)

    def dated(tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = "{{ strftime_now('%d') }}" + TEMPLATE

    job = a_job(world, "dialogues")
    keys = [key_of(job), key_of(job, dated)]
    monkeypatch.setattr("datetime.date", Tomorrow)
    assert key_of(job) == keys[0]
    assert key_of(job, dated) != keys[1]


def test_bad_data_is_told_as_without_a_cache(world: Path, tmp_path: Path, root: Path) -> None:
    for train, code in ((tmp_path / "absent.tsv", "bad-data"), (tmp_path, "bad-data")):
        spec = a_job(world, "classification", data={"train": str(train)})
        with pytest.raises(DataError) as caught:
            load_corpus(spec, load_tokenizer(spec.model))
        assert (caught.value.code, caught.value.field) == (code, "data.train")
    assert list(root.iterdir()) == []


class Maker:
    """Makes ENTRY, and counts how often."""

    def __init__(self, root: Path, limit: int = 1 << 30) -> None:
        self.cache = TokenCache(root, limit)
        self.made: list[bool] = []

    def build(self, alone: bool) -> Entry:
        self.made.append(alone)
        return ENTRY

    def fetch(self, key: str = "key") -> Entry:
        found = self.cache.fetch(lambda: key, self.build)
        assert found.facts == ENTRY.facts
        for name, array in ENTRY.arrays.items():
            assert found.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(found.arrays[name], array)
        return found


def test_an_entry_is_a_safetensors_file_and_is_mapped(root: Path) -> None:
    maker = Maker(root)
    maker.fetch().arrays["a"][:] = 7  # as one may with arrays that were just made; nobody else sees it
    maker.fetch()
    assert maker.made == [True]
    stored = safetensors.numpy.load_file(root / "key" / ARRAYS)
    assert {name: array.tolist() for name, array in stored.items()} == {
        name: array.tolist() for name, array in ENTRY.arrays.items()
    }
    assert root.stat().st_mode & 0o077 == 0


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flipped(entry / ARRAYS, 0),
        lambda entry: flipped(entry / ARRAYS, 30),
        lambda entry: flipped(entry / ARRAYS, 1500),
        lambda entry: flipped(entry / ARRAYS, -1),
        lambda entry: flipped(entry / DIGEST, 3),
        lambda entry: os.truncate(entry / ARRAYS, 2000),
        lambda entry: os.truncate(entry / ARRAYS, 0),
        lambda entry: os.truncate(entry / DIGEST, 0),
        lambda entry: (entry / DIGEST).write_bytes(b"\xff\xfe"),
        lambda entry: (entry / ARRAYS).unlink(),
        lambda entry: (entry / DIGEST).unlink(),
    ],
)
def test_a_damaged_entry_is_made_anew(
    root: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Maker(root)
    maker.fetch()
    damage(root / "key")
    maker.fetch()
    assert maker.made == [True, True]
    assert "key is damaged" in capsys.readouterr().err
    maker.fetch()
    assert maker.made == [True, True]
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in root.iterdir()) == ["key", "key.lock"]


def test_what_changes_while_it_is_read_is_not_kept(root: Path) -> None:
    keys = iter(["before", "after"])
    assert TokenCache(root, 1 << 30).fetch(lambda: next(keys), lambda _: ENTRY) is ENTRY
    assert list(root.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(ENV_CACHE, str(tmp_path / "file" / "cache"))
    spec = a_job(world, "classification")
    assert_same(load_corpus(spec, load_tokenizer(spec.model)), build_corpus(spec, load_tokenizer(spec.model)))
    assert capsys.readouterr().err.count("tokenised data is not kept in") == 1


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_the_least_recently_used_entries_give_way(root: Path) -> None:
    Maker(root).fetch()
    size = sum(path.stat().st_size for path in (root / "key").iterdir())
    maker = Maker(root, limit=3 * size)
    for age, key in enumerate(("key", "a", "b")):
        maker.fetch(key)
        os.utime(root / key, (age, age))
    assert entries(root) == ["a", "b", "key"]
    maker.fetch("key")  # used again
    maker.fetch("c")
    assert entries(root) == ["b", "c", "key"]
    assert not (root / "a.lock").exists()
    Maker(root, limit=1).fetch("d")
    assert entries(root) == ["d"], "the one just written stays, however small the limit"


def test_an_entry_in_use_stays(root: Path) -> None:
    used = Maker(root).fetch("used").arrays["a"]
    Maker(root).fetch("being-made")
    with (root / "being-made.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Maker(root, limit=1).fetch("new")
        assert entries(root) == ["being-made", "new", "used"]
    del used
    Maker(root, limit=1).fetch("newer")
    assert entries(root) == ["newer"]


def test_what_a_dead_writer_left_is_removed_in_time(root: Path) -> None:
    for name, age in ((".old", 0.0), (".fresh", None)):
        (root / name).mkdir(parents=True)
        (root / name / ARRAYS).touch()
        if age is not None:
            os.utime(root / name, (age, age))
    Maker(root).fetch()
    assert entries(root) == [".fresh", "key"]


@pytest.mark.parametrize("told", ["much", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv(ENV_LIMIT, told)
    with pytest.raises(SpecError) as caught:
        cache_from_environment()
    assert (caught.value.code, caught.value.field) == ("bad-setting", ENV_LIMIT)


def test_the_environment_says_where_and_how_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_CACHE, "/somewhere")
    monkeypatch.delenv(ENV_LIMIT, raising=False)
    assert cache_from_environment() == TokenCache(Path("/somewhere/tokens"), 20 << 30)
    monkeypatch.setenv(ENV_LIMIT, "0.5")
    assert cache_from_environment() == TokenCache(Path("/somewhere/tokens"), 1 << 29)
    monkeypatch.setenv(ENV_LIMIT, "inf")
    assert cache_from_environment() is not None
    monkeypatch.setenv(ENV_LIMIT, "0")
    assert cache_from_environment() is None
    monkeypatch.delenv(ENV_LIMIT)
    monkeypatch.delenv(ENV_CACHE)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_from_environment() == TokenCache(Path("/home/user/.cache/tuneyard/tokens"), 20 << 30)


PROCESS = """
import resource, sys
from pathlib import Path
import numpy as np
from launch.token_cache import Entry, TokenCache

def build(alone):
    print("building", alone, flush=True)
    order = sys.stdin.readline()
    if order == "fail\\n":
        raise SystemExit("failed")
    if order == "fill\\n":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return Entry({"a": np.arange(1000, dtype=np.int32)}, {})

found = TokenCache(Path(sys.argv[1]), 1 << 30).fetch(lambda: "key", build)
print("sum", found.arrays["a"].sum(), flush=True)
"""


class Process:
    """Another process that wants the same entry."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def says(self, what: str) -> None:
        """Its next line has `what` in it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert what in line, line + self.process.stdout.read()

    def told(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()


@pytest.fixture
def processes(root: Path) -> Iterator[list[Process]]:
    """Two processes: the first makes the entry, the second waits for it."""
    both = [Process(root)]
    try:
        both[0].says("building True")
        both.append(Process(root))
        both[1].says("waiting for it")
        yield both
    finally:
        for one in both:
            one.process.kill()
            one.process.communicate()


def test_two_processes_make_an_entry_once(processes: list[Process]) -> None:
    processes[0].told("go on")
    for one in processes:
        one.says("sum 499500")


def test_a_dead_process_is_not_waited_for(processes: list[Process]) -> None:
    processes[0].process.kill()
    processes[1].says("building True")
    processes[1].told("go on")
    processes[1].says("sum 499500")


def test_after_one_that_failed_the_others_do_not_queue_up(processes: list[Process], root: Path) -> None:
    processes[0].told("fail")
    processes[1].says("building False")
    third = Process(root)
    processes.append(third)
    third.says("building")
    for one in processes[1:]:
        one.told("go on")
        one.says("sum 499500")


def test_a_full_disk_does_not_keep_from_training(processes: list[Process], root: Path) -> None:
    processes[0].told("fill")
    processes[0].says("tokenised data is not kept")
    processes[0].says("sum 499500")
    processes[1].says("building False")
    assert entries(root) == []
    processes[1].told("go on")
    processes[1].says("sum 499500")
    assert entries(root) == ["key"]
