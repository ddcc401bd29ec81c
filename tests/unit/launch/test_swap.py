"""A rank's folder on a disk: its own, gone with it, and refused where DeepSpeed could not use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launch.swap
from launch.errors import SpecError
from launch.swap import remove_folders, take_folder

HOLD = """
import sys, time
import launch.swap
launch.swap._check_operation = lambda: None
print(launch.swap.take_folder(sys.argv[1]), flush=True)
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.swap, "_check_operation", lambda: None)


def test_each_rank_has_its_own_and_takes_it_along(tmp_path: Path) -> None:
    disk = tmp_path / "not" / "there"
    mine, other = Path(take_folder(str(disk))), Path(take_folder(str(disk)))
    assert mine != other
    assert {mine.parent, other.parent} == {disk}
    (mine / "state.swp").write_bytes(b"x")
    remove_folders()
    assert list(disk.iterdir()) == []


def test_what_a_killed_rank_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        folders = [Path(rank.stdout.readline().decode().strip()) for rank in ranks if rank.stdout is not None]
        (tmp_path / "of-the-user").mkdir()
        ranks[0].send_signal(signal.SIGKILL)
        ranks[0].wait()
        take_folder(str(tmp_path))
        assert [folder.exists() for folder in folders] == [False, True]
        assert (tmp_path / "of-the-user").exists()
    finally:
        remove_folders()
        for rank in ranks:
            rank.kill()
            rank.wait()
            if rank.stdout is not None:
                rank.stdout.close()


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError) as caught:
        take_folder(str(tmp_path / "file" / "below"))
    assert (caught.value.code, caught.value.field) == ("offload-path-unusable", "offload_path")

    def no_direct_io(*_: object, **__: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", no_direct_io)
    with pytest.raises(SpecError, match="Invalid argument"):
        take_folder(str(tmp_path))


class Operation:
    """As much of DeepSpeed's builder as is asked."""

    NAME = "async_io"
    compatible, breaks = True, False

    def is_compatible(self) -> bool:
        return self.compatible

    def load(self, *, verbose: bool) -> None:
        assert not verbose
        if self.breaks:
            raise RuntimeError("Error building extension 'async_io'")


@pytest.mark.parametrize(
    ("compatible", "breaks", "why"), [(False, False, "libaio"), (True, True, "Error building"), (True, False, None)]
)
def test_a_node_without_the_operation_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compatible: bool, breaks: bool, why: str | None
) -> None:
    import deepspeed.ops.op_builder

    monkeypatch.undo()  # of the fixture above: the check itself
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(Operation, "compatible", compatible)
    monkeypatch.setattr(Operation, "breaks", breaks)
    monkeypatch.setattr(deepspeed.ops.op_builder, "AsyncIOBuilder", Operation)
    left = tmp_path / "extensions" / "async_io" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()  # by a compilation that was killed
    if why is None:
        take_folder(str(tmp_path / "disk"))
        remove_folders()
        assert not left.exists()
        return
    with pytest.raises(SpecError, match=why) as caught:
        take_folder(str(tmp_path / "disk"))
    assert (caught.value.code, caught.value.field) == ("nvme-offload-not-available", "offload_path")
    assert "libaio-dev" in (caught.value.hint or "")
