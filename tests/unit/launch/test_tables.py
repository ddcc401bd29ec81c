"""Columns out of every kind of source, and errors that name the field and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from launch.errors import DataError
from launch.tables import read_columns

COLUMNS = {"text_column": "text", "label_column": "label"}
TEXTS = ['he said "hi"', '"unclosed', "a,b", "ünïcode"]


def read(path: Path, part: str = "train") -> dict[str, list[object]]:
    return read_columns((str(path),), COLUMNS, part)


def test_a_tsv_keeps_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("label\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)))
    assert read(path) == {"text": TEXTS, "label": ["0", "1", "2", "3"]}


def test_a_csv_has_quoted_fields_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines, ""quoted""",01\nNA,\n')
    assert read(path) == {"text": ['two\nlines, "quoted"', "NA"], "label": ["01", ""]}


def test_jsonl_and_parquet_keep_types(tmp_path: Path) -> None:
    rows = [{"text": text, "label": i, "more": None} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.parquet") == {"text": TEXTS, "label": [0, 1, 2, 3]}


def test_a_saved_dataset_gives_class_names_and_the_split_asked_for(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    two = datasets.Dataset.from_dict({"text": ["c"], "label": [1]}, features=features)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == {"text": ["a", "b"], "label": ["spam", "ham"]}
    assert read(tmp_path / "both", "test") == {"text": ["c"], "label": ["spam"]}
    with pytest.raises(DataError) as caught:
        read(tmp_path / "both", "validation")
    assert caught.value.hint == "its splits are: train, test"
    assert caught.value.field == "data.validation"


def test_several_files_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t1\n")
    (tmp_path / "b.csv").write_text("label,text\n2,b\n")
    both = read_columns((str(tmp_path / "a.tsv"), str(tmp_path / "b.csv")), COLUMNS, "train")
    assert both == {"text": ["a", "b"], "label": ["1", "2"]}


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_a_missing_column_is_named_with_what_there_is(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    separator = "\t" if ending == "tsv" else ","
    path.write_text('{"txt": "a", "label": 1}\n' if ending == "jsonl" else f"txt{separator}label\na{separator}1\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == "missing-column"
    assert caught.value.field == "data.text_column"
    assert caught.value.hint == "did you mean `txt`? the columns are: txt, label"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "holds no rows"),
        ("a.tsv", "text\tlabel\n", "holds no rows"),
        ("a.csv", "text,label\nonly one\n", "cannot be read as CSV"),
        ("a.jsonl", "{}\n{", "has no column"),
        ("a.jsonl", '{"text": "a", "label": 1}\nnope\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", "is not a JSON object"),
        ("a.parquet", "PAR?", "cannot be read as PARQUET"),
        ("a.xlsx", "PK", "is of no known kind"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert caught.value.hint


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"text\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(DataError, match="cannot be read as TSV"):
        read(path)


def test_an_absent_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "messages.tsv").write_text("text\tlabel\n")
    with pytest.raises(DataError, match="does not exist") as caught:
        read(tmp_path / "mesages.tsv")
    assert caught.value.hint == f"did you mean {tmp_path / 'messages.tsv'}?"


def test_a_directory_that_holds_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not one that datasets\.save_to_disk wrote"):
        read(tmp_path)
