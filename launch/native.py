"""This package's C code, compiled once for what this CPU can do, and loaded. Torch-free.

    python -m launch.native    compiles it into the installation, for every kind of CPU: for hosts without a compiler

Else it is compiled on first use, in a second, into `$TUNEYARD_CACHE` (`~/.cache/tuneyard`). It must be loaded after
torch, whose threads (OpenMP's) it takes: nothing is linked to it, so that there is no second pool of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.errors import SpecError
from launch.instructions import flags_here

SOURCE = Path(__file__).with_name("int8.c")
INSTALLED = Path(__file__).with_name("compiled")
LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "bmi1", "bmi2", "fma"}),
}
"""Kinds of CPUs (of the x86-64 psABI), the best first, and flags that one of them has."""
# No trapping and no errno: so that rounding is by vectors. Not -ffast-math, which would forget about NaN.
OPTIONS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
COMPILERS = ("gcc", "cc")
TIMEOUT = 120.0


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of int8.c.

    Raises:
        SpecError: there is no compiler, it fails, or it is no kind of CPU that this is written for.
    """
    level = level_of(flags_here())
    if level is None:
        raise _refused("this CPU is not an x86-64 one with AVX2", "take train.precision: fp32 or auto")
    name = name_of(level)
    built = next((folder / name for folder in (INSTALLED, _cache()) if (folder / name).exists()), None)
    path = built or build(_cache() / name, level)
    try:
        return ctypes.CDLL(str(path))
    except OSError as problem:  # damaged; of another compiler's OpenMP; or a torch without any
        hint = f"remove {path}, to compile them anew by gcc"
        raise _refused(f"its kernels cannot be loaded: {problem}", hint) from None


def level_of(flags: frozenset[str]) -> str | None:
    """The best of LEVELS that a CPU with these flags has."""
    return next((level for level, needed in LEVELS.items() if needed <= flags), None)


def name_of(level: str) -> str:
    """Of the library's file: by what it is made of, so that what is found there is right."""
    made_of = hashlib.sha256(SOURCE.read_bytes() + " ".join(OPTIONS).encode()).hexdigest()[:16]
    return f"int8-{made_of}-{level}.so"


def build(target: Path, level: str) -> Path:
    """Compile for `level` into `target`, whole or not at all; several processes may do so at once.

    Raises:
        SpecError: there is no compiler, or it fails, or the folder cannot be written.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise _refused("its kernels are C, and there is no compiler", "install gcc, or take train.precision: fp32")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            code, linked = Path(folder, "int8.o"), Path(folder, target.name)
            # In two steps: the linker, told of OpenMP, would bring one of its own.
            _run(compiler, *OPTIONS, f"-march={level}", "-c", str(SOURCE), "-o", str(code))
            _run(compiler, "-shared", str(code), "-o", str(linked))
            linked.replace(target)
    except OSError as problem:
        raise _refused(
            f"its kernels cannot be compiled into {target.parent}: {problem.strerror}",
            "give a folder that can be written with TUNEYARD_CACHE",
        ) from None
    return target


def _run(compiler: str, *arguments: str) -> None:
    try:
        done = subprocess.run(
            [*compiler.split(), *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"{compiler} did not end within {TIMEOUT:.0f} s", "take train.precision: fp32") from None
    if done.returncode:
        told = done.stderr.strip().splitlines() or ["no word of why"]
        raise _refused(f"{compiler} cannot compile its kernels: {told[0]}", "compile them with gcc (CC=gcc)")


def _cache() -> Path:
    try:
        root = Path(os.environ.get("TUNEYARD_CACHE") or "~/.cache/tuneyard").expanduser().absolute()
    except RuntimeError:  # nobody's process, without a home directory
        root = Path(tempfile.gettempdir(), f"tuneyard-{os.getpid()}")
    return root / "native"


def _refused(problem: str, hint: str) -> SpecError:
    return SpecError(
        f"train.precision: int8, and {problem}", code="precision-not-available", field="train.precision", hint=hint
    )


def main() -> None:
    try:
        for level in LEVELS:
            print(build(INSTALLED / name_of(level), level))
    except SpecError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
