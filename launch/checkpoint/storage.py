"""Where checkpoints lie: a directory, or a prefix of an object store, with the same few promises. Torch-free.

Both can create an object that nobody has created before, whole or not at all; read ranges; list. What is never used is
rename, overwriting, and the order in which different objects become visible.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from launch.checkpoint.manifest import CheckpointError


class Storage(Protocol):
    """Objects under a root, by name with `/` between parts."""

    url: str

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, durable when this returns; False if it exists already. Of many that try at once,
        one succeeds. Raises CheckpointError where the store does not work."""

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        """Write what nobody else writes, durable when this returns. An object of that name is replaced.

        Raises:
            CheckpointError: storage-full, storage-denied or storage-failed.
        """

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError; CheckpointError where the store does not work."""

    def reader(self, name: str) -> contextlib.AbstractContextManager[RangeReader]:
        """To read ranges of one object, from several threads. Raises as `read` does."""

    def names(self, prefix: str) -> list[str]:
        """Everything under the directory `prefix`, relative to the root; empty if there is nothing."""

    def exists(self, name: str) -> bool: ...

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""

    def delete_all(self, prefix: str) -> None:
        """Delete everything under the directory `prefix`."""


class RangeReader(Protocol):
    def read_into(self, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes from `start` on; returns how many there were before the object ended."""


def open_storage(url: str) -> Storage:
    """A path or a `file://` URL, or whatever fsspec knows: `s3://bucket/prefix`, ...

    Raises:
        CheckpointError: no such kind of store, or its package is not installed.
    """
    if "://" not in url or url.startswith("file://"):
        return LocalStorage(Path(url.removeprefix("file://")))
    try:
        return ObjectStorage(url)
    except (ImportError, ValueError) as problem:
        raise CheckpointError(
            f"checkpoints cannot go to {url}: {problem}",
            code="unknown-storage",
            field="checkpoint.directory",
            hint="for s3:// install tuneyard[s3]; a path or file:// needs nothing",
        ) from problem


class LocalStorage:
    """A directory of a POSIX file system, local or shared. Durable means: fsync of the file and of its directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        # Written under a name of its own and linked: the name appears with its whole content or not at all.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        with _translated(self.url):
            self._make_parent(path)
            try:
                _write_synced(temporary, [memoryview(data)])
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync(path.parent)
        return True

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        path = self._path(name)
        with _translated(self.url):
            self._make_parent(path)
            _write_synced(path, blocks)
            _sync(path.parent)

    def read(self, name: str) -> bytes:
        with _translated(self.url):
            return self._path(name).read_bytes()

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[RangeReader]:
        with _translated(self.url):
            descriptor = os.open(self._path(name), os.O_RDONLY)
        try:
            yield _Descriptor(descriptor, self.url)
        finally:
            os.close(descriptor)

    def names(self, prefix: str) -> list[str]:
        top = self._path(prefix) if prefix else self.root
        with _translated(self.url):
            found = [
                Path(folder, file).relative_to(self.root).as_posix()
                for folder, _, files in os.walk(top)
                for file in files
                if not file.endswith(".tmp")
            ]
        return sorted(found)

    def exists(self, name: str) -> bool:
        with _translated(self.url):
            return self._path(name).exists()

    def delete(self, name: str) -> None:
        path = self._path(name)
        with _translated(self.url):
            path.unlink(missing_ok=True)
            if path.parent.exists():
                _sync(path.parent)

    def delete_all(self, prefix: str) -> None:
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def _path(self, name: str) -> Path:
        path = self.root / name
        assert ".." not in path.parts, name
        return path

    def _make_parent(self, path: Path) -> None:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync(path.parent.parent)


class _Descriptor:
    def __init__(self, descriptor: int, url: str) -> None:
        self._descriptor, self._url = descriptor, url

    def read_into(self, start: int, target: memoryview) -> int:
        done = 0
        with _translated(self._url):
            while done < len(target):
                read = os.preadv(self._descriptor, [target[done:]], start + done)
                if read == 0:
                    break
                done += read
        return done


class ObjectStorage:
    """An object store by fsspec. Its PUTs are whole or nothing and durable; exclusive creation is If-None-Match."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Listings must be of now: other processes write here. Ranks are threads of one program for fsspec, too.
        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    def create(self, name: str, data: bytes) -> bool:
        with _translated(self.url, writing=True):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as problem:
                if _precondition_failed(problem):
                    return False
                raise
        return True

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        with _translated(self.url, writing=True):
            # A stream that is not closed leaves a multi-part upload that never becomes an object.
            stream = self._fs.open(self._path(name), "wb")
            try:
                for block in blocks:
                    stream.write(block)
            except BaseException:
                stream.discard()
                raise
            stream.close()

    def read(self, name: str) -> bytes:
        with _translated(self.url):
            found: bytes = self._fs.cat_file(self._path(name))
        return found

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[RangeReader]:
        with _translated(self.url):
            size = int(self._fs.info(self._path(name))["size"])
        yield _ObjectRanges(self._fs, self._path(name), size, self.url)

    def names(self, prefix: str) -> list[str]:
        top = f"{self._root}/{prefix}" if prefix else self._root
        with _translated(self.url):
            try:
                found = self._fs.find(top)
            except FileNotFoundError:
                return []
        return sorted(name.removeprefix(self._root).lstrip("/") for name in found)

    def exists(self, name: str) -> bool:
        with _translated(self.url):
            return bool(self._fs.exists(self._path(name)))

    def delete(self, name: str) -> None:
        with _translated(self.url), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def delete_all(self, prefix: str) -> None:
        names = self.names(prefix)
        if names:
            with _translated(self.url), contextlib.suppress(FileNotFoundError):
                self._fs.rm([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _ObjectRanges:
    def __init__(self, fs: Any, path: str, size: int, url: str) -> None:
        self._fs, self._path, self._size, self._url = fs, path, size, url

    def read_into(self, start: int, target: memoryview) -> int:
        end = min(start + len(target), self._size)
        if start >= end:  # a range that begins past the end is an error to a store, and no bytes to us
            return 0
        with _translated(self._url):
            found = self._fs.cat_file(self._path, start=start, end=end)
        target[: len(found)] = found
        return len(found)


def _precondition_failed(problem: OSError) -> bool:
    """Whether a store refused an exclusive creation: botocore's error is the cause that fsspec keeps."""
    response = getattr(problem.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("PreconditionFailed", "ConditionalRequestConflict")


def _write_synced(path: Path, blocks: Iterable[memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for block in blocks:
            rest = block
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _translated(url: str, *, writing: bool = False) -> Iterator[None]:
    """What goes wrong in a store, as a CheckpointError. Whether what is read is there stays Python's own to say."""
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError as problem:
        if not writing:
            raise
        raise _failed(url, problem) from problem  # an object store without the bucket
    except OSError as problem:
        if problem.errno in _FULL:
            raise CheckpointError(
                f"the storage of the checkpoints is full: {url}",
                code="storage-full",
                field="checkpoint.directory",
                hint="free space, lower checkpoint.keep_last, or `tuneyard checkpoint prune`",
            ) from problem
        if isinstance(problem, PermissionError) or problem.errno == errno.EROFS:
            raise CheckpointError(
                f"the storage of the checkpoints refuses access: {url}: {problem}",
                code="storage-denied",
                field="checkpoint.directory",
                hint="check permissions and credentials on every node",
            ) from problem
        raise _failed(url, problem) from problem
    except _client_errors() as problem:
        raise _failed(url, problem) from problem


def _failed(url: str, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"the storage of the checkpoints fails: {url}: {problem}",
        code="storage-failed",
        field="checkpoint.directory",
        hint="is it mounted, are its address and credentials right, and can every node reach it?",
    )


def _client_errors() -> tuple[type[Exception], ...]:
    """What the S3 client raises beside OSErrors, if it is in use: no credentials, no endpoint."""
    botocore = sys.modules.get("botocore.exceptions")
    return (botocore.BotoCoreError, botocore.ClientError) if botocore is not None else ()
