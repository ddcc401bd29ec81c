"""Comparing model directories, against safetensors' own writer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import compare as module
from launch.compare import compare
from launch.errors import SpecError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
    "b.weight": torch.arange(8, dtype=torch.bfloat16) / 3,
    "c.bias": torch.tensor([math.nan, math.inf, -0.0]),
    "d.count": torch.tensor(2**53 + 1),
    "e.half": torch.ones(3, dtype=torch.float16),
    "f.empty": torch.zeros(0, 4),
}


def a_directory(path: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / name, metadata={"format": "pt"})
    return path


def pair(tmp_path: Path, changed: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    return a_directory(tmp_path / "then", TENSORS), a_directory(tmp_path / "now", TENSORS | changed)


def test_the_same_weights_are_the_same_in_shards_too(tmp_path: Path) -> None:
    then = a_directory(tmp_path / "then", TENSORS)
    names = sorted(TENSORS)
    for number, shard in enumerate((names[:2], names[2:])):
        a_directory(tmp_path / "now", {name: TENSORS[name] for name in shard}, f"model-{number}-of-2.safetensors")
    told = compare(then, tmp_path / "now")
    assert (told.same, told.tensors, told.largest, told.metrics) == (True, len(TENSORS), None, ())


@pytest.mark.parametrize("chunk", [1 << 24, 8], ids=["whole", "in chunks"])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "e.half"])
def test_the_tensor_that_differs_is_named_with_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    changed = TENSORS[name].clone()
    changed.view(-1)[0] += 0.25
    changed.view(-1)[2] -= 0.5
    expected = (changed.double() - TENSORS[name].double()).abs().max().item()
    told = compare(*pair(tmp_path, {name: changed}))
    assert [(one.name, one.largest) for one in told.different] == [(name, expected)]
    assert (told.same, told.largest) == (False, expected)


def test_a_single_bit_is_a_difference_even_where_the_values_are_equal(tmp_path: Path) -> None:
    told = compare(*pair(tmp_path, {"c.bias": torch.tensor([math.nan, math.inf, 0.0])}))
    assert [(one.name, one.largest) for one in told.different] == [("c.bias", 0.0)]
    told = compare(*pair(tmp_path, {"d.count": torch.tensor(2**53)}))
    assert [one.name for one in told.different] == ["d.count"]


@pytest.mark.parametrize(
    "changed",
    [
        torch.tensor([1.0, math.inf, -0.0]),
        torch.tensor([math.nan, 1.0, -0.0]),
        torch.zeros(4),
        torch.zeros(3, dtype=torch.float64),
    ],
    ids=["not a number before", "infinite before", "another shape", "another type"],
)
def test_what_is_no_number_comes_first(tmp_path: Path, changed: torch.Tensor) -> None:
    other = TENSORS["a.weight"] + 1
    told = compare(*pair(tmp_path, {"c.bias": changed, "a.weight": other}))
    assert [(one.name, one.largest) for one in told.different] == [("c.bias", None), ("a.weight", told.largest)]
    assert told.largest == pytest.approx(1.0)


def test_a_type_without_arithmetic_is_compared_by_its_bytes(tmp_path: Path) -> None:
    one = {"x": torch.ones(4).to(torch.float8_e4m3fn)}
    two = {"x": torch.zeros(4).to(torch.float8_e4m3fn)}
    then = a_directory(tmp_path / "then", one)
    assert compare(then, a_directory(tmp_path / "now", one)).same
    assert [told.largest for told in compare(then, a_directory(tmp_path / "now", two)).different] == [None]


def test_tensors_of_one_side_alone(tmp_path: Path) -> None:
    then, now = a_directory(tmp_path / "then", TENSORS), a_directory(tmp_path / "now", {"g": torch.ones(1)})
    told = compare(then, now)
    assert (told.same, told.tensors) == (False, len(TENSORS) + 1)
    assert (set(told.only_then), told.only_now) == (set(TENSORS), ("g",))


def test_metrics_that_differ_are_told_with_their_place(tmp_path: Path) -> None:
    then, now = pair(tmp_path, {})
    (then / "metrics.json").write_text(json.dumps({"loss": 0.5, "mcc": math.nan, "per_class": {"ham": {"f1": 0.25}}}))
    (now / "metrics.json").write_text(json.dumps({"loss": 0.5, "mcc": math.nan, "per_class": {"ham": {"f1": 0.75}}}))
    told = compare(then, now)
    assert told.same
    assert [(one.name, one.then, one.now) for one in told.metrics] == [("per_class.ham.f1", 0.25, 0.75)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def another_shape(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[3,4]", b"[3,5]"))


@pytest.mark.parametrize("damage", [cut, no_header, another_shape, Path.unlink])
def test_damaged_or_absent_weights_are_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    then, now = pair(tmp_path, {})
    damage(then / "model.safetensors")
    with pytest.raises(SpecError) as told:
        compare(then, now)
    assert told.value.code == ("no-weights" if damage is Path.unlink else "bad-weights")
    assert told.value.hint
