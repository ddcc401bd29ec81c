"""The promises of a store, the same for a directory and for S3."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from launch.checkpoint import storage as module
from launch.checkpoint.manifest import CheckpointError
from launch.checkpoint.storage import LocalStorage, ObjectStorage, Storage, open_storage

THREADS = 8


def refused(call: Callable[[], object]) -> CheckpointError:
    with pytest.raises(CheckpointError) as told:
        call()
    assert told.value.field == "checkpoint.directory"
    assert told.value.hint
    return told.value


def test_what_is_created_is_there_whole(storage: Storage) -> None:
    assert storage.create("a/b/c", b"first") is True
    assert storage.create("a/b/c", b"second") is False
    assert storage.read("a/b/c") == b"first"
    assert storage.names("") == ["a/b/c"]


def test_a_creation_whose_answer_was_lost_can_be_tried_again(storage: Storage) -> None:
    assert storage.create("claim", b"mine") is True
    assert storage.create("claim", b"mine") is True
    assert storage.create("claim", b"theirs") is False


def test_of_many_that_create_at_once_one_succeeds(storage: Storage) -> None:
    for round_ in range(3):
        barrier = threading.Barrier(THREADS)
        won: list[int] = []

        def create(number: int, name: str, barrier: threading.Barrier, won: list[int]) -> None:
            barrier.wait()
            if storage.create(name, f"{number}".encode()):
                won.append(number)

        threads = [
            threading.Thread(target=create, args=(number, f"claims/{round_}", barrier, won))
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read(f"claims/{round_}") == f"{won[0]}".encode()
    assert storage.names("") == [f"claims/{round_}" for round_ in range(3)]  # nothing else is left


def test_what_is_written_may_be_replaced(storage: Storage) -> None:
    storage.write("a/shard", [memoryview(b"long and old")])
    storage.write("a/shard", [memoryview(b"new"), memoryview(b""), memoryview(b"er")])
    assert storage.read("a/shard") == b"newer"
    storage.write("a/empty", [])
    assert storage.read("a/empty") == b""


def test_what_fails_half_way_does_not_appear_as_whole(storage: Storage) -> None:
    def blocks() -> Iterator[memoryview]:
        yield memoryview(b"half")
        raise KeyError("the snapshot failed")

    with pytest.raises(KeyError):
        storage.write("step-1.attempt-1/shard", blocks())
    # A directory may show the half; without a marker it counts for nothing. An object is whole or not there.
    if isinstance(storage, ObjectStorage):
        assert storage.names("") == []


def test_ranges_and_past_the_end(storage: Storage) -> None:
    storage.write("file", [memoryview(bytes(range(100)))])
    with storage.reader("file") as reader:
        for start, length, expected in ((0, 10, 10), (90, 10, 10), (95, 10, 5), (100, 1, 0), (5000, 4, 0), (7, 0, 0)):
            target = bytearray(b"\xff" * length)
            assert reader.read_into(start, memoryview(target)) == expected
            assert target == bytes(range(100))[start : start + length] + b"\xff" * (length - expected)


def test_ranges_are_read_by_several_threads(storage: Storage) -> None:
    data = os.urandom(80_000)
    storage.write("file", [memoryview(data)])
    found = bytearray(len(data))
    with storage.reader("file") as reader:

        def read(number: int) -> None:
            start = 10_000 * number
            reader.read_into(start, memoryview(found)[start : start + 10_000])

        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == data


def test_what_is_not_there(storage: Storage) -> None:
    for _ in range(2):  # the second time with a store that has something
        with pytest.raises(FileNotFoundError):
            storage.read("none")
        with pytest.raises(FileNotFoundError), storage.reader("none"):
            pass
        assert storage.names("none") == []
        assert storage.exists("none") is False
        storage.delete("none")
        storage.delete_all("none")
        storage.create("other", b"")


def test_names_are_of_a_directory_not_of_a_prefix(storage: Storage) -> None:
    for name in ("step-1.attempt-1/a", "step-1.attempt-1/b", "step-1.attempt-10/a", "claims/attempt-1.json"):
        storage.create(name, b"x")
    assert storage.names("step-1.attempt-1") == ["step-1.attempt-1/a", "step-1.attempt-1/b"]
    storage.delete("step-1.attempt-1/b")
    storage.delete_all("step-1.attempt-1")
    assert storage.names("") == ["claims/attempt-1.json", "step-1.attempt-10/a"]


def test_listings_are_of_now(storage: Storage) -> None:
    other = open_storage(storage.url)
    for number in range(3):
        storage.create(f"claims/{number}", b"x")
        assert len(other.names("claims")) == number + 1
    other.delete("claims/1")
    assert storage.names("claims") == ["claims/0", "claims/2"]


# Directories.


def test_a_path_and_a_file_url_are_directories(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        found = open_storage(url)
        assert isinstance(found, LocalStorage)
        assert found.root == tmp_path


def test_no_name_leaves_the_store(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        LocalStorage(tmp_path).read("../../etc/passwd")


def test_what_is_being_created_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".COMMITTED.0123.tmp").touch()
    assert LocalStorage(tmp_path).names("") == []


def test_every_directory_that_is_made_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(module, "_sync", synced.append)
    LocalStorage(tmp_path / "a" / "b").create("c/d", b"x")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"}


def test_a_file_system_without_hard_links_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert refused(lambda: LocalStorage(tmp_path).create("a", b"x")).code == "storage-unsupported"
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for store, name in ((LocalStorage(tmp_path / "file"), "a"), (LocalStorage(tmp_path), "file/a")):
        assert refused(lambda store=store, name=name: store.create(name, b"x")).code == "storage-failed"
        assert refused(lambda store=store, name=name: store.write(name, [])).code == "storage-failed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    store = LocalStorage(small_disk)
    store.create("step-1.attempt-1/COMMITTED", b"x")
    blocks = [memoryview(bytes(1 << 16))] * 8
    assert refused(lambda: store.write("step-2.attempt-1/shard", blocks)).code == "storage-full"
    assert refused(lambda: store.create("step-2.attempt-1/MANIFEST.json", bytes(1 << 18))).code == "storage-full"
    assert not store.exists("step-2.attempt-1/MANIFEST.json")
    store.delete_all("step-2.attempt-1")  # makes room again
    store.write("step-3.attempt-1/shard", blocks[:2])
    assert store.names("") == ["step-1.attempt-1/COMMITTED", "step-3.attempt-1/shard"]


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStorage(tmp_path / "store")
    store.create("a/b", b"x")
    if os.geteuid() == 0:  # root may do everything: let the system call say what it says to others

        def denied(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
        monkeypatch.setattr(shutil, "rmtree", denied)
    else:
        (tmp_path / "store" / "a").chmod(0o500)
    try:
        assert refused(lambda: store.create("a/c", b"x")).code == "storage-denied"
        assert refused(lambda: store.write("a/c", [memoryview(b"x")])).code == "storage-denied"
        assert refused(lambda: store.delete_all("a")).code == "storage-denied"
    finally:
        (tmp_path / "store" / "a").chmod(0o700)
    assert store.names("") == ["a/b"]


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    assert refused(lambda: LocalStorage(tmp_path).write("a", [])).code == "storage-denied"


# Object stores.


def test_an_unknown_kind_of_store() -> None:
    problem = refused(lambda: open_storage("s4://bucket/x"))
    assert problem.code == "unknown-storage"
    assert "s4" in problem.message


def test_a_large_object_is_uploaded_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_storage(f"{bucket}/parts")
    data = os.urandom(1 << 20)
    store.write("shard", [memoryview(data)] * 12)
    tail = bytearray(10)
    with store.reader("shard") as reader:
        assert reader.read_into((12 << 20) - 5, memoryview(tail)) == 5
    assert tail[:5] == data[-5:]


def test_an_upload_that_fails_leaves_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 << 20)
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_storage(f"{bucket}/abandoned")

    def blocks() -> Iterator[memoryview]:
        for _ in range(12):
            yield memoryview(bytes(1 << 20))
        raise KeyError("the snapshot failed")

    with pytest.raises(KeyError):
        store.write("shard", blocks())
    assert store.names("") == []
    import boto3

    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert uploads.get("Uploads", []) == []


def test_a_marker_of_a_console_is_no_object(bucket: str) -> None:
    import boto3

    for key in ("console/", "console/claims/"):
        boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=key)
    store = open_storage(f"{bucket}/console/")
    assert store.names("") == []
    store.create("claims/a", b"x")
    assert store.names("") == ["claims/a"]


def test_a_creation_that_loses_to_one_that_goes_away_is_tried_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_storage(f"{bucket}/contended")
    assert isinstance(store, ObjectStorage)
    tries = 0

    def contended(path: str, data: bytes, mode: str) -> None:
        nonlocal tries
        tries += 1
        raise FileExistsError(path, data, mode)

    monkeypatch.setattr(store._fs, "pipe_file", contended)
    assert refused(lambda: store.create("a", b"x")).code == "storage-failed"
    assert tries == module.CREATE_TRIES


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    store = open_storage(f"{bucket}-none/x")
    assert refused(lambda: store.create("a", b"x")).code == "storage-failed"
    assert refused(lambda: store.write("a", [memoryview(b"x")])).code == "storage-failed"
    with pytest.raises(FileNotFoundError):
        store.read("a")


@pytest.mark.usefixtures("bucket")
def test_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_storage("s3://secluded/x")
    assert refused(lambda: store.create("a", b"x")).code == "storage-denied"
    assert refused(lambda: store.names("")).code == "storage-denied"
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_denies(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_storage(f"{bucket}/denied")
    assert isinstance(store, ObjectStorage)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store._fs, "cat_file", denied)
    assert refused(lambda: store.read("a")).code == "storage-denied"


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_storage("s3://away/x")
    assert refused(lambda: store.create("a", b"x")).code == "storage-failed"
    s3fs.S3FileSystem.clear_instance_cache()
