"""Which memory ran out, who is only an echo, and what is let go before it is told."""

from __future__ import annotations

import errno
import gc
import weakref

import numpy as np
import pytest
import torch

from launch.contract import ExitCode
from launch.errors import SpecError
from launch.failure import describe, exit_code_of, is_echo, out_of_memory

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:25985."


def chained(problem: Exception, cause: Exception) -> Exception:
    problem.__cause__ = cause
    return problem


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "cuda-out-of-memory"),
        (RuntimeError("CUDA error: out of memory"), "cuda-out-of-memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "cuda-out-of-memory"),
        (RuntimeError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), "cuda-out-of-memory"),
        (MemoryError(), "host-out-of-memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host-out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "host-out-of-memory"),
        (Exception("Error while deserializing: Cannot allocate memory (os error 12)"), "host-out-of-memory"),
        (RuntimeError("std::bad_alloc"), "host-out-of-memory"),
        (chained(SpecError("the model cannot be loaded"), MemoryError()), "host-out-of-memory"),
        (SpecError("its error was: CUDA out of memory"), None),
        (RuntimeError(GLOO), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
    ],
)
def test_the_memory_that_ran_out_is_named(problem: Exception, code: str | None) -> None:
    assert out_of_memory(problem) == code
    assert (exit_code_of(problem) == ExitCode.OUT_OF_MEMORY) == (code is not None)
    if code is not None:
        told = describe(problem)
        assert told.code == code
        assert told.message
        assert (told.used_bytes is not None) == (code == "host-out-of-memory")  # there is no GPU here


def test_what_really_cannot_be_allocated_is_named() -> None:
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 50)):
        with pytest.raises(Exception) as caught:
            allocate()
        assert out_of_memory(caught.value) == "host-out-of-memory"


def test_memory_that_is_pinned_is_the_hosts() -> None:
    def pin_memory() -> None:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError) as caught:
        pin_memory()
    assert out_of_memory(caught.value) == "host-out-of-memory"


@pytest.mark.parametrize(
    ("problem", "echo"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("Read error [127.0.0.1]:25830: Connection reset by peer."), True),
        (torch.distributed.DistBackendError("NCCL: remote process exited or there was a network error"), True),
        (chained(SpecError("the save could not be voted on"), RuntimeError(GLOO)), True),
        (ConnectionResetError("Connection reset by peer"), False),  # a store's or the hub's, not a rank's
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_a_lost_peer_is_an_echo(problem: Exception, echo: bool) -> None:
    assert is_echo(problem) is echo
    assert describe(problem).echo is echo


class Activations:
    """Something large."""


def test_what_the_frames_hold_is_let_go_before_it_is_told() -> None:
    held = []

    def forward() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise MemoryError

    try:
        forward()
    except MemoryError as problem:
        assert held[0]() is not None
        told = describe(problem)
        gc.collect()
        assert held[0]() is None
        assert told.traceback is not None
        assert "in forward" in told.traceback
