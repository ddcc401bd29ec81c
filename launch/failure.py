"""What a rank's failure means: its exit code, whose fault it was, and what is told of it. Torch-free.

Running out of memory has many faces; all get one exit code, and an error code that names the cause. A failure that only
says that a peer is gone is marked as an echo of whatever ended that peer.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import psutil

from launch.checkpoint.manifest import Unusable
from launch.contract import ExitCode, RankError
from launch.errors import ContractError, DataError, SpecError, TuneyardError

EXIT_CODES: tuple[tuple[type[TuneyardError], ExitCode], ...] = (
    (DataError, ExitCode.DATA_ERROR),
    (ContractError, ExitCode.CONTRACT_MISMATCH),
    (SpecError, ExitCode.USER_ERROR),
    (Unusable, ExitCode.USER_ERROR),
)

CUDA_OUT_OF_MEMORY = "cuda-out-of-memory"
HOST_OUT_OF_MEMORY = "host-out-of-memory"

# Where there is no exception of its own: CUDA's runtime, NCCL, cuBLAS and cuDNN; torch's CPU allocator, safetensors
# and the C library.
ON_DEVICE = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Cuda failure .*out of memory|_STATUS_ALLOC_FAILED"
)
ON_HOST = re.compile(r"can't allocate memory|[Cc]annot allocate memory|std::bad_alloc|ENOMEM")
PEER_GONE = re.compile(
    r"(closed|reset) by peer|Broken pipe|Remote peer closed|pair closure|remote process exited|ncclRemoteError"
    r"|communicator was aborted|Connection was likely closed"
)
"""What gloo, NCCL and torch's store say when the other end of a connection has gone."""


def exit_code_of(problem: BaseException) -> ExitCode:
    """The ExitCode that names `problem`."""
    if out_of_memory(problem) is not None:
        return ExitCode.OUT_OF_MEMORY
    for kind, code in EXIT_CODES:
        if isinstance(problem, kind):
            return code
    return ExitCode.CRASH


def out_of_memory(problem: BaseException) -> str | None:
    """Which memory ran out, as an error code, if `problem` or what it came from says that one did."""
    return next((code for one in _chain(problem) if (code := _memory_of(one)) is not None), None)


def is_echo(problem: BaseException) -> bool:
    """Whether it says no more than that a peer is gone, and nothing of why."""
    return any(isinstance(one, RuntimeError) and PEER_GONE.search(str(one)) for one in _chain(problem))


def describe(problem: BaseException) -> RankError:
    """What is told of `problem`. Out of memory, what its frames hold is let go first: telling needs some."""
    memory = out_of_memory(problem)
    if memory is not None:
        let_go(problem)
    trace = "".join(traceback.format_exception(problem))
    if memory is not None:
        limit, used = _sizes(memory)
        message = str(problem) or "no memory could be allocated"
        return RankError(code=memory, message=message, traceback=trace, limit_bytes=limit, used_bytes=used)
    if isinstance(problem, TuneyardError):
        return RankError(
            code=problem.code, message=problem.message, field=problem.field, hint=problem.hint, traceback=trace,
            echo=is_echo(problem),
        )  # fmt: skip
    return RankError(code=type(problem).__name__, message=str(problem), traceback=trace, echo=is_echo(problem))


def let_go(problem: BaseException) -> None:
    """Free what the frames that `problem` has left hold: activations, above all."""
    for one in _chain(problem):
        traceback.clear_frames(one.__traceback__)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # CUDA may be past answering, and the rest is still to be told
            torch.cuda.empty_cache()


def _memory_of(problem: BaseException) -> str | None:
    torch: Any = sys.modules.get("torch")
    text = str(problem)
    if torch is not None and isinstance(problem, torch.OutOfMemoryError):
        return CUDA_OUT_OF_MEMORY
    if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM):
        return HOST_OUT_OF_MEMORY
    if isinstance(problem, TuneyardError):
        return None  # it may quote what it came from, which is looked at by itself
    if ON_DEVICE.search(text):
        # CUDA's runtime says the same of memory that it pins for the device in the host.
        return HOST_OUT_OF_MEMORY if _was_pinning(problem) else CUDA_OUT_OF_MEMORY
    return HOST_OUT_OF_MEMORY if ON_HOST.search(text) else None


def _was_pinning(problem: BaseException) -> bool:
    return any("pin_memory" in (frame.line or "") for frame in traceback.extract_tb(problem.__traceback__)[-3:])


def _chain(problem: BaseException) -> Iterator[BaseException]:
    """`problem`, and what it came from."""
    seen: set[int] = set()
    one: BaseException | None = problem
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _sizes(memory: str) -> tuple[int | None, int | None]:
    """How much there is and how much this process held at most, in bytes; None where there is no telling."""
    if memory == CUDA_OUT_OF_MEMORY:
        torch: Any = sys.modules["torch"]
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):
                return int(torch.cuda.mem_get_info()[1]), int(torch.cuda.max_memory_allocated())
        return None, None
    return None, int(psutil.Process().memory_info().rss)
