"""Whether a process that is gone was killed for want of memory, and whose: from files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.execute import oom
from orchestrator.execute.oom import CGROUP_KILLED, KERNEL_KILLED, Level, Witness, _upwards, levels_of

GIB = 1 << 30


class Group:
    """A cgroup's files, as one version of the kernel's interface has them."""

    def __init__(self, directory: Path, v2: bool, limit: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.v2 = directory, v2
        self.kills = self.hits = 0
        none = "max" if v2 else str((1 << 63) - 4096)
        self.write("memory.max" if v2 else "memory.limit_in_bytes", none if limit is None else str(limit))
        self.write("memory.peak" if v2 else "memory.max_usage_in_bytes", str(limit or 7))
        self.count()

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(f"{text}\n")

    def count(self, *, kills: int = 0, hits: int = 0) -> None:
        self.kills, self.hits = self.kills + kills, self.hits + hits
        if self.v2:
            self.write("memory.events", f"low 0\nhigh 0\nmax 5\noom {self.hits}\noom_kill {self.kills}")
        else:
            self.write("memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {self.kills}")
            self.write("memory.failcnt", str(self.hits))


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def groups(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """A rank's own cgroup without a limit, its pod's with one of 1 GiB, and the top."""
    found = [
        Group(tmp_path / "pod" / "rank", request.param, None), Group(tmp_path / "pod", request.param, GIB),
        Group(tmp_path, request.param, None),
    ]  # fmt: skip
    levels = tuple(Level(group.directory, group.v2) for group in found)
    monkeypatch.setattr(oom, "levels_of", lambda _pid: levels)
    return found


def test_a_limit_of_a_group_above_is_found(groups: list[Group]) -> None:
    witness = Witness(1)
    groups[0].count(kills=1)
    groups[1].count(hits=3)
    death = witness.death()
    assert death is not None
    assert (death.code, death.limit_bytes, death.used_bytes) == (CGROUP_KILLED, GIB, GIB)
    assert death.message == "the kernel killed it: its cgroup allows 1.0 GiB"


def test_a_kill_without_a_limit_that_was_reached_is_the_machines(groups: list[Group]) -> None:
    witness = Witness(1)
    groups[0].count(kills=1)
    death = witness.death()
    assert death is not None
    assert death.code == KERNEL_KILLED
    assert "the machine ran out of memory" in death.message


def test_a_limit_that_was_reached_killed_nobody_by_itself(groups: list[Group]) -> None:
    """Caches were given back, or another group's process was the victim."""
    witness = Witness(1)
    groups[1].count(hits=9, kills=1)
    assert witness.death() is None


def test_what_happened_before_does_not_count(groups: list[Group]) -> None:
    groups[0].count(kills=2)
    groups[1].count(hits=2)
    assert Witness(1).death() is None


def test_what_happened_long_ago_is_forgotten(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(oom.time, "monotonic", lambda: clock[0])
    witness = Witness(1)
    groups[0].count(kills=1)
    groups[1].count(hits=1)
    for _ in range(3):  # a process that is being killed may still be there for a while
        clock[0] += 1
        witness.look()
    assert witness.death() is not None
    for _ in range(2):
        clock[0] += oom.RECENT_S + 1
        witness.look()
    assert witness.death() is None


def test_without_a_cgroup_the_machines_count_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "levels_of", lambda _pid: ())
    kills = [3]
    monkeypatch.setattr(oom, "_numbers", lambda _path: {"oom_kill": kills[0]})
    witness = Witness(1)
    assert witness.death() is None
    kills[0] += 1
    death = witness.death()
    assert death is not None
    assert death.code == KERNEL_KILLED


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/a/b", "/", ["/m/a/b", "/m/a", "/m"]),
        ("/", "/", ["/m"]),
        ("/docker/x/rank", "/docker/x", ["/m/rank", "/m"]),  # a container sees its own part of the tree alone
        ("/elsewhere", "/docker/x", ["/m"]),
        ("/../outside", "/", ["/m"]),
    ],
)
def test_cgroups_are_found_below_their_mount(path: str, root: str, expected: list[str]) -> None:
    from pathlib import PurePosixPath

    assert [str(found) for found in _upwards(PurePosixPath(path), root, Path("/m"))] == expected


def test_a_living_process_has_levels_and_a_dead_one_none() -> None:
    assert all(level.directory.is_dir() for level in levels_of(os.getpid()))
    assert levels_of(2**22 + 1) == ()
