"""The launcher configurations in configs/ are what the program itself would write for two GPUs on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config import OptimSpec
from launch.contract import ExecutionPlan, NodeShare
from launch.engine_config import accelerate_config, deepspeed_config

CONFIGS = Path(__file__).parents[3] / "configs"
NODES = [NodeShare(node="here", address="127.0.0.1", processes=2, gpus=(0, 1))]


def plan(engine: str) -> ExecutionPlan:
    return ExecutionPlan.model_validate(
        {
            "engine": engine,
            "world_size": 2,
            "device": "cuda",
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "precision": "bf16",
        }
    )


def generated(engine: str) -> dict[str, dict[str, Any]]:
    """Content by file name."""
    zero = engine.startswith("zero")
    launcher = accelerate_config(plan(engine), NODES, 0, 29500, f"configs/deepspeed/{engine}.json" if zero else None)
    files = {f"accelerate/{engine}-2.yaml": launcher}
    if zero:
        files[f"deepspeed/{engine}.json"] = deepspeed_config(OptimSpec(max_steps=1), plan(engine))
    return files


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_they_are_up_to_date(engine: str) -> None:
    for name, content in generated(engine).items():
        text = (CONFIGS / name).read_text()
        assert (yaml.safe_load(text) if name.endswith("yaml") else json.loads(text)) == content
