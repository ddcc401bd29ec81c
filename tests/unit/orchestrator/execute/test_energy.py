"""Energy by counters: processors by a directory that looks like Linux's, GPUs by an NVML that is made up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.cluster.status import Energy
from orchestrator.execute import energy as energy_module
from orchestrator.execute.energy import Meter

RANGE = 1_000_000


def zone(root: Path, name: str, kind: str, used: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{used}\n")
    return folder / "energy_uj"


def test_packages_are_summed_and_what_is_in_or_around_them_is_not(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 100), zone(tmp_path, "intel-rapl:1", "package-1", 7)
    core, whole = zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = Meter(powercap=tmp_path)
    for counter, used in ((first, 500_100), (second, 250_007), (core, 400_000), (whole, 900_000)):
        counter.write_text(str(used))
    assert meter.read() == {"gpu_j": None, "cpu_j": 0.75}
    assert Energy.model_validate(meter.read()).cpu_j == 0.75


def test_a_counter_that_is_full_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(energy_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    meter = Meter(powercap=tmp_path)
    for used in (600_000, 300_000, 200_000):  # each less than the one before: 0.7, 0.7 and 0.9 J
        counter.write_text(str(used))
        meter.look()  # too soon, and of no consequence
        now[0] += energy_module.LOOK_S
        meter.look()
    counter.write_text("400000")
    assert meter.read()["cpu_j"] == pytest.approx(0.7 + 0.7 + 0.9 + 0.2)


def test_where_there_is_no_counter_there_is_no_figure(tmp_path: Path) -> None:
    assert Meter(powercap=tmp_path / "nothing").read() == {"gpu_j": None, "cpu_j": None}
    assert Meter(powercap=tmp_path).read() == {"gpu_j": None, "cpu_j": None}


def test_a_counter_that_cannot_be_read_to_the_end_gives_no_figure(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = Meter(powercap=tmp_path)
    counter.unlink()
    assert meter.read()["cpu_j"] is None
    assert Meter(powercap=tmp_path).read()["cpu_j"] is None  # nor one of two packages alone


class FakeNvml:
    """Counters of four GPUs, in millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.used = [1000, 2000, 3000, 4000]
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.used[handle]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_gpus_of_the_attempt_alone_are_counted(nvml: FakeNvml, tmp_path: Path) -> None:
    meter = Meter((1, 3), tmp_path)
    nvml.used = [9000, 2500, 9000, 5000]
    assert meter.read() == {"gpu_j": 1.5, "cpu_j": None}
    assert Meter((), tmp_path).read()["gpu_j"] is None


def test_a_gpu_that_cannot_tell_gives_no_figure(nvml: FakeNvml, tmp_path: Path) -> None:
    meter, again = Meter((0,), tmp_path), Meter((0,), tmp_path)
    nvml.used[0] = 10  # its driver was loaded again
    assert meter.read()["gpu_j"] is None
    nvml.broken = True
    assert again.read()["gpu_j"] is None
    assert Meter((0,), tmp_path).read()["gpu_j"] is None
