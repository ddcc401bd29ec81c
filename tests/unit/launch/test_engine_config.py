"""Configuration for every engine and device: complete, and what the launcher makes of it is what was planned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from launch.attempt import ENV_ALLOCATOR
from launch.config import OptimSpec
from launch.contract import ExecutionPlan, NodeShare
from launch.engine_config import accelerate_config, deepspeed_config, launch_command, launch_environment

ENGINES = ["single", "ddp", "zero1", "zero2", "zero3"]
OPTIM = OptimSpec(max_steps=1, max_grad_norm=0.5)


def plan(engine: str, device: str, world_size: int, **changes: Any) -> ExecutionPlan:
    return ExecutionPlan.model_validate(
        {
            "engine": engine,
            "device": device,
            "world_size": world_size,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            **changes,
        }
    )


def nodes(device: str, *sizes: int) -> list[NodeShare]:
    gpus = [tuple(range(2, 2 + size)) if device == "cuda" else () for size in sizes]
    return [
        NodeShare(node=f"n{i}", address=f"10.0.0.{i + 1}", processes=size, gpus=gpus[i], threads=3)
        for i, size in enumerate(sizes)
    ]


def values(config: Any) -> list[Any]:
    if isinstance(config, dict):
        return list(itertools.chain.from_iterable(values(value) for value in config.values()))
    return [config]


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (stage, offload)
        for stage in (1, 2, 3)
        for offload in ("none", "optimizer", "all")
        if offload != "all" or stage == 3
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_is_told_everything(stage: int, device: str, offload: str, precision: str) -> None:
    config = deepspeed_config(OPTIM, plan(f"zero{stage}", device, 2, offload=offload, precision=precision))
    assert "auto" not in values(config)
    assert None not in values(config)
    assert config["train_batch_size"] == 4 * 2 * 2
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == stage
    assert config["zero_optimization"]["offload_optimizer"]["device"] == ("none" if offload == "none" else "cpu")
    assert config["zero_force_ds_cpu_optimizer"] is (device == "cuda")
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_a_disk_is_told_with_its_buffers(device: str, offload: str) -> None:
    it = plan("zero3", device, 2, offload=offload, offload_path="/disk")
    config = deepspeed_config(OPTIM, it, "/disk/mine")
    assert "auto" not in values(config)
    assert None not in values(config)
    # As DeepSpeed's own models read it, which refuse what they do not know.
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert zero.offload_optimizer is not None
    assert zero.offload_param is not None
    assert (zero.offload_optimizer.device, str(zero.offload_optimizer.nvme_path)) == ("nvme", "/disk/mine")
    assert zero.offload_optimizer.buffer_count >= 4, "a weight, its gradient and AdamW's moments"
    assert zero.offload_optimizer.pin_memory is (device == "cuda")
    assert zero.sub_group_size * zero.offload_optimizer.buffer_count * 4 <= 1 << 30, "bytes of host memory a rank"
    parameters = ("nvme", "/disk/mine", 0) if offload == "all" else ("none", "None", 1_000_000_000)
    found = zero.offload_param
    assert (found.device, str(found.nvme_path), found.max_in_cpu) == parameters
    assert get_aio_config(config) == config["aio"]
    assert deepspeed_config(OPTIM, it)["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/disk"


def test_an_offloaded_lion_stays_lion() -> None:
    """Where DeepSpeed insists on an optimizer of its own, Accelerate quietly makes it CPU Adam."""
    lion = OptimSpec(max_steps=1, optimizer="lion")
    it = plan("zero2", "cuda", 2, offload="optimizer")
    assert deepspeed_config(lion, it)["zero_force_ds_cpu_optimizer"] is False
    assert deepspeed_config(OPTIM, it)["zero_force_ds_cpu_optimizer"] is True


def test_without_clipping_deepspeed_clips_nothing() -> None:
    assert deepspeed_config(None, plan("zero2", "cpu", 2))["gradient_clipping"] == 0.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [(2,), (2, 2), (3, 1)])
def test_the_launcher_starts_what_was_planned(engine: str, device: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Accelerate's own parser and preparation, on the file of every node."""
    sizes = (1,) if engine == "single" else sizes
    shares = nodes(device, *sizes)
    it = plan(engine, device, sum(sizes))
    file = "/run/deepspeed.json" if it.zero_stage else None
    for index, share in enumerate(shares):
        path = tmp_path / f"{index}.yaml"
        path.write_text(yaml.safe_dump(accelerate_config(it, shares, index, 29511, file)))
        assert load_config_from_file(str(path)).machine_rank == index
        argv = launch_command("python", path, Path("/run/contract.json"))
        assert argv[:3] == ["python", "-m", "accelerate.commands.launch"]
        args, _, mixed_precision_in_file = _validate_launch_command(launch_command_parser().parse_args(argv[3:]))
        assert args.module
        assert [args.training_script, *args.training_script_args] == ["launch", "--contract", "/run/contract.json"]
        if engine == "single":
            assert not args.multi_gpu
            assert not args.use_deepspeed
            _, environment = prepare_simple_launcher_cmd_env(args)
            assert environment["ACCELERATE_USE_CPU"] == str(device == "cpu")
            continue
        args.deepspeed_fields_from_accelerate_config = ""
        if it.zero_stage:
            assert args.use_deepspeed
            assert not args.multi_gpu
            assert not mixed_precision_in_file, "Accelerate refuses it beside a DeepSpeed file"
            command, environment = prepare_deepspeed_cmd_env(args)
            assert command is None, "not by DeepSpeed's own launcher, which wants ssh between nodes"
            assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == file
        else:
            assert args.multi_gpu
            assert not args.use_deepspeed
            prepare_multi_gpu_env(args)
        assert int(args.nproc_per_node) == share.processes
        if len(shares) > 1:
            assert int(args.nnodes) == len(shares)
            assert int(args.node_rank) == index
            assert "10.0.0.1" in (getattr(args, "rdzv_endpoint", None) or args.master_addr)
        assert args.rdzv_backend == "static"


@pytest.mark.parametrize("engine", ENGINES)
def test_on_a_cpu_only_zero_is_kept_from_accelerates_cpu_mode(engine: str) -> None:
    """With ACCELERATE_USE_CPU=true DeepSpeed silently becomes DDP; without it DDP becomes separate trainers."""
    environment = launch_environment(plan(engine, "cpu", 1), nodes("cpu", 1)[0])
    assert environment["ACCELERATE_USE_CPU"] == ("false" if engine.startswith("zero") else "true")
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("engine", ENGINES)
def test_on_gpus_the_ranks_see_theirs_alone(engine: str) -> None:
    environment = launch_environment(plan(engine, "cuda", 2), nodes("cuda", 2)[0])
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["ACCELERATE_USE_CPU"] == "false"
    assert "DS_ACCELERATOR" not in environment


def test_a_tight_allocator_is_a_variable_on_gpus_alone() -> None:
    """On a CPU it is malloc's, which a rank tells by itself: any standby will do."""
    for device in ("cpu", "cuda"):
        for allocator in ("fast", "tight"):
            environment = launch_environment(plan("ddp", device, 2, allocator=allocator), nodes(device, 2)[0])
            told = environment.get(ENV_ALLOCATOR)
            assert told == ("tight" if (device, allocator) == ("cuda", "tight") else None)
