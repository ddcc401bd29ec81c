"""`tuneyard data`: what it finds in data with known faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from tests.worlds import write_bert

ROWS = [
    *[(f"win a free prize number {n}", "spam") for n in range(6)],
    *[(f"see you at home tonight love {n}", "ham") for n in range(60)],
    ("see you at home tonight love 0", "ham"),  # a repeat
    ("win " * 50, "ham"),  # longer than max_length
]
TEST = [("Win a  free PRIZE number 3", "spam"), ("something new", "ham")]  # the first leaks, but for case and spaces


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_bert(tmp_path / "bert")
    for name, rows in (("train", ROWS), ("test", TEST)):
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "job.yaml"
    keys = {
        "name": "small",
        "model": {"name_or_path": "bert", "task": "sequence-classification"},
        "data": {"train": "train.tsv", "test": "test.tsv", "max_length": 20},
        "train": {"max_steps": 1},
    }
    path.write_text(json.dumps(keys))
    return path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["tuneyard", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_sizes_repeats_leakage_and_cuts(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(monkeypatch, capsys, "data", str(job), "-o", "json")
    assert status == 0
    told: dict[str, Any] = json.loads(out)
    assert (told["rows_read"], told["repeated_rows"]) == (len(ROWS), 1)
    train, test = told["parts"]["train"], told["parts"]["test"]
    assert train["classes"] == {"ham": 62, "spam": 6}
    assert train["truncated_share"] == pytest.approx(1 / len(ROWS))
    assert train["tokens_max"] == 52  # and [CLS], [SEP]
    assert (test["rows"], test["also_in_train"]) == (2, 1)
    assert 10 < told["vocabulary_used"] < told["vocabulary"]
    warnings = " ".join(told["warnings"])
    for word in ("repeat", "training part", "fewer than 10", "f1_macro"):
        assert word in warnings


def test_a_person_sees_a_table(job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(monkeypatch, capsys, "data", str(job), "--set", "data.deduplicate=true")
    assert status == 0
    assert f"{len(ROWS)} rows read, 1 of them repeats" in out
    assert "tokens of the vocabulary occur" in out
    assert "set data.deduplicate" not in out


def test_what_only_training_would_have_noticed_is_an_error_with_a_remedy(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.parent / "test.tsv").write_text("text\tlabel\nhello\tnever-seen\n")
    status, _, err = run(monkeypatch, capsys, "data", str(job))
    assert status == 2
    assert "never-seen" in err
    assert "hint:" in err
    assert "Traceback" not in err
