"""`python -m benchmarks.memory`: predicted against measured memory of trainings in fresh processes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.memory_world import Case, measured, plan_of, write_job
from launch.footprint_record import Footprint
from orchestrator.memory.estimate import Predicted, predict

SINGLE = [
    Case("bert", 64, 16), Case("bert", 128, 8), Case("bert", 256, 8), Case("bert", 256, 16, checkpointing=True),
    Case("bert", 256, 8, precision="bf16"), Case("bert", 512, 4),
    Case("gpt2", 64, 16), Case("gpt2", 256, 4), Case("gpt2", 256, 4, precision="bf16"),
    Case("gpt2", 256, 8, checkpointing=True), Case("gpt2", 256, 4, loss="whole"), Case("gpt2", 512, 4, dropout=0.1),
    Case("llama", 64, 8), Case("llama", 256, 4), Case("llama", 256, 4, precision="bf16"),
    Case("llama", 256, 8, checkpointing=True), Case("llama", 256, 2, loss="whole"), Case("llama", 512, 4, lora=True),
    Case("llama", 256, 4, accumulation=2), Case("bert", 64, 8, copies=True),
    Case("bert", 256, 8, precision="int8"), Case("llama", 256, 4, precision="int8", lora=True),
]  # fmt: skip
SHARDED = [
    Case("bert", 256, 8, "ddp"), Case("bert", 256, 8, "zero1"), Case("bert", 256, 8, "zero2"),
    Case("bert", 256, 8, "zero3"), Case("bert", 256, 8, "zero2", "bf16"), Case("bert", 256, 8, "zero3", "bf16"),
    Case("gpt2", 256, 4, "zero2", checkpointing=True), Case("gpt2", 256, 4, "zero3", checkpointing=True),
    Case("llama", 256, 4, "ddp"), Case("llama", 256, 4, "zero1", accumulation=2), Case("llama", 256, 4, "zero2"),
    Case("llama", 256, 4, "zero3"), Case("llama", 256, 4, "zero2", "bf16"), Case("llama", 256, 4, "zero3", "bf16"),
    Case("llama", 256, 4, "zero2", offload="optimizer"), Case("llama", 256, 4, "zero3", offload="all"),
    Case("llama", 256, 4, "zero2", accumulation=2), Case("gpt2", 512, 2, "ddp", "bf16"),
    Case("bert", 64, 8, "ddp", copies=True), Case("llama", 64, 4, "zero2", copies=True),
    Case("bert", 256, 8, "zero3", "int8"),
]  # fmt: skip


def footprint_of(case: Case, folder: Path, *, planned: bool = False) -> Footprint:
    """What `launch.footprint` says of the case's job file."""
    job = write_job(case, folder, planned=planned)
    command = [sys.executable, "-m", "launch.footprint", "--config", str(job), "--device", case.device]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(told.stderr)
    return Footprint.model_validate_json(told.stdout.splitlines()[-1])


def row_of(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes, and errors as shares of what was measured; of the rank that held the most."""
    footprint = footprint_of(case, folder)
    predicted = predicted_of(case, footprint)
    most = max(measured(case, folder), key=lambda rank: rank.peak_bytes)
    base = most.baseline_bytes

    def errors(peak: float) -> tuple[float, float]:
        return peak / most.peak_bytes - 1, (peak - base) / (most.peak_bytes - base) - 1

    error, above = errors(predicted.peak_bytes)
    return {
        "case": case.name, "zero": case.engine != "single", "measured": most.peak_bytes, "baseline": base,
        "predicted": predicted.peak_bytes, "error": error, "error_above_baseline": above,
        "moment": predicted.device.moment, "breakdown": predicted.device.breakdown | predicted.host.breakdown,
        # Theirs know nothing of the process: what it holds before there is a model is given to them.
        "accelerate": errors(base + of_accelerate(footprint, case))[1],
        "deepspeed": errors(base + of_deepspeed(footprint, case))[1] if case.engine.startswith("zero") else None,
    }  # fmt: skip


def predicted_of(case: Case, footprint: Footprint) -> Predicted:
    """What a rank will hold; all ranks share this host."""
    return predict(
        footprint, plan_of(case), adapter_alone=case.lora, memory_copies=case.copies, local=case.world_size
    )  # fmt: skip


def of_accelerate(footprint: Footprint, case: Case) -> int:
    """`accelerate estimate-memory`: training with Adam, in one process."""
    from accelerate.commands.estimate import estimate_training_usage

    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "float32"}[case.precision]
    usage = estimate_training_usage(4 * footprint.parameters, dtype)
    return int(max(usage.values()))


def of_deepspeed(footprint: Footprint, case: Case) -> int:
    """DeepSpeed's estimates of model states, of one process on a node of two: what is on the GPU, and its share of the
    host's where something is offloaded."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    ranks, offloads = case.world_size, case.offload != "none"
    if case.engine == "zero3":
        host, gpu, largest = estimate_zero3_model_states_mem_needs(
            footprint.parameters, footprint.largest, ranks, 1, offloads, case.offload == "all"
        )
        gpu += largest
    else:
        host, gpu = estimate_zero2_model_states_mem_needs(footprint.parameters, ranks, 1, offloads)
    return int(gpu + (host / ranks if offloads else 0))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and largest absolute errors; `single` is one process, `zero` DDP and ZeRO on two."""
    found: dict[str, Any] = {"configurations": len(rows)}
    for name, zero in (("single", False), ("zero", True)):
        of_kind = [row for row in rows if row["zero"] == zero]
        for key, column in (("", "error"), ("_above_baseline", "error_above_baseline")):
            errors = [abs(row[column]) for row in of_kind]
            found[f"mape_{name}{key}"] = round(mean(errors), 4) if errors else None
            found[f"worst_{name}{key}"] = round(max(errors), 4) if errors else None
    for peer in ("accelerate", "deepspeed"):
        theirs = [row[peer] for row in rows if row[peer] is not None]
        found[f"{peer}_mape_above_baseline"] = round(mean(map(abs, theirs)), 4) if theirs else None
        found[f"{peer}_from_to"] = [round(min(theirs), 3), round(max(theirs), 3)] if theirs else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("-o", choices=("text", "json"), default="text", help="json: no table")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        for case in SINGLE + SHARDED:
            if arguments.only not in case.name:
                continue
            row = row_of(case, Path(folder))
            rows.append(row)
            if arguments.o == "text":
                megabytes = f"{row['measured'] / 1e6:6.0f} MB, predicted {row['predicted'] / 1e6:6.0f}"
                errors = f"{row['error']:+.3f}, above the imports {row['error_above_baseline']:+.3f}"
                theirs = f"accelerate {row['accelerate']:+.2f}"
                if row["deepspeed"] is not None:
                    theirs += f", deepspeed {row['deepspeed']:+.2f}"
                print(f"{row['case']:44} {megabytes} ({errors}; {theirs})", flush=True)
    print(json.dumps(summary(rows) | {"rows": rows}))


if __name__ == "__main__":
    main()
