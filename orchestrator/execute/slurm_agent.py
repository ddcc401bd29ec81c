"""`python -m orchestrator.execute.slurm_agent RUN_DIR`: the agent of this node's part of an attempt, a task of a step.

Slurm's SIGTERM becomes the stop message, with less time than Slurm itself gives: ranks have sessions of their own,
where its SIGKILL may not find them, so this agent ends them first.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from launch.attempt import AttemptFiles
from launch.contract import RunContract
from orchestrator.execute.agent import serve
from orchestrator.execute.member import LaunchRequest
from orchestrator.execute.request import build_request

ENV_NODE = "SLURMD_NODENAME"
ENV_VISIBLE = "CUDA_VISIBLE_DEVICES"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.execute.slurm_agent", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--grace", type=float, required=True, help="seconds from SIGTERM to SIGKILL")
    options = parser.parse_args()
    contract = RunContract.read(AttemptFiles(options.run_dir).contract)
    index = next(at for at, share in enumerate(contract.nodes) if share.node == os.environ[ENV_NODE])
    request = with_gpus(build_request(contract, index), os.environ.get(ENV_VISIBLE, ""))
    return serve(request, grace_s=stop_within(options.grace))


def stop_within(grace_s: float) -> float:
    """Of the time until SIGKILL, what ranks are given: the rest is for ending them and for saying how."""
    return max(0.5 * grace_s, grace_s - 6.0)


def with_gpus(request: LaunchRequest, visible: str) -> LaunchRequest:
    """`request`, whose GPUs are numbered within what the allocation has here, with those GPUs by the names that Slurm
    has for them. Not run on a GPU."""
    if not request.gpus:
        return request
    names = visible.split(",")
    held = [names[index] for index in request.gpus]
    numbers = tuple(int(name) for name in held) if all(name.isdigit() for name in held) else ()
    return replace(request, env=request.env | {ENV_VISIBLE: ",".join(held)}, gpus=numbers)


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(main())
