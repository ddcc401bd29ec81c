"""What a device multiplies, and whether it is what a plan says."""

from __future__ import annotations

import torch

from launch.contract import Device, ExecutionPlan
from launch.errors import SpecError
from launch.instructions import NO_INT8, USE_FP32, multiplies_bf16, multiplies_int8
from launch.native import library


def has_bf16(device: Device) -> bool:
    """Whether this host's CPU, or this rank's GPU, multiplies bf16 in hardware."""
    return multiplies_bf16() if device == "cpu" else bool(torch.cuda.is_bf16_supported(including_emulation=False))


def check_precision(plan: ExecutionPlan) -> None:
    """Raises SpecError: a precision that the device does not have, or for which nothing can be compiled here. bf16 on
    a CPU is slow at worst."""
    if plan.precision == "fp16" and plan.device == "cpu":
        problem, hint = "fp16 needs a GPU; a CPU has no fast arithmetic for it", "take bf16 or fp32"
    elif plan.precision == "bf16" and plan.device == "cuda" and not has_bf16("cuda"):
        problem, hint = f"a {torch.cuda.get_device_name()} multiplies no bf16", "take fp32 or fp16"
    elif plan.precision == "int8" and plan.device == "cuda":
        problem, hint = "int8 is for CPUs", "on a GPU take bf16 or auto"
    elif plan.precision == "int8" and not multiplies_int8():
        problem, hint = f"int8, and {NO_INT8}", USE_FP32
    elif plan.precision == "int8":
        library()
        return
    else:
        return
    raise SpecError(problem, code="precision-not-available", field="train.precision", hint=hint)
