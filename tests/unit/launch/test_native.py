"""Kernels in C: compiled once, whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # its OpenMP is what the kernels' threads are

from launch import native
from launch.errors import SpecError
from launch.instructions import flags_here

LEVEL = native.level_of(flags_here())
needs_compiler = pytest.mark.skipif(
    LEVEL is None or shutil.which("gcc") is None, reason="needs gcc and an x86-64 CPU with AVX2"
)


@pytest.fixture(autouse=True)
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no kernels in the installation."""
    monkeypatch.setenv("TUNEYARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "INSTALLED", tmp_path / "compiled")
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield tmp_path / "cache" / "native"
    native.library.cache_clear()


def refusal() -> SpecError:
    with pytest.raises(SpecError) as caught:
        native.library()
    assert (caught.value.code, caught.value.field) == ("precision-not-available", "train.precision")
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("avx2 bmi1 bmi2 fma avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
        ("avx2 bmi1 bmi2 fma avx_vnni", "x86-64-v3"),
        ("avx2 bmi1 bmi2 fma avx512f", "x86-64-v3"),
        ("sse4_2", None),
        ("asimd i8mm", None),
    ],
)
def test_the_best_level_that_a_cpu_has(flags: str, level: str | None) -> None:
    assert native.level_of(frozenset(flags.split())) == level


@needs_compiler
def test_it_is_compiled_once(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(native.library(), ctypes.CDLL)
    (built,) = nothing_built.iterdir()
    monkeypatch.setenv("CC", "/no/compiler")
    native.library.cache_clear()
    assert isinstance(native.library(), ctypes.CDLL)
    assert list(nothing_built.iterdir()) == [built]


@needs_compiler
def test_no_second_pool_of_threads_comes_with_it() -> None:
    """A library that is told of OpenMP when it is linked brings the system's, beside torch's own."""

    def pools() -> set[str]:
        return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}

    assert torch.get_num_threads() > 0
    before = pools()  # other packages of tests may have theirs
    native.library()
    assert pools() == before
    assert any("torch" in pool for pool in before)


@needs_compiler
def test_the_levels_compute_the_same_numbers(tmp_path: Path) -> None:
    values = torch.randn(37, 333) * torch.logspace(-5, 5, 37)[:, None]
    found = []
    for level, flags in native.LEVELS.items():
        if not flags <= flags_here():
            continue
        kernels = ctypes.CDLL(str(native.build(tmp_path / native.name_of(level), level)))
        numbers, scales = torch.empty(values.shape, dtype=torch.int8), torch.empty(37)
        pointers = [ctypes.c_void_p(one.data_ptr()) for one in (values, numbers, scales)]
        kernels.quantise_rows(*pointers, ctypes.c_int64(37), ctypes.c_int64(333))
        sums = torch.arange(37 * 333, dtype=torch.int32).view(37, 333)
        other = torch.rand(333, generator=torch.Generator().manual_seed(0))
        kernels.scale_sums(
            *(ctypes.c_void_p(one.data_ptr()) for one in (sums, scales, other, other)),
            ctypes.c_int64(37), ctypes.c_int64(333),
        )  # fmt: skip
        found.append((numbers, scales, sums))
    assert found
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(found[0], pair, strict=True))


@needs_compiler
def test_into_the_installation_every_level_goes(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.main()
    assert {path.name for path in native.INSTALLED.iterdir()} == {native.name_of(level) for level in native.LEVELS}
    monkeypatch.setenv("CC", "/no/compiler")
    assert isinstance(native.library(), ctypes.CDLL)
    assert not nothing_built.exists()


@needs_compiler
def test_ranks_that_begin_together_do_not_disturb_each_other(nothing_built: Path) -> None:
    command = [sys.executable, "-c", "import torch; from launch.native import library; library()"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [one.communicate(timeout=100)[1] for one in started] == [""] * 4
    assert len(list(nothing_built.iterdir())) == 1


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "level_of", lambda _: "x86-64-v3")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no compiler" in refusal().message


@pytest.mark.parametrize("compiler", ["false", "/no/compiler"])
def test_a_compiler_that_fails_leaves_nothing(
    compiler: str, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "level_of", lambda _: "x86-64-v3")
    monkeypatch.setenv("CC", compiler)
    assert "compile" in refusal().message
    assert list(nothing_built.iterdir()) == []


def test_another_kind_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level_of", lambda _: None)
    assert "x86-64" in refusal().message


def test_a_cache_that_is_no_folder(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level_of", lambda _: "x86-64-v3")
    monkeypatch.setenv("CC", "true")
    nothing_built.parent.write_text("a file")
    assert "TUNEYARD_CACHE" in (refusal().hint or "")


def test_a_torn_library_is_named(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level_of", lambda _: "x86-64-v3")
    nothing_built.mkdir(parents=True)
    torn = nothing_built / native.name_of("x86-64-v3")
    torn.write_bytes(b"\x7fELF")
    assert str(torn) in (refusal().hint or "")
