"""Where checkpoints lie: a directory, or a prefix of an object store, with the same few promises. Torch-free.

Both can create an object that nobody has created before, whole or not at all; read ranges; list. What is never used is
rename, overwriting, and the order in which different objects become visible.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from launch.checkpoint.manifest import CheckpointError

CREATE_TRIES = 5


class Storage(Protocol):
    """Objects under a root, by name with `/` between parts."""

    url: str

    def create(self, name: str, data: bytes) -> bool:
        """Create `name` with `data`, durable when this returns; False if it exists already with another content. Of
        many that try at once with data of their own, one succeeds. One that tries again with the same data, since the
        answer to its success was lost on the way, has succeeded. Raises CheckpointError where the store does not work.
        """

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
        """Delete everything under the directory `prefix`. Raises CheckpointError if something stays."""


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


ANSWER_S = 600
"""How long a store may take for one answer; botocore's own minute is short for a loaded one."""


class LocalStorage:
    """A directory of a POSIX file system, local or shared. Durable means: fsync of the file and of its directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        # Written under a name of its own and linked: the name appears with its whole content or not at all. Other nodes
        # write here, too, so neither pids nor threads make a name unique.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with _translated(self.url, writing=True):
            self._make_parent(path)
            try:
                _write_synced(temporary, [memoryview(data)])
                if not _link(temporary, path):
                    return path.read_bytes() == data  # NFS, too, may lose the answer to a success
            finally:
                temporary.unlink(missing_ok=True)
            _sync(path.parent)
        return True

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        path = self._path(name)
        with _translated(self.url, writing=True):
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
        # What another process deletes meanwhile is as good as deleted here.
        with _translated(self.url), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path(prefix))

    def _path(self, name: str) -> Path:
        path = self.root / name
        assert ".." not in path.parts, name
        return path

    def _make_parent(self, path: Path) -> None:
        missing = []
        folder = path.parent
        while not folder.is_dir() and folder != folder.parent:
            missing.append(folder)
            folder = folder.parent
        path.parent.mkdir(parents=True, exist_ok=True)
        for made in missing:
            _sync(made.parent)


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
        options = {"config_kwargs": {"read_timeout": ANSWER_S}} if self.url.startswith("s3") else {}
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)

    def create(self, name: str, data: bytes) -> bool:
        for _ in range(CREATE_TRIES):
            with _translated(self.url, writing=True):
                try:
                    self._fs.pipe_file(self._path(name), data, mode="create")
                    return True
                except OSError as problem:
                    if not isinstance(problem, FileExistsError) and not _precondition_failed(problem):
                        raise
            # The client may have tried again by itself, after the answer to a success was lost.
            with contextlib.suppress(FileNotFoundError):  # it was another one's, and is gone again
                return self.read(name) == data
        raise _failed(self.url, OSError(f"{name} comes and goes while it is being created"))

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        with _translated(self.url, writing=True):
            # A stream that is not closed leaves a multi-part upload that never becomes an object.
            stream = self._fs.open(self._path(name), "wb")
            try:
                for block in blocks:
                    stream.write(block)
                stream.close()
            except BaseException:
                stream.discard()
                stream.closed = True  # or it would try to once more when it is collected
                raise

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
        # Consoles make objects that stand for directories; they have no name of their own.
        return sorted(name.removeprefix(f"{self._root}/") for name in found if not name.endswith("/"))

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
    """Whether a store refused an exclusive creation, or was creating another's: the cause is botocore's error."""
    response = getattr(problem.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("PreconditionFailed", "ConditionalRequestConflict")


def _write_synced(path: Path, blocks: Iterable[memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        written = begun = 0
        for block in blocks:
            rest = block
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            written += len(block)
            if written - begun >= _AHEAD:
                _begin_writing(descriptor, begun, written - begun)
                begun = written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AHEAD = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_C = ctypes.CDLL(None, use_errno=True)


def _begin_writing(descriptor: int, start: int, length: int) -> None:
    """Have the kernel begin to write what it has been given, so that the disk works while the next block is hashed and
    copied. A hint: fsync decides, and where there is no such call it does all of it."""
    if hasattr(_C, "sync_file_range"):
        offset, size = ctypes.c_int64(start), ctypes.c_int64(length)
        _C.sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def _link(temporary: Path, path: Path) -> bool:
    """Give the file another name; False if that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as problem:
        if problem.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise CheckpointError(
            f"the file system of {path.parent} has no hard links, by which a checkpoint is committed",
            code="storage-unsupported",
            field="checkpoint.directory",
            hint="choose a directory on another file system, or an object store",
        ) from problem
    return True


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
            raise _denied(url, problem) from problem
        raise _failed(url, problem) from problem
    except _client_errors() as problem:
        if "Credential" in type(problem).__name__:  # none, half of them, or expired ones
            raise _denied(url, problem) from problem
        raise _failed(url, problem) from problem


def _denied(url: str, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"the storage of the checkpoints refuses access: {url}: {problem}",
        code="storage-denied",
        field="checkpoint.directory",
        hint="check permissions and credentials on every node",
    )


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
