"""What a job file's `after` and `array` mean: which jobs there are, and how their faults are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import load_train_spec
from launch.document import Document, apply_override, parse_document
from launch.errors import SpecError, SpecErrors
from orchestrator.job.array import Element, expand, is_array
from orchestrator.job.spec import (
    ArrayElement,
    CommandJob,
    TrainingJob,
    array_env,
    check_submission,
    dump_job,
    job_schema,
    load_job,
    parse_job,
)
from tests.builders import a_command_job, a_training_job

FILE = Path("/jobs/job.yaml")
COMMAND = "name: job\nrun: [python, a.py, '0']\n"
TRAINING = """\
name: job
model: {name_or_path: org/model, task: sequence-classification}
data: {train: org/data}
train:
  max_steps: 10
  learning_rate: 3.0e-5
"""


def a_document(text: str, *overrides: str) -> Document:
    document = parse_document(text, FILE)
    for override in overrides:
        apply_override(document, override)
    return document


def expanded(text: str, *overrides: str) -> list[Element]:
    return expand(a_document(text, *overrides), "x1y2z")


def refused(text: str, *overrides: str) -> list[SpecError]:
    """The faults of a file; each with a way out."""
    with pytest.raises(SpecError) as caught:
        expanded(text, *overrides)
    errors = caught.value.errors if isinstance(caught.value, SpecErrors) else [caught.value]
    assert all(error.hint for error in errors)
    return errors


def test_a_number_makes_so_many_copies() -> None:
    elements = expanded(COMMAND + "array: 3\narray_at_once: 2\n")
    assert [one.job.name for one in elements] == ["job-0", "job-1", "job-2"]
    assert [one.job.array_of for one in elements] == [
        ArrayElement(id="job-x1y2z", index=index, at_once=2) for index in range(3)
    ]
    assert [one.values for one in elements] == [{}, {}, {}]
    alone = load_job(a_document(COMMAND))
    assert all(one.job.model_copy(update={"name": "job", "array_of": None}) == alone for one in elements)


def test_lists_make_all_combinations_the_last_one_fastest() -> None:
    elements = expanded(TRAINING + "array:\n  train.learning_rate: [1e-5, 1e-4]\n  train.seed: [1, 2, 3]\n")
    found = []
    for index, one in enumerate(elements):
        assert isinstance(one.job, TrainingJob)
        assert one.job.array_of == ArrayElement(id="job-x1y2z", index=index)
        assert (one.job.array, one.job.array_at_once) == (None, None)
        assert one.values == {"train.learning_rate": one.job.train.learning_rate, "train.seed": one.job.train.seed}
        found.append((one.job.train.learning_rate, one.job.train.seed))
    assert found == [(rate, seed) for rate in (1e-5, 1e-4) for seed in (1, 2, 3)]


def test_a_list_may_stand_for_what_the_file_lacks_or_for_a_place_in_a_list() -> None:
    elements = expanded(COMMAND + "array:\n  run[2]: ['1', '2']\n  env.A: [x]\n  resources.num_processes: [1, 2..4]\n")
    jobs = [one.job for one in elements if isinstance(one.job, CommandJob)]
    assert [(job.run[2], job.resources.num_processes) for job in jobs] == [
        ("1", 1), ("1", "2..4"), ("2", 1), ("2", "2..4"),
    ]  # fmt: skip
    assert all(job.env == {"A": "x"} for job in jobs)
    # What only the lists give need not stand in the file.
    elements = expanded(TRAINING.replace("  max_steps: 10\n", "") + "array: {train.max_steps: [1, 2]}\n")
    assert [one.job.train.max_steps for one in elements if isinstance(one.job, TrainingJob)] == [1, 2]


def test_the_file_is_left_as_it_was() -> None:
    document = a_document(TRAINING + "array: {train.seed: [1, 2], data.train: [org/a]}\n")
    before = json.dumps(document.data)
    expand(document, "x")
    assert json.dumps(document.data) == before


def test_the_array_is_given_by_a_flag_or_taken_away() -> None:
    elements = expanded(TRAINING, "array={train.seed: [1, 2]}", "train.max_steps=7")
    assert [(one.job.train.seed, one.job.train.max_steps) for one in elements if isinstance(one.job, TrainingJob)] == [
        (1, 7), (2, 7),
    ]  # fmt: skip
    (error,) = refused(TRAINING, "array={train.seed: [1, x]}")
    assert (error.field, error.file) == ("train.seed", "--set array={train.seed: [1, x]}")
    document = a_document(TRAINING + "array: 2\narray_at_once: 1\n", "array=null")
    assert not is_array(document)
    assert load_job(document).name == "job"


@pytest.mark.parametrize(
    ("array", "code", "field", "line"),
    [
        ("array: 0", "out-of-range", "array", 7),
        ("array: 1001", "out-of-range", "array", 7),
        ("array: true", "wrong-type", "array", 7),
        ("array: many", "wrong-type", "array", 7),
        ("array: [1]", "wrong-type", "array", 7),
        ("array: {}", "out-of-range", "array", 7),
        ("array: {train.seed: 1}", "wrong-type", "array.train.seed", 7),
        ("array: {train.seed: []}", "out-of-range", "array.train.seed", 7),
        ("array: {train: {seed: [1]}}", "wrong-type", "array.train", 7),
        ("array: {name: [a, b]}", "unknown-key", "array.name", 7),
        ("array: {array: [1]}", "unknown-key", "array.array", 7),
        ("array: {array_of: [{id: a, index: 0}]}", "unknown-key", "array.array_of", 7),
        ("array: {'': [1]}", "unknown-key", "array.", 7),
        ("array: {data.train.x: [1]}", "unknown-key", "array.data.train.x", 7),
        ("array: {'data.train[0]': [a]}", "unknown-key", "array.data.train[0]", 7),
        ("array:\n  train: [{max_steps: 1}]\n  train.seed: [1]", "inconsistent", "array.train.seed", 9),
        (
            f"array: {{train.seed: {list(range(40))}, train.max_steps: {list(range(1, 27))}}}",
            "out-of-range",
            "array",
            7,
        ),
        ("array: 2\narray_at_once: 0", "out-of-range", "array_at_once", 8),
        ("array: 2\narray_at_once: all", "wrong-type", "array_at_once", 8),
        ("array: 2\narray_of: {id: a, index: 0}", "reserved-name", "array_of", 8),
        ("array: {train.sed: [1]}", "unknown-key", "train.sed", 7),
        ("array:\n  train.seed:\n  - 1\n  - x", "wrong-type", "train.seed", 10),
        ("array:\n  env:\n  - A: b\n    TUNEYARD_X: c", "reserved-name", "env.TUNEYARD_X", 10),
    ],
)
def test_a_fault_of_an_array_is_named_with_its_line(array: str, code: str, field: str, line: int) -> None:
    (error,) = refused(f"{TRAINING}{array}\n")
    assert (error.code, error.field, error.line, error.file) == (code, field, line, str(FILE))


def test_a_fault_is_told_once_however_many_jobs_have_it() -> None:
    text = TRAINING.replace("3.0e-5", "fast") + "array:\n  train.seed: [1, 2, x]\n  train.max_steps: [1, 2, 3]\n"
    assert [(error.field, error.line) for error in refused(text)] == [("train.learning_rate", 6), ("train.seed", 8)]
    many = TRAINING + f"array: {{train.seed: {[f'x{index}' for index in range(500)]}}}\n"
    assert len(refused(many)) == 20


def test_names_have_room_for_numbers() -> None:
    def named(length: int) -> str:
        return COMMAND.replace("job", "j" * length) + "array: 11\n"

    assert len(expanded(named(60))[-1].job.name) == 63
    (error,) = refused(named(61))
    assert (error.code, error.field, error.line) == ("bad-name", "name", 1)
    assert "60" in (error.hint or "")
    (error,) = refused(COMMAND.replace("job", "Not A Job") + "array: {env.A: [x]}\n")
    assert (error.code, error.field) == ("bad-name", "name")
    assert "`not-a-job`" in (error.hint or "")


@pytest.mark.parametrize("base", [COMMAND, TRAINING], ids=["command", "training"])
def test_one_job_is_made_of_no_array(base: str) -> None:
    """By `run`, `plan`, `data`, and by the API, to which a client sends elements."""
    document = a_document(f"{base}array: 2\n")
    for load in (lambda: load_job(document), lambda: check_submission(document.data)):
        with pytest.raises(SpecErrors) as caught:
            load()
        (error,) = caught.value.errors
        assert (error.code, error.field) == ("is-array", "array")
        assert "tuneyard submit" in (error.hint or "")


def test_a_bound_without_an_array_is_a_contradiction() -> None:
    with pytest.raises(SpecError) as caught:
        load_job(a_document(f"{COMMAND}array_at_once: 2\n"))
    assert (caught.value.code, caught.value.field, caught.value.line) == ("inconsistent", "array_at_once", 3)


def test_a_command_learns_its_number() -> None:
    command, training = (expanded(f"{text}array: 3\n")[2].job for text in (COMMAND, TRAINING))
    assert array_env(command) == {"TUNEYARD_ARRAY_INDEX": "2"}
    assert array_env(training) == array_env(a_command_job()) == {}
    assert array_env(parse_job(dump_job(command))) == {"TUNEYARD_ARRAY_INDEX": "2"}
    assert check_submission(json.loads(dump_job(command))) == command


def test_the_number_of_an_element_is_not_written_by_hand() -> None:
    for kind in ("TrainingJob", "CommandJob"):
        keys = job_schema()["$defs"][kind]["properties"]
        assert {"after", "array", "array_at_once"} <= set(keys)
        assert "array_of" not in keys


def test_launch_reads_past_what_is_the_yards() -> None:
    document = a_document(TRAINING + "strategy: ddp\nafter: [a-1]\npriority: high\n")
    assert load_train_spec(document).train.max_steps == 10


def test_launch_alone_trains_no_array() -> None:
    document = a_document(TRAINING + "strategy: ddp\narray: 2\narray_at_once: 1\n")
    with pytest.raises(SpecError) as caught:
        load_train_spec(document)
    assert (caught.value.code, caught.value.field, bool(caught.value.hint)) == ("is-array", "array", True)
    assert load_train_spec(document, planned=False).train.max_steps == 10


@pytest.mark.parametrize(
    ("after", "code", "field"),
    [
        ("a-1", "wrong-type", "after"),
        (None, "wrong-type", "after"),
        ([1], "wrong-type", "after[0]"),
        (["a-1", "A-1"], "bad-name", "after[1]"),
        (["../etc"], "bad-name", "after[0]"),
        (["-a"], "bad-name", "after[0]"),
        (["a" * 81], "bad-name", "after[0]"),
        ([""], "bad-name", "after[0]"),
        (["a-1", "b-1", "a-1"], "duplicate-value", "after[2]"),
        ([f"a-{index}" for index in range(1001)], "out-of-range", "after"),
    ],
)
def test_what_cannot_come_before(after: Any, code: str, field: str) -> None:
    for build in (a_command_job, a_training_job):
        with pytest.raises(SpecErrors) as caught:
            build(after=after)
        (error,) = caught.value.errors
        assert (error.code, error.field, bool(error.hint)) == (code, field, True)


def test_what_comes_before_is_kept_in_order() -> None:
    job = a_command_job(after=["b-1", "a" * 80, "0"])
    assert job.after == ("b-1", "a" * 80, "0")
    assert parse_job(dump_job(job)) == job
    assert a_training_job().after == ()
