"""What the launcher and DeepSpeed are told, from a plan alone: complete, with nothing left on "auto". Torch-free.

Accelerate's launcher has combinations that start something other than asked for (see `launch_environment`), so the
orchestrator writes these files itself and every rank checks afterwards what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.attempt import ENV_ALLOCATOR
from launch.config import OptimSpec
from launch.contract import Device, ExecutionPlan, NodeShare

BUCKET_ELEMENTS = 20_000_000
"""Gradients reduced at once; ZeRO holds buffers of this size beside the gradients."""
NEARBY_BYTES = 1 << 23
"""What goes from rank to rank at a time in memory that they share (launch.nearby); each rank has two such slots. An
eighth of it took longer than sockets do: ranks wait for each other twice a piece."""
LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps so much of what it has gathered for the backward pass. (With less, DeepSpeed 0.19 has been seen to fail
with adapters: "tracing error".)"""
PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps smaller parameters whole on every rank: biases and norms are not worth a gather."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""ZeRO-3's optimizer takes a step on so many elements at once."""
DISK_SUB_GROUP_ELEMENTS = 50_000_000
"""The same where they come from a disk: buffers of this size are in host memory, one for each of DISK_BUFFERS."""
DISK_BUFFERS = 4
"""A master weight, its gradient and at most two moments."""
DISK_PARAMETER_BUFFERS = 5
"""Parameters from a disk that are in host memory at once, each in a buffer of DISK_PARAMETER_ELEMENTS."""
DISK_PARAMETER_ELEMENTS = 100_000_000
"""No rank's part of a parameter may have more."""
AIO = {
    "block_size": 1 << 20,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
    "use_gds": False,
}
"""Asynchronous reads and writes: DeepSpeed's own values, but spelt out."""


def deepspeed_config(optim: OptimSpec | None, plan: ExecutionPlan, folder: str | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration for `plan`; `optim` gives the clipping, None (a user's own command) clips nothing.
    `folder` is this rank's own in the plan's offload_path.

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
        "offload_optimizer": _place(plan, plan.offload != "none", folder)
        | ({"buffer_count": DISK_BUFFERS} if plan.offload_path else {}),
    }
    if plan.zero_stage == 3:
        zero |= {
            "offload_param": _place(plan, plan.offload == "all", folder),
            "sub_group_size": DISK_SUB_GROUP_ELEMENTS if plan.offload_path else SUB_GROUP_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        if plan.offload_path and plan.offload == "all":
            zero["offload_param"] |= {
                "buffer_count": DISK_PARAMETER_BUFFERS,
                "buffer_size": DISK_PARAMETER_ELEMENTS,
                "max_in_cpu": 0,  # none stays in host memory
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
        **({"aio": AIO} if plan.offload_path else {}),
    }


def _place(plan: ExecutionPlan, moved: bool, folder: str | None) -> dict[str, Any]:
    """Where a part of the state lies, in DeepSpeed's words."""
    if not moved:
        return {"device": "none", "pin_memory": False}
    place = {"device": "nvme" if plan.offload_path else "cpu", "pin_memory": plan.device == "cuda"}
    return place | ({"nvme_path": folder or plan.offload_path} if plan.offload_path else {})


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
        config["mixed_precision"] = plan.half or "no"
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
        if plan.allocator == "tight":  # a CPU's needs no variable: launch.host tells malloc itself
            environment[ENV_ALLOCATOR] = plan.allocator
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
