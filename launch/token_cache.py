"""Arrays that took long to make, kept on disk under the hash of all they were made from.

`$TUNEYARD_CACHE/tokens/<key>/` holds one safetensors file and the hash of its bytes. Processes of one machine that want
the same entry wait for the first of them to make it, then map the same pages. The cache is never needed: what cannot be
read is made anew, and what cannot be written is said once.

An entry appears whole, by a rename, and is not synced to the disk: its hash tells a torn one as well as a flipped bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from launch.errors import SpecError

ENV_CACHE = "TUNEYARD_CACHE"
ENV_LIMIT = "TUNEYARD_CACHE_GIB"
DEFAULT_LIMIT_GIB = 20.0
ARRAYS, DIGEST = "arrays.safetensors", "digest"
DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "BOOL": np.dtype("?")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ABANDONED_S = 24 * 3600.0
"""A directory that is still unfinished after so long belongs to a process that died."""


class Entry(NamedTuple):
    """Named arrays, and what is to be known of them."""

    arrays: dict[str, npt.NDArray[Any]]
    facts: dict[str, str]


class _Turn(NamedTuple):
    """How an entry is made: by this process alone on its machine, and to be kept."""

    alone: bool
    writable: bool


@dataclass(frozen=True)
class TokenCache:
    """Entries below `root`, together no larger than `limit` bytes, but for those in use."""

    root: Path
    limit: int

    def fetch(self, key_of: Callable[[], str], build: Callable[[bool], Entry]) -> Entry:
        """The entry of `key_of()`: mapped, or as `build` has just made it. What is written to it stays in this process.

        `build` is told whether it alone works on this key on this machine. `key_of` is asked again after it: what
        changed while it was read is not kept.
        """
        key = key_of()
        found = self._read(key)
        if found is None:
            with self._turn(key) as turn:
                found = self._read(key) or self._made(key, turn, key_of, build)
        return found

    def _made(self, key: str, turn: _Turn, key_of: Callable[[], str], build: Callable[[bool], Entry]) -> Entry:
        if turn.alone and (self.root / key).exists():
            _say(f"{self.root / key} is damaged: it is removed, and the data tokenised anew")
            self._remove(key)
        made = build(turn.alone)
        if not turn.writable or key_of() != key:
            return made
        try:
            self._write(key, made)
            self._evict(key)
        except OSError as problem:
            self._say_not_kept(problem)
        return self._read(key) or made

    def _read(self, key: str) -> Entry | None:
        """The entry, mapped; None where there is none that is whole."""
        directory = self.root / key
        try:
            with (directory / ARRAYS).open("rb") as file:
                # The mapping keeps the descriptor, and so this lock, for as long as an array of it is used.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() != (directory / DIGEST).read_text():
                    return None
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, UnicodeDecodeError):
            return None
        with contextlib.suppress(OSError):  # another user's cache may be read, too
            os.utime(directory)
        return _parsed(mapped)

    @contextlib.contextmanager
    def _turn(self, key: str) -> Iterator[_Turn]:
        """Waits until no other process makes this entry. The kernel ends the turn of one that dies."""
        path = self.root / f"{key}.lock"
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # what was private as text is so as tokens
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as problem:
            self._say_not_kept(problem)
            yield _Turn(alone=False, writable=False)
            return
        turn = self._taken(descriptor, path)
        try:
            yield turn
        finally:
            if turn.alone and not (self.root / key).exists():
                path.unlink(missing_ok=True)  # tells those who wait for it, see _taken
            os.close(descriptor)

    def _taken(self, descriptor: int, path: Path) -> _Turn:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"another process tokenises the same data: waiting for it, and for {path}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as problem:  # a file system without locks
            self._say_not_kept(problem)
            return _Turn(alone=False, writable=False)
        if _is_at(descriptor, path):
            return _Turn(alone=True, writable=True)
        # Whoever had it left no entry and took the lock's name away: nothing is gained by one after the other.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return _Turn(alone=False, writable=True)

    def _say_not_kept(self, problem: OSError) -> None:
        _say(f"tokenised data is not kept in {self.root}: {problem}")

    def _remove(self, key: str) -> None:
        """Out of sight first, so that nobody opens half of it."""
        with contextlib.suppress(OSError), self._aside(key) as away:
            (self.root / key).rename(away / key)

    @contextlib.contextmanager
    def _aside(self, key: str) -> Iterator[Path]:
        """A new directory beside the entries, gone afterwards."""
        directory = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=self.root))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _write(self, key: str, entry: Entry) -> None:
        with self._aside(key) as aside:
            made = aside / key
            made.mkdir()
            (made / DIGEST).write_text(_written(made / ARRAYS, entry))
            try:
                made.rename(self.root / key)
            except OSError:
                if not (self.root / key).exists():  # else a process that was not in turn was faster with the same
                    raise

    def _evict(self, kept: str) -> None:
        """Remove entries, those first that were not used for longest, until the rest is within the limit."""
        found = []
        for path in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # others remove, too
                if path.is_dir() and path.name.startswith("."):
                    if time.time() - path.stat().st_mtime > ABANDONED_S:
                        shutil.rmtree(path, ignore_errors=True)
                elif path.is_dir():
                    found.append((path.stat().st_mtime, path.name, sum(file.stat().st_size for file in path.iterdir())))
        total = sum(size for _, _, size in found)
        for _, key, size in sorted(found):
            if total > self.limit and key != kept and self._removed_if_unused(key):
                total -= size

    def _removed_if_unused(self, key: str) -> bool:
        with contextlib.ExitStack() as held:
            for path in (self.root / f"{key}.lock", self.root / key / ARRAYS):
                try:
                    file = held.enter_context(path.open("r+b"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except FileNotFoundError:
                    continue
                except OSError:
                    return False
            self._remove(key)
            (self.root / f"{key}.lock").unlink(missing_ok=True)
        return not (self.root / key).exists()


def cache_from_environment() -> TokenCache | None:
    """The cache of this user, or the one that the environment names; None where it is turned off.

    Raises:
        SpecError: the limit is no number.
    """
    told = os.environ.get(ENV_LIMIT) or str(DEFAULT_LIMIT_GIB)
    try:
        limit = float(told)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise SpecError(
            f"{ENV_LIMIT} is {told!r}, not a number of GiB",
            code="bad-setting",
            field=ENV_LIMIT,
            hint="give the size that the cache may have, such as 20, or 0 for none",
        )
    try:
        root = Path(os.environ.get(ENV_CACHE) or "~/.cache/tuneyard").expanduser().absolute()
    except RuntimeError:  # nobody's process, without a home directory
        return None
    return TokenCache(root / "tokens", int(min(limit * 2**30, sys.maxsize))) if limit else None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _written(path: Path, entry: Entry) -> str:
    """Writes `entry` as a safetensors file; returns the hash of its bytes.

    Not by the library: a full disk is an error of its own there, and it wants a second copy in memory.
    """
    header: dict[str, Any] = {"__metadata__": entry.facts}
    end = 0
    arrays = sorted(entry.arrays.items(), key=lambda item: -item[1].itemsize)  # so that each lies aligned
    for name, array in arrays:
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": (end, end + array.nbytes),
        }
        end += array.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    pieces: list[bytes | memoryview] = [len(told).to_bytes(8, "little"), told]
    pieces += [np.ascontiguousarray(array).data for _, array in arrays]
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _parsed(mapped: mmap.mmap) -> Entry:
    """The entry in a safetensors file whose hash is known to be right; its arrays are views of the mapping."""
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    facts = header.pop("__metadata__")
    arrays = {
        name: np.ndarray(told["shape"], DTYPES[told["dtype"]], mapped, start + told["data_offsets"][0])
        for name, told in header.items()
    }
    return Entry(arrays, facts)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
