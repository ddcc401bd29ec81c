"""What is written beside the bytes of a checkpoint, and that none of it is believed when it is torn."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.checkpoint.manifest import (
    BLOCK,
    FORMAT,
    CheckpointError,
    CheckpointId,
    Commit,
    Damaged,
    LogicalTensor,
    Manifest,
    block_range,
    hash_of,
    read_commit,
)
from tests.stores import a_manifest

NAME = "step-3.attempt-2"


def stored(**changes: object) -> tuple[bytes, bytes]:
    """Marker and manifest of step 3, attempt 2."""
    manifest, _ = a_manifest(3, 2, **changes)
    data = manifest.model_dump_json().encode()
    return Commit(manifest=hash_of(data)).model_dump_json().encode(), data


@given(st.integers(0, 10**12), st.integers(0, 10**9))
def test_a_name_says_step_and_attempt(step: int, attempt: int) -> None:
    found = CheckpointId(step, attempt)
    assert CheckpointId.parse(str(found)) == found


@pytest.mark.parametrize(
    "name",
    [
        "", "step-1", "step-1.attempt-", "step--1.attempt-1", "step-01.attempt-1", "step-1.attempt-1.tmp",
        "step-1.attempt-1/x", "Step-1.attempt-1", "step-1.attempt-1\n", "step-٣.attempt-1", "claims",
    ],
)  # fmt: skip
def test_what_is_no_name_is_none(name: str) -> None:
    assert CheckpointId.parse(name) is None


def test_checkpoints_are_ordered_by_step_then_attempt() -> None:
    names = ["step-9.attempt-3", "step-10.attempt-1", "step-10.attempt-2"]
    found = [CheckpointId.parse(name) for name in names]
    assert sorted(found, reverse=True) == found[::-1]


def test_a_manifest_comes_back_as_it_was_committed() -> None:
    manifest, files = a_manifest(3, 2, metrics={"loss": 0.25}, loop={"losses": [1.0, 0.5]}, parent="step-1.attempt-1")
    marker, data = stored(metrics={"loss": 0.25}, loop={"losses": [1.0, 0.5]}, parent="step-1.attempt-1")
    found = read_commit(NAME, marker, data)
    assert found == manifest
    assert (str(CheckpointId(found.step, found.attempt)), found.size) == (NAME, sum(map(len, files.values())))


def test_a_metric_that_is_no_number_comes_back_too() -> None:
    found = read_commit(NAME, *stored(metrics={"loss": math.nan, "perplexity": math.inf}))
    assert found.metrics is not None
    assert math.isnan(found.metrics["loss"])
    assert found.metrics["perplexity"] == math.inf


def test_what_a_newer_version_adds_is_read_past() -> None:
    manifest, _ = a_manifest(3, 2)
    data = json.dumps(json.loads(manifest.model_dump_json()) | {"colour": "red"}).encode()
    assert read_commit(NAME, Commit(manifest=hash_of(data)).model_dump_json().encode(), data) == manifest


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_bit_that_changes_is_noticed(at: int, bit: int) -> None:
    marker, data = stored()
    torn = bytearray(data)
    torn[at % len(data)] ^= 1 << bit
    with pytest.raises(Damaged):
        read_commit(NAME, marker, bytes(torn))


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_what_is_cut_is_noticed(cut: int) -> None:
    marker, data = stored()
    with pytest.raises(Damaged, match="not the manifest that was committed"):
        read_commit(NAME, marker, data[:cut])
    with pytest.raises(Damaged, match="torn"):
        read_commit(NAME, marker[:cut], data)


def test_a_renamed_directory_is_noticed() -> None:
    with pytest.raises(Damaged, match=r"holds the checkpoint step-3\.attempt-2"):
        read_commit("step-4.attempt-2", *stored())


def test_a_manifest_that_is_none_is_damage_and_one_of_a_newer_format_is_not() -> None:
    data = b'{"id": 3}'
    with pytest.raises(Damaged, match="cannot be read"):
        read_commit(NAME, Commit(manifest=hash_of(data)).model_dump_json().encode(), data)
    with pytest.raises(CheckpointError) as told:
        read_commit(NAME, *stored(format=FORMAT + 1))
    assert not isinstance(told.value, Damaged)  # it is not set aside
    assert told.value.code == "checkpoint-too-new"
    assert told.value.hint


@given(size=st.integers(0, 5 * BLOCK))
def test_blocks_cover_a_file_without_gap_or_overlap(size: int) -> None:
    ranges = [block_range(index, size) for index in range(-(-size // BLOCK))]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert all(0 < end - start <= BLOCK for start, end in ranges)
    assert (ranges[-1][1] if ranges else 0) == size


def test_hashes_tell_blocks_apart_whatever_holds_them() -> None:
    one, two = b"a" * 100, bytes(100)
    assert hash_of(two) == hash_of(memoryview(bytearray(two)))
    assert hash_of(one) != hash_of(two)
    assert len(hash_of(one)) == 16


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0, 3), 0), ((2, 3, 4), 24)])
def test_elements_of_a_tensor(shape: tuple[int, ...], count: int) -> None:
    assert LogicalTensor(dtype="float32", shape=shape).numel == count


def test_a_manifest_needs_its_fields() -> None:
    data = json.loads(a_manifest(1)[0].model_dump_json())
    del data["shards"]
    with pytest.raises(ValueError, match="shards"):
        Manifest.model_validate(data)
