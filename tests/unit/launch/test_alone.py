"""The plan that a job file spells out where nobody plans: in what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.alone import contract_alone, plan_alone
from launch.config import TrainSpec
from launch.contract import ExecutionPlan
from launch.engine import make_accelerator
from launch.errors import SpecError
from tests.worlds import a_spec


def a_wish(precision: str) -> TrainSpec:
    return a_spec(Path("/m"), Path("/d"), train={"max_steps": 1, "precision": precision})


@pytest.mark.parametrize(
    ("wish", "bf16", "taken"), [("auto", True, "bf16"), ("auto", False, "fp32"), ("bf16", False, "bf16")]
)
def test_auto_is_what_the_hardware_multiplies(
    wish: str, bf16: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.precision.multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert [plan_alone(a_wish(wish), 1, device).precision for device in ("cpu", "cuda")] == [taken, taken]


@pytest.mark.parametrize(("local", "refused"), [("1", True), ("2", False), (None, False)])
def test_several_hosts_do_not_decide_each_for_itself(
    local: str | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    file = tmp_path / "job.yaml"
    keys: dict[str, Any] = {
        "name": "job", "model": {"name_or_path": "m", "task": "sequence-classification"}, "data": {"train": "d.csv"},
        "train": {"max_steps": 1, "precision": "auto"}, "strategy": "ddp", "resources": {"num_processes": 2},
    }  # fmt: skip
    file.write_text(json.dumps(keys))
    if not refused:
        assert contract_alone(file, (), None, 2).plan.precision in ("bf16", "fp32")
        return
    with pytest.raises(SpecError) as caught:
        contract_alone(file, (), None, 2)
    assert (caught.value.code, caught.value.field) == ("precision-undecided", "train.precision")
    assert contract_alone(file, ("train.precision=bf16",), None, 2).plan.precision == "bf16"


def test_a_gpu_without_bf16_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    plan = ExecutionPlan(
        engine="single",
        world_size=1,
        device="cuda",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        precision="bf16",
    )
    with pytest.raises(SpecError) as caught:
        make_accelerator(plan, a_wish("bf16").train, (), str(tmp_path))
    assert (caught.value.code, caught.value.field) == ("precision-not-available", "train.precision")
    assert "Tesla V100" in str(caught.value)


@pytest.mark.parametrize(("device", "why"), [("cpu", "VNNI"), ("cuda", "for CPUs")])
def test_int8_where_it_cannot_be_is_told_before_anything_is_loaded(
    device: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.precision.multiplies_int8", lambda: False)
    plan = plan_alone(a_wish("int8"), 1, device)
    assert (plan.precision, plan.half) == ("int8", None)
    with pytest.raises(SpecError) as caught:
        make_accelerator(plan, a_wish("int8").train, (), str(tmp_path))
    assert (caught.value.code, caught.value.field) == ("precision-not-available", "train.precision")
    assert why in str(caught.value)
