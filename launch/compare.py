"""Two model directories, tensor by tensor and metric by metric. Torch-free: safetensors is a header and raw bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from launch.contract import Record
from launch.errors import SpecError

CHUNK_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "u1",
}  # fmt: skip
ITEM_BYTES = {"BF16": 2} | {name: np.dtype(code).itemsize for name, code in DTYPES.items()}


class TensorDifference(Record):
    name: str
    largest: float | None
    """Absolute difference of the values that differ most; null where it is no finite number: another shape or type,
    not a number, or a type that has no arithmetic here."""


class MetricDifference(Record):
    name: str
    then: float | None
    now: float | None


class Comparison(Record):
    """How two model directories compare."""

    tensors: int
    """How many there are, in the one or the other."""
    different: tuple[TensorDifference, ...]
    """Present in both, with other bytes; the largest difference first."""
    only_then: tuple[str, ...]
    only_now: tuple[str, ...]
    metrics: tuple[MetricDifference, ...]
    """Those that are not exactly the same."""

    @property
    def same(self) -> bool:
        """Whether the weights are bitwise the same."""
        return not (self.different or self.only_then or self.only_now)

    @property
    def largest(self) -> float | None:
        """The largest difference that is a number."""
        return max((one.largest for one in self.different if one.largest is not None), default=None)


class Tensor(NamedTuple):
    """Where a tensor's bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name, whole or in shards, of a model or of an adapter.

    Raises:
        SpecError: there are no safetensors files in it, or one is damaged.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            found |= dict(_header(file))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            raise SpecError(
                f"the weights cannot be read: {problem}",
                code="bad-weights",
                file=file,
                hint="the file is damaged or cut short; take another copy",
            ) from problem
    if not found:
        raise SpecError(
            f"{directory} holds no weights to compare with",
            code="no-weights",
            hint="put its *.safetensors files back",
        )
    return found


def _header(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Raises ValueError and the like for what is no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size, MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(stream.read(length))
    for name, told in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + int(offset) for offset in told["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies beyond its end")
            tensor = Tensor(file, str(told["dtype"]), tuple(told["shape"]), begin, end)
            if tensor.dtype in ITEM_BYTES and math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] != end - begin:
                raise ValueError(f"{name} has not the bytes of its shape")
            yield name, tensor


def compare(then: Path, now: Path) -> Comparison:
    """Compare the model directory `now` with `then`.

    Raises:
        SpecError: one of them has no readable weights.
    """
    before, after = read_tensors(then), read_tensors(now)
    shared = [name for name in before if name in after]
    different = [told for name in shared if (told := _difference(name, before[name], after[name])) is not None]
    # What is no number comes first: it is the worst that can be.
    different.sort(key=lambda one: (-math.inf if one.largest is None else -one.largest, one.name))
    return Comparison(
        tensors=len({*before, *after}),
        different=tuple(different),
        only_then=tuple(name for name in before if name not in after),
        only_now=tuple(name for name in after if name not in before),
        metrics=tuple(_metrics(then, now)),
    )


def _difference(name: str, then: Tensor, now: Tensor) -> TensorDifference | None:
    """None where type, shape and every byte are the same."""
    if (then.dtype, then.shape, then.end - then.begin) != (now.dtype, now.shape, now.end - now.begin):
        return TensorDifference(name=name, largest=None)
    if then.begin == then.end:
        return None
    left, right = _bytes(then), _bytes(now)
    largest: float | None = None
    for start in range(0, len(left), CHUNK_BYTES):
        one, two = left[start : start + CHUNK_BYTES], right[start : start + CHUNK_BYTES]
        if not np.array_equal(one, two):
            largest = max(largest or 0.0, _apart(one, two, then.dtype))
    if largest is None:
        return None
    return TensorDifference(name=name, largest=largest if math.isfinite(largest) else None)


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Read where they are needed, so that a tensor need not fit in memory."""
    return np.memmap(tensor.file, np.uint8, "r", offset=tensor.begin, shape=(tensor.end - tensor.begin,))


def _apart(one: npt.NDArray[np.uint8], two: npt.NDArray[np.uint8], dtype: str) -> float:
    """The largest absolute difference of unequal bytes as values of `dtype`; infinity if it is no number."""
    if dtype not in ITEM_BYTES:
        return math.inf
    left, right = _values(one, dtype), _values(two, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(left - right)
    unequal = left.view(np.uint64) != right.view(np.uint64)  # a NaN that both have is no difference
    return float(np.max(np.where(np.isnan(gaps), np.inf, gaps)[unequal], initial=0.0))


def _values(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    # A copy: a tensor may begin at any byte, and numpy's arithmetic wants whole words.
    flat = np.array(raw)
    if dtype == "BF16":  # the upper half of a float32
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return flat.view(DTYPES[dtype]).astype(np.float64)


def _metrics(then: Path, now: Path) -> Iterator[MetricDifference]:
    before, after = _numbers(then), _numbers(now)
    for name in sorted({*before, *after}):
        one, two = before.get(name), after.get(name)
        if one != two and not (one is not None and two is not None and math.isnan(one) and math.isnan(two)):
            yield MetricDifference(name=name, then=one, now=two)


def _numbers(directory: Path) -> dict[str, float]:
    """Every number of a model directory's metrics.json, by its path in it; none if there is no such file."""
    try:
        told = json.loads((directory / "metrics.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(_leaves(told, ()))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _leaves(inside, (*path, str(key)))
    elif isinstance(value, list):
        for index, inside in enumerate(value):
            yield from _leaves(inside, (*path, str(index)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield ".".join(path), float(value)
