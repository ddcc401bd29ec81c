"""A node that computes, remembers or stores wrongly is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from launch import probe
from launch.probe import Wrong, alone, check, disk, matmul, memory

CPU = torch.device("cpu")


class Faulty(TorchFunctionMode):
    """A device on which the results of `spoilt` functions are off by one in one place, from the `nth` call on."""

    def __init__(self, spoilt: str, nth: int = 1) -> None:
        super().__init__()
        self.spoilt, self.nth, self.calls = spoilt, nth, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ == self.spoilt and (result.is_floating_point() or self.spoilt == "fill_"):
            self.calls += 1
            if self.calls >= self.nth:
                result.view(-1)[7] += 1
        return result


def test_a_sound_node_passes(tmp_path: Path) -> None:
    checks = list(alone(tmp_path))
    assert [one.name for one in checks] == ["matmul", "memory", "disk"]
    assert all(one.ok for one in checks)
    assert all(one.value is not None and one.value > 0 for one in checks)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_product_is_found_and_so_is_one_that_changes() -> None:
    with Faulty("matmul"), pytest.raises(Wrong, match="product of two matrices is wrong"):
        matmul(CPU)
    with Faulty("matmul", nth=2), pytest.raises(Wrong, match="another one than before"):
        matmul(CPU)


def test_memory_that_forgets_is_found() -> None:
    with Faulty("fill_"), pytest.raises(Wrong, match="1 words differ"):
        memory(CPU)


def test_a_disk_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    found = check("disk", lambda: disk(tmp_path / "none"))
    assert not found.ok
    assert "No such file" in found.told


def test_a_disk_that_stores_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DISK_BYTES", 1 << 16)
    real = probe.os.fsync

    def spoil(descriptor: int) -> None:
        byte = probe.os.pread(descriptor, 1, 100)
        probe.os.pwrite(descriptor, bytes([byte[0] ^ 1]), 100)
        real(descriptor)

    monkeypatch.setattr(probe.os, "fsync", spoil)
    with pytest.raises(Wrong, match="read back as something else"):
        disk(tmp_path)
