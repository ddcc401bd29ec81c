"""Who killed a process that is gone: whether the kernel did, for want of memory, and whose memory that was. Linux.

The kernel counts. While a process lives, its cgroup is found and the counters are read; when it is gone, they are read
again. A kill is counted in the cgroup of the process, whoever's limit was reached; a limit is counted where it is set.
Sources: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst (memory.events); /proc/vmstat.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

CGROUP_KILLED = "cgroup-killed"
KERNEL_KILLED = "kernel-killed"
RECENT_S = 15.0  # evidence is at least so recent, and at most twice as old
NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as the largest multiple of a page


@dataclass(frozen=True)
class Death:
    """That a process was killed for want of memory."""

    code: str
    """CGROUP_KILLED or KERNEL_KILLED."""
    message: str
    limit_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True)
class Level:
    """One cgroup on the way from a process's own to the top that is seen from here."""

    directory: Path
    v2: bool

    def kills(self) -> int | None:
        """Processes in it that the kernel has killed for want of memory; None on a kernel that does not say."""
        return _numbers(self.directory / ("memory.events" if self.v2 else "memory.oom_control")).get("oom_kill")

    def hits(self) -> int:
        """How often its own limit was reached. cgroup v1 counts also when reclaiming caches was enough."""
        if self.v2:
            return _numbers(self.directory / "memory.events").get("oom", 0)
        return _number(self.directory / "memory.failcnt") or 0

    def limit(self) -> int | None:
        limit = _number(self.directory / ("memory.max" if self.v2 else "memory.limit_in_bytes"))
        return limit if limit is not None and limit < NO_LIMIT else None

    def used(self) -> int | None:
        """The most it has held."""
        return _number(self.directory / ("memory.peak" if self.v2 else "memory.max_usage_in_bytes"))


@dataclass(frozen=True)
class Counters:
    kills: int | None
    machine_kills: int | None
    hits: tuple[int, ...]
    """By level, the process's own first."""

    @classmethod
    def of(cls, levels: tuple[Level, ...]) -> Counters:
        return cls(
            kills=levels[0].kills() if levels else None,
            machine_kills=_numbers(Path("/proc/vmstat")).get("oom_kill"),
            hits=tuple(level.hits() for level in levels),
        )


class Witness:
    """Watches one process; `look` while it lives, `death` when it is gone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._levels = levels_of(pid)
        self._before = self._newer = Counters.of(self._levels)
        self._turned = time.monotonic()

    def look(self) -> None:
        """Follow it into another cgroup, and forget what has happened long ago."""
        levels = levels_of(self._pid)
        if levels and levels != self._levels:
            self._levels = levels
            self._before = self._newer = Counters.of(levels)
        if time.monotonic() - self._turned > RECENT_S:
            self._before, self._newer = self._newer, Counters.of(self._levels)
            self._turned = time.monotonic()

    def death(self) -> Death | None:
        """How it died, if the kernel killed a process like it of late for want of memory."""
        now, before = Counters.of(self._levels), self._before
        hit = next(
            (
                level
                for level, new, old in zip(self._levels, now.hits, before.hits, strict=True)
                if new > old and level.limit() is not None
            ),
            None,
        )
        if now.kills is not None and before.kills is not None:
            killed = now.kills > before.kills
        else:  # its cgroup does not say: the top one of version 2, or none at all
            killed = (now.machine_kills or 0) > (before.machine_kills or 0)
        if not killed:
            return None
        if hit is None:
            total = int(psutil.virtual_memory().total)
            message = f"the kernel killed it: the machine ran out of memory, of which it has {gib(total)}"
            return Death(KERNEL_KILLED, message, total, None)
        limit = hit.limit()
        message = f"the kernel killed it: its cgroup allows {gib(limit or 0)}"
        return Death(CGROUP_KILLED, message, limit, hit.used())


def levels_of(pid: int) -> tuple[Level, ...]:
    """The cgroups that bound the memory of `pid`, its own first; none where that cannot be seen."""
    try:
        listed = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ()
    of = {kind: path for _, kind, path in (line.split(":", 2) for line in listed)}
    in_v1 = next((path for kind, path in of.items() if "memory" in kind.split(",")), None)
    path = in_v1 if in_v1 is not None else of.get("")
    for line in mounts:
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        wanted = kind == "cgroup" and "memory" in options.split(",") if in_v1 is not None else kind == "cgroup2"
        if wanted and path is not None:
            root, mounted = fields.split()[3:5]
            return tuple(
                Level(directory, in_v1 is None) for directory in _upwards(PurePosixPath(path), root, Path(mounted))
            )
    return ()


def _upwards(path: PurePosixPath, root: str, mounted: Path) -> list[Path]:
    """Directories from a cgroup's up to the mount's, which shows the tree from `root` on."""
    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    lowest = mounted / inside
    return [lowest, *(parent for parent in lowest.parents if parent.is_relative_to(mounted))]


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
