"""A rank's folder on its node's disk, for state that DeepSpeed keeps there (ZeRO-Infinity). Torch-free to import.

Nothing in it outlives the rank: a job goes on from its checkpoints. A rank removes its folder when it ends; those of
ranks that were killed are removed by the next that comes to the same directory, which knows them by their lock: the
kernel lets go of it with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.errors import SpecError

PREFIX = "tuneyard-"
LOCK = "lock"
OPERATIONS = ("pin_memory", "async_io")
"""What DeepSpeed compiles for it, in this order."""

_taken: list[tuple[Path, int]] = []
"""This process's folders, and the descriptors that hold their locks."""


def take_folder(directory: str) -> str:
    """A new folder in `directory`, this process's own.

    Raises:
        SpecError: DeepSpeed cannot read and write there: no such operation here, no room, no direct I/O.
    """
    _check_operation()
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        _sweep(Path(directory))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        unnamed = folder / f".{LOCK}"  # until it is locked: another rank may be sweeping
        # Not inherited by what this process starts: the lock is to go with it.
        lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(folder / LOCK)
    except OSError as problem:
        raise SpecError(
            f"nothing can be offloaded to {directory}: {problem.strerror}",
            code="offload-path-unusable",
            field="offload_path",
            hint="name a directory that this user may write to, on a disk of each node (a tmpfs takes no direct I/O)",
        ) from problem
    _taken.append((folder, lock))
    return str(folder)


def remove_folders() -> None:
    """Remove what this process has taken; at its very end."""
    while _taken:
        folder, lock = _taken.pop()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(directory: Path) -> None:
    """Remove the folders of processes that are gone."""
    for lock in directory.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # swept by another rank meanwhile, or in use
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def _check_operation() -> None:
    """Load DeepSpeed's asynchronous I/O, which a machine compiles at its first use, unless the installation has it.

    Raises:
        SpecError: it cannot be.
    """
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    why = "libaio or a C++ compiler is missing"
    if installed_ops.get(builder.NAME) or builder.is_compatible():
        try:
            with _compiling_alone():
                builder.load(verbose=False)
            return
        except (ImportError, RuntimeError, OSError) as problem:
            why = str(problem)
    raise SpecError(
        f"DeepSpeed cannot offload to a disk here: {why}",
        code="nvme-offload-not-available",
        field="offload_path",
        hint="install libaio with its headers and a C++ compiler on every node (Debian, Ubuntu: apt-get install "
        "libaio-dev g++), or leave offload_path out",
    )


@contextlib.contextmanager
def _compiling_alone() -> Iterator[None]:
    """Torch marks a compilation by a file. One that was killed leaves it, and who comes next would wait for good."""
    from torch.utils.cpp_extension import _get_build_directory

    folders = [Path(_get_build_directory(name, verbose=False)) for name in OPERATIONS]
    with (folders[0].parent / "tuneyard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        yield
