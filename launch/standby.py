"""`python -m launch.standby`: `accelerate launch` with its imports, and its ranks' imports, done beforehand.

It waits for one order on standard input and is then the launcher of one attempt. What runs is Accelerate's own
launcher, with its checks, environment and torchelastic; but a rank is forked from this process instead of started
anew, so that it does not import torch, DeepSpeed and transformers once more. It ends with whoever holds the other end
of its standard input, as long as it has no order.

Nothing here may compute or touch a GPU before the fork: neither threads nor CUDA survive one.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NoReturn

from launch.attempt import ENV_RESERVED, ENV_RUN_ID, RESERVED

IMPORTS = (
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.pyplot",
    "peft",
    "sklearn.metrics",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "launch.__main__",
    "launch.train",
)
"""What a launcher and its ranks import in the end, whatever the job."""
OF_MODELS = ("bert", "llama", "qwen2", "gpt2")
"""Models whose code is loaded beforehand; others cost their rank some tenths of a second."""


def main() -> None:
    """Import, wait, launch; the exit status is the launcher's."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking CUDA itself would bar forks from it
    for name in (*IMPORTS, *(f"transformers.models.{model}.modeling_{model}" for model in OF_MODELS)):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection in a rank writes to, and so copies, every page
    line = sys.stdin.readline()
    if line:
        launch(json.loads(line))


def launch(order: dict[str, Any]) -> None:
    """Be the launcher that `order` describes: argv of an `accelerate launch`, env, cwd and log.

    Raises:
        CalledProcessError, ChildFailedError: a rank failed; Accelerate's own way to say so.
    """
    show_run_id(order["env"][ENV_RUN_ID])
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, descriptor)
    os.closerange(3, max(log, nothing) + 1)

    import accelerate.commands.launch as accelerate_launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda _handler, args, env: Forked(args, env)  # type: ignore[method-assign]
    accelerate_launch.subprocess = SimpleNamespace(  # type: ignore[attr-defined]  # for one process alone
        Popen=lambda args, env: Forked(args, env), CalledProcessError=subprocess.CalledProcessError
    )
    sys.argv = order["argv"][2:]  # python -m accelerate.commands.launch ...
    accelerate_launch.main()


def show_run_id(run_id: str) -> None:
    """Write the attempt's id where /proc shows this process's environment, and that of every fork.

    What the kernel shows is the memory in which the process was handed its environment, whatever becomes of its
    variables later.
    """
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    address = libc.getenv(ENV_RESERVED.encode())
    shown = f"{ENV_RUN_ID}={run_id}".encode()
    room = len(ENV_RESERVED) + 1 + RESERVED
    assert address, f"{ENV_RESERVED} is not set"
    assert len(shown) <= room, f"the run id {run_id} is too long"
    ctypes.memmove(address - len(ENV_RESERVED) - 1, shown.ljust(room, b"\0"), room)


class Forked:
    """A rank, as subprocess.Popen would hold it: a fork of this process that runs `launch`."""

    def __init__(self, args: Any, env: dict[str, str]) -> None:
        at = list(args).index("launch")  # python -u -m launch --contract FILE
        self.args = args
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank([str(arg) for arg in args][at:], env)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if timeout is None:
            code = self._wait(0)
            assert code is not None
            return code
        ended = _within(timeout, self.poll)
        if ended is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return ended

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _within(seconds: float, poll: Any) -> int | None:
    """What `poll` answers, as soon as it is not None; None after so many seconds."""
    import time

    deadline = time.monotonic() + seconds
    while (code := poll()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return code  # type: ignore[no-any-return]


def _become_rank(argv: list[str], env: dict[str, str]) -> NoReturn:
    """What Popen and a new interpreter would have done; never returns, so that nothing of the launcher's is undone."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the launcher's store and pipes
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        from launch.__main__ import main as rank_main

        rank_main()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
