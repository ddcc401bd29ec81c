"""How much of a machine ranks may have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.execute import memory
from orchestrator.execute.local import LocalExecutor
from orchestrator.execute.oom import Level

GIB = 2**30


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, *limits: str) -> None:
    """100 GiB, and cgroups with these limits, the process's own first."""
    levels = []
    for number, limit in enumerate(limits):
        level = folder / str(number)
        level.mkdir()
        (level / "memory.max").write_text(limit)
        levels.append(Level(level, v2=True))
    monkeypatch.setattr(memory, "levels_of", lambda _pid: tuple(levels))
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=100 * GIB)))


@pytest.mark.parametrize(
    ("limits", "wished_gb", "expected"),
    [
        ([], None, 90 * GIB),  # the rest is the system's
        (["max", "max"], None, 90 * GIB),
        ([str(8 * GIB), str(7 * GIB), "max"], None, 7 * GIB),
        ([str(95 * GIB)], None, 90 * GIB),
        ([], 3.5, 3_500_000_000),
        ([str(2 * GIB)], 3.5, 2 * GIB),
    ],
)
def test_it_is_the_machines_or_what_its_tightest_cgroup_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limits: list[str], wished_gb: float | None, expected: int
) -> None:
    machine(monkeypatch, tmp_path, *limits)
    assert memory.host_memory(wished_gb) == expected


def test_a_yard_on_this_machine_tells_its_memory() -> None:
    (node,) = LocalExecutor().nodes()
    assert node.memory_bytes == memory.host_memory()
    assert node.memory_bytes > GIB // 2
