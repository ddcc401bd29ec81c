"""What the counters of a node tell of energy while an attempt runs. Standard library alone, and NVML for GPUs.

Only what a counter says is told: where there is none, or it cannot be read, there is no figure. GPUs: not run on a GPU
here, covered by a fake NVML in tests.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
LOOK_S = 20.0  # 32 bits of 15.3 uJ, as many counters have, last a minute at a kilowatt
UJ, MJ = 1e6, 1e3  # in a joule


class Meter:
    """Runs from when it is made until it is read."""

    def __init__(self, gpus: Sequence[int] = (), powercap: Path = POWERCAP) -> None:
        self._gpus = tuple(gpus)
        self._gpu_before = gpu_mj(self._gpus)
        self._zones: list[Zone] | None = zones_of(powercap) or None
        self._looked_at = time.monotonic()

    def look(self) -> None:
        """From time to time, since counters of processors begin anew when they are full."""
        if self._zones is not None and time.monotonic() - self._looked_at >= LOOK_S:
            self._look()

    def read(self) -> dict[str, float | None]:
        """An Energy (cluster.status), as JSON types."""
        self._look()
        before, after = self._gpu_before, gpu_mj(self._gpus)
        gpu = None if before is None or after is None else (after - before) / MJ
        return {
            "gpu_j": None if gpu is not None and gpu < 0 else gpu,  # below 0: its driver was loaded again meanwhile
            "cpu_j": None if self._zones is None else sum(zone.used for zone in self._zones) / UJ,
        }

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        if self._zones is not None and not all(zone.look() for zone in self._zones):
            self._zones = None  # one can no longer be read, so nobody knows


class Zone:
    """The counter of a processor's package, in microjoules."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, ValueError."""
        self._counter = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())
        self.used = 0

    def look(self) -> bool:
        """Add what was used since the last look; False if it cannot be read."""
        try:
            now = int(self._counter.read_text())
        except (OSError, ValueError):
            return False
        self.used += now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return True


def zones_of(powercap: Path) -> list[Zone]:
    """The packages, without what is counted in them (cores, memory) or around them (the platform); none unless all can
    be read, which often root alone may."""
    try:
        folders = [
            folder
            for folder in sorted(powercap.glob("intel-rapl:*"))
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package")
        ]
        return [Zone(folder) for folder in folders]
    except (OSError, ValueError):
        return []


def gpu_mj(gpus: Sequence[int]) -> int | None:
    """What these GPUs have used since their driver was loaded, together, in millijoules; None if one cannot tell."""
    if not gpus:
        return None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in gpus]
            return sum(int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles)
        finally:
            pynvml.nvmlShutdown()
    return None
