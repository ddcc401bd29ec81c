"""`python -m launch.standby`: `accelerate launch` with its imports, and its ranks' imports, done beforehand.

It waits for orders on standard input. For each it forks a launcher, which is Accelerate's own, with its checks, its
environment and torchelastic; only that a rank is a fork, too, instead of a new interpreter that imports torch,
DeepSpeed and transformers once more. On standard output it says when it is ready, and how each launcher ended. It ends
with whoever holds the other ends; launchers go on.

Nothing here may compute or touch a GPU: neither threads nor CUDA survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from launch.attempt import ENV_RESERVED, ENV_RUN_ID, RESERVED

IMPORTS = (
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.comm.deepspeed_shm_comm_op",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine does, and it brings torch's compiler
    "deepspeed.runtime.zero.stage3",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "peft",
    "sklearn.metrics",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "launch.supervise",
    "launch.train",
)
"""What a launcher and its ranks import in the end, whatever the job."""
REAP_S = 0.05
OF_MODELS = ("bert", "llama", "qwen2", "gpt2")
"""Models whose code is loaded beforehand; others cost their rank some tenths of a second."""


def main() -> None:
    """Import, then launch whatever is ordered, until standard input ends."""
    said = os.dup(1)
    os.dup2(2, 1)  # libraries print as they are imported
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking CUDA itself would bar forks from it
    for name in (*IMPORTS, *(f"transformers.models.{model}.modeling_{model}" for model in OF_MODELS)):
        importlib.import_module(name)
    _fill_caches()
    gc.collect()
    gc.freeze()  # else the first collection in a rank writes to, and so copies, every page
    _say(said, {"ready": True})
    running: dict[int, int] = {}  # pid → number of the order
    unread = b""
    while True:
        readable, _, _ = select.select([0], [], [], REAP_S if running else None)
        if readable:
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, unread = (unread + read).split(b"\n")
            orders = [json.loads(line) for line in lines]
            cancelled = {order["cancel"] for order in orders if "cancel" in order}
            for order in orders:
                if "number" not in order:
                    continue  # what began before it was cancelled is ended by its processes
                if order["number"] in cancelled:
                    _say(said, {"number": order["number"], "code": -signal.SIGTERM})
                else:
                    running[_launcher(order)] = order["number"]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _say(said, {"number": running.pop(pid), "code": os.waitstatus_to_exitcode(status)})


def _say(said: int, message: dict[str, Any]) -> None:
    os.write(said, json.dumps(message).encode() + b"\n")


def _launcher(order: dict[str, Any]) -> int:
    """The pid of a fork that carries out `order`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        launch(order)
        code = 0
    except Exception:
        traceback.print_exc()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fill_caches() -> None:
    """What the first rank would otherwise work out: patterns of renamed weights, and which operations are built."""
    from deepspeed.comm.torch import build_shm_op
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping(OF_MODELS[0])
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        build_shm_op()


def launch(order: dict[str, Any]) -> None:
    """Be the launcher that `order` describes: argv of an `accelerate launch`, env, cwd and log. Once a process.

    Raises:
        CalledProcessError, ChildFailedError: a rank failed; Accelerate's own way to say so.
    """
    os.setsid()
    show_run_id(order["env"][ENV_RUN_ID])
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, descriptor)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))

    import accelerate.commands.launch as accelerate_launch
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    gate = Gate()
    begin = SubprocessContext._start

    def forked(_handler: SubprocessHandler, args: tuple[Any, ...], env: dict[str, str]) -> Any:
        return Forked(args, env, new_session=True, gate=gate)

    def begin_together(context: SubprocessContext) -> None:
        gate.close()
        try:
            begin(context)  # type: ignore[no-untyped-call]
        finally:
            gate.open()

    SubprocessHandler._popen = forked  # type: ignore[assignment]  # the ranks of a gang
    SubprocessContext._start = begin_together  # type: ignore[method-assign]
    accelerate_launch.subprocess = SimpleNamespace(  # and the one process of no gang
        Popen=Forked, CalledProcessError=subprocess.CalledProcessError
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


class Gate:
    """Keeps forked ranks waiting until all of the node are forked.

    A rank that runs connects to the store in this process, whose thread then looks up its name, and a fork meanwhile
    would inherit the C library's lock on that for good.
    """

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None

    def close(self) -> None:
        self._ends = os.pipe()

    def open(self) -> None:
        if self._ends is not None:
            for end in self._ends:
                os.close(end)
            self._ends = None

    def wait(self) -> None:
        """In a fork: until `open` is called, or the launcher is gone."""
        if self._ends is not None:
            reading, writing = self._ends
            os.close(writing)  # this process's own; the launcher's is what counts
            os.read(reading, 1)


class Forked:
    """A rank, as subprocess.Popen would hold it: a fork of this process that runs the module after `-m`."""

    def __init__(self, args: Any, env: dict[str, str], *, new_session: bool = False, gate: Gate | None = None) -> None:
        self.args = [str(arg) for arg in args]  # python -u -m launch --contract FILE
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if new_session:
                os.setsid()
            if gate is not None:
                gate.wait()
            _become_rank(self.args[self.args.index("-m") + 1 :], env)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._wait(0 if deadline is None else os.WNOHANG)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(REAP_S)
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become_rank(argv: list[str], env: dict[str, str]) -> NoReturn:
    """What Popen and a new interpreter would have done; never returns, so that nothing of the launcher's is undone."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the rank listens in a moment
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the launcher's store and pipes
        os.environ.clear()
        os.environ.update(env)
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:  # of argparse, for one; the rank's own end does not come back here
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
