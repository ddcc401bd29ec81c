"""`python -m launch`: one rank, from its contract to its exit.json.

Under `accelerate launch`, either alone (`--config job.yaml`) or under an orchestrator (`--contract run.json`).
Torch is imported only after the log is redirected, so that what native libraries print lands in it too.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # kept until there is somebody to listen; the imports take a moment
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import argparse
import faulthandler
import os
import socket
import sys
from pathlib import Path

import psutil

from launch.contract import (
    AttemptFiles,
    ExitCode,
    RankProcess,
    RunContract,
    write_atomically,
)
from launch.ending import Ending
from launch.errors import ContractError, SpecError
from launch.failure import describe, exit_code_of
from launch.leash import hold_leash
from launch.stop import StopWish
from launch.supervise import run_command
from launch.swap import remove_folders


def main() -> None:
    """Run this rank; never returns, the process ends with an ExitCode."""
    arguments = _parse()
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.contract is not None:
        contract = RunContract.read(arguments.contract)
        files = AttemptFiles(contract.run_dir)
        files.rank(rank).mkdir(parents=True, exist_ok=True)
        _redirect(files.log(rank))
    else:
        contract = _contract_alone(arguments, world_size)
        files = AttemptFiles(contract.run_dir)
        _forget_last_run(files, rank)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR2"):  # the node's agent asks so where it may not look into this process
        faulthandler.register(signal.SIGUSR2, file=files.stacks(rank).open("w"))
    stop = StopWish(files)
    stop.listen()
    _introduce(files, rank)
    ending = Ending(files, rank)
    try:
        _run(contract, files, rank, world_size, ending, stop)
    except Exception as problem:  # the one place where every failure becomes a record
        error = describe(problem)
        print(error.traceback, file=sys.stderr)
        ending.record(exit_code_of(problem), error=error)
    remove_folders()
    # Sockets close with the process, so that peers which wait for this rank fail at once. Leaving their group in order
    # would be to wait for them.
    ending.leave()


def _run(
    contract: RunContract, files: AttemptFiles, rank: int, world_size: int, ending: Ending, stop: StopWish
) -> None:
    """Do what the contract says, and record it."""
    if world_size != contract.plan.world_size:
        raise ContractError(
            f"the launcher started {world_size} processes, the contract says {contract.plan.world_size}",
            field="plan.world_size",
            hint="start it with the launcher configuration that belongs to the contract",
        )
    if contract.command is not None:
        run_command(contract, files, rank, ending, stop)
        return
    hold_leash(contract.leash_s, ending)
    if contract.plan.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses at import, and guesses wrong without a GPU
    from launch.tally import part_from_peers
    from launch.train import train

    code, result = train(contract, files, rank, stop)
    ending.record(code, result=result)
    part_from_peers()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch", description="Train one job file or run contract; start it with `accelerate launch -m launch`."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="a job file; train it alone, without an orchestrator")
    source.add_argument("--contract", type=Path, help="a run contract that an orchestrator wrote")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of --config")
    parser.add_argument("--output", type=Path, help="with --config: where the model directory goes")
    return parser.parse_args()


def _contract_alone(arguments: argparse.Namespace, world_size: int) -> RunContract:
    """The contract that an orchestrator would have written. A bad job file ends the process here."""
    from launch.alone import contract_alone

    try:
        return contract_alone(arguments.config, arguments.set, arguments.output, world_size)
    except SpecError as problem:
        if int(os.environ.get("RANK", "0")) == 0:
            print(problem, file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)


def _redirect(log: Path) -> None:
    """Send this process's stdout and stderr to `log`, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _forget_last_run(files: AttemptFiles, rank: int) -> None:
    """Run alone, the same directory is used again; what it says of the last run must not be taken for this one."""
    files.rank(rank).mkdir(parents=True, exist_ok=True)
    for stale in (files.exit(rank), files.progress(rank), files.samples(rank), *([files.stop] if rank == 0 else [])):
        stale.unlink(missing_ok=True)


def _introduce(files: AttemptFiles, rank: int) -> None:
    process = psutil.Process()
    who = RankProcess(
        rank=rank,
        pid=process.pid,
        start_time=process.create_time(),
        host=socket.gethostname(),
        standby="launch.standby" in process.cmdline(),
    )
    write_atomically(files.process(rank), who.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
