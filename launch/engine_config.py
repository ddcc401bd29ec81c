"""What the launcher and DeepSpeed are told, from a plan alone: complete, with nothing left on "auto". Torch-free.

Accelerate's launcher has combinations that start something other than asked for (see `launch_environment`), so the
orchestrator writes these files itself and every rank checks afterwards what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import OptimSpec
from launch.contract import Device, ExecutionPlan, NodeShare

BUCKET_ELEMENTS = 20_000_000
"""Gradients reduced at once; ZeRO holds buffers of this size beside the gradients."""
PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps smaller parameters whole on every rank: biases and norms are not worth a gather."""


def deepspeed_config(optim: OptimSpec | None, plan: ExecutionPlan) -> dict[str, Any]:
    """DeepSpeed's configuration for `plan`; `optim` gives the clipping, None (a user's own command) clips nothing.

    The batch sizes are DeepSpeed's bookkeeping: the loss is normalised by the loop, not by them.
    """
    assert plan.zero_stage > 0
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,  # a second stream and doubled buffers: not worth it at the sizes ZeRO is chosen for
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "offload_optimizer": {
            "device": "none" if plan.offload == "none" else "cpu",
            "pin_memory": plan.device == "cuda" and plan.offload != "none",
        },
    }
    if plan.zero_stage == 3:
        zero |= {
            "offload_param": {
                "device": "cpu" if plan.offload == "all" else "none",
                "pin_memory": plan.device == "cuda" and plan.offload == "all",
            },
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    clip = optim.max_grad_norm if optim is not None else None
    return {
        "train_batch_size": plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": {"enabled": plan.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # On CUDA an offloaded AdamW is DeepSpeedCPUAdam; on CPU nothing moves and torch's own AdamW is as good,
        # without compiling an extension. Any other optimizer would silently be replaced by Adam, or refused.
        "zero_force_ds_cpu_optimizer": plan.device == "cuda" and (optim is None or optim.optimizer == "adamw"),
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def accelerate_config(
    plan: ExecutionPlan, nodes: Sequence[NodeShare], node_index: int, main_port: int, deepspeed_file: str | None
) -> dict[str, Any]:
    """The YAML for `accelerate launch --config_file` on node `node_index`; goes with `launch_environment`.

    `deepspeed_file` is where deepspeed_config lies, for the ZeRO engines; a user's own command reads it there.
    """
    share = nodes[node_index]
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _distributed_type(plan),
        # The launcher divides by the number of machines; torchelastic itself lets nodes differ in size.
        "num_processes": share.processes * len(nodes),
        "num_machines": len(nodes),
        "machine_rank": node_index,
        "main_process_ip": nodes[0].address,
        "main_process_port": main_port,
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        "use_cpu": plan.device == "cpu" and plan.zero_stage == 0,
        "gpu_ids": "all",  # which GPUs those are is CUDA_VISIBLE_DEVICES's to say
        "enable_cpu_affinity": plan.device == "cuda",  # the cores near its GPU; on a CPU, launch.host divides them
    }
    if plan.zero_stage > 0:
        assert deepspeed_file is not None
        # No mixed_precision here: Accelerate refuses the key beside a DeepSpeed file, which already says it.
        config["deepspeed_config"] = {
            "deepspeed_config_file": deepspeed_file,
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": plan.zero_stage == 3,
        }
    else:
        config["mixed_precision"] = "no" if plan.precision == "fp32" else plan.precision
    return config


def _distributed_type(plan: ExecutionPlan) -> str:
    if plan.zero_stage > 0:
        return "DEEPSPEED"
    # MULTI_CPU makes the launcher start one process and expect mpirun; MULTI_GPU is DDP on gloo where the
    # environment says ACCELERATE_USE_CPU.
    return "MULTI_GPU" if plan.engine == "ddp" else "NO"


def launch_environment(plan: ExecutionPlan, node: NodeShare) -> dict[str, str]:
    """Variables for the launcher's process on `node`, on top of its environment.

    ACCELERATE_USE_CPU turns MULTI_GPU into DDP on gloo, and silently turns DeepSpeed into unsharded DDP: so it is
    always written, true for the one and false for the other, whatever the surrounding environment says.
    """
    environment = {
        **import_environment(plan.device),
        "OMP_NUM_THREADS": str(node.threads),
        "ACCELERATE_USE_CPU": "true" if plan.device == "cpu" and plan.zero_stage == 0 else "false",
    }
    if plan.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        assert len(node.gpus) == node.processes, f"{node.processes} processes on GPUs {node.gpus}"
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in node.gpus)
    return environment


def import_environment(device: Device) -> dict[str, str]:
    """The variables of launch_environment that are read when Python or a library starts: the same for every plan."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers' threads and the forks of others do not go together
        "PYTHONUNBUFFERED": "1",
    }
    return environment | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def launch_command(python: str, config: Path, contract: Path) -> list[str]:
    """The command that starts one node's ranks."""
    return [
        python, "-m", "accelerate.commands.launch", "--config_file", str(config),
        "-m", "launch", "--contract", str(contract),
    ]  # fmt: skip
