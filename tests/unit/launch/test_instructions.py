from __future__ import annotations

from pathlib import Path

import pytest

from launch.instructions import flags_here, multiplies_bf16, multiplies_int8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor : 0\n", True),
    ],
)
def test_by_what_linux_says_of_the_cpu(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bf16(tmp_path / "cpuinfo") is expected


def test_where_nothing_is_said_nothing_is_warned_of(tmp_path: Path) -> None:
    assert multiplies_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", False),
        ("processor : 0\n", False),
    ],
)
def test_bytes_are_multiplied_where_linux_says_so(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_int8(tmp_path / "cpuinfo") is expected


def test_what_is_not_said_is_not_there(tmp_path: Path) -> None:
    assert not multiplies_int8(tmp_path / "none")
    assert flags_here(tmp_path / "none") == frozenset()
