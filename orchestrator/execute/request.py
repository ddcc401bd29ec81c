"""From a contract to the request that starts one node's ranks. Pure but for the interpreter's own path."""

from __future__ import annotations

import json
import sys

import yaml

from launch.attempt import AttemptFiles
from launch.checkpoint.copies import home
from launch.contract import RunContract
from launch.engine_config import accelerate_config, deepspeed_config, launch_command, launch_environment
from orchestrator.execute.member import LaunchRequest

COLLECTIVES = 2000
"""So many are remembered of a rank."""


def launch_files(contract: RunContract, node_index: int) -> dict[str, str]:
    """Path → text of the contract and of the complete launcher configuration."""
    files = AttemptFiles(contract.run_dir)
    written = {str(files.contract): contract.model_dump_json(indent=2)}
    deepspeed_file = None
    if contract.plan.zero_stage > 0:
        deepspeed_file = str(files.deepspeed_config)
        optim = contract.spec.train if contract.spec else None
        written[deepspeed_file] = json.dumps(deepspeed_config(optim, contract.plan), indent=2)
    config = accelerate_config(contract.plan, contract.nodes, node_index, contract.main_port, deepspeed_file)
    # PyYAML, because Accelerate reads it by that: YAML 1.1, where a bare `no` is false.
    written[str(files.accelerate_config(node_index))] = yaml.safe_dump(config, sort_keys=False)
    return written


def recorder(contract: RunContract) -> dict[str, str]:
    """With NCCL, what has torch keep a record of the last collectives, and write it when they fail or it is asked."""
    if contract.plan.device != "cuda" or contract.plan.world_size == 1:
        return {}
    prefix = str(AttemptFiles(contract.run_dir).collectives())
    return {
        "TORCH_FR_BUFFER_SIZE": str(COLLECTIVES),
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def build_request(
    contract: RunContract, node_index: int, *, python: str = sys.executable, owner: tuple[int, float] | None = None
) -> LaunchRequest:
    """The request that starts `contract`'s ranks on its node `node_index`."""
    files = AttemptFiles(contract.run_dir)
    share = contract.nodes[node_index]
    in_memory = contract.spec is not None and contract.spec.checkpoint.memory_every_steps is not None
    folder = home(contract.checkpoint_dir) / f"attempt-{contract.attempt}"
    return LaunchRequest(
        run_id=contract.run_id,
        run_dir=contract.run_dir,
        node_index=node_index,
        ranks=contract.ranks_of(node_index),
        argv=tuple(launch_command(python, files.accelerate_config(node_index), files.contract)),
        env={**recorder(contract), **contract.env, **launch_environment(contract.plan, share)},
        env_from=contract.env_from,
        cwd=contract.working_dir or contract.run_dir,
        files=launch_files(contract, node_index),
        owner=owner,
        hang_s=contract.hang_s,
        standby=contract.spec is not None and not contract.env_from,
        gpus=share.gpus,
        log_patterns=contract.log_patterns,
        copies=(str(folder), contract.checkpoint_dir) if in_memory else None,
    )
