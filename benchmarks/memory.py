"""`python -m benchmarks.memory`: predicted against measured memory of trainings in fresh processes."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory_world import Case, measured, plan_of, write_job
from launch.footprint_record import Footprint
from orchestrator.memory.estimate import predict

SINGLE = [
    Case("bert", 64, 16), Case("bert", 128, 8), Case("bert", 256, 8), Case("bert", 256, 16, checkpointing=True),
    Case("bert", 256, 8, precision="bf16"), Case("bert", 512, 4),
    Case("gpt2", 64, 16), Case("gpt2", 256, 4), Case("gpt2", 256, 4, precision="bf16"),
    Case("gpt2", 256, 8, checkpointing=True), Case("gpt2", 256, 4, loss="whole"), Case("gpt2", 512, 4, dropout=0.1),
    Case("llama", 64, 8), Case("llama", 256, 4), Case("llama", 256, 4, precision="bf16"),
    Case("llama", 256, 8, checkpointing=True), Case("llama", 256, 2, loss="whole"), Case("llama", 512, 4, lora=True),
    Case("llama", 256, 4, accumulation=2),
]  # fmt: skip
SHARDED = [
    Case("bert", 256, 8, "ddp"), Case("bert", 256, 8, "zero1"), Case("bert", 256, 8, "zero2"),
    Case("bert", 256, 8, "zero3"), Case("bert", 256, 8, "zero2", "bf16"), Case("bert", 256, 8, "zero3", "bf16"),
    Case("gpt2", 256, 4, "zero2", checkpointing=True), Case("gpt2", 256, 4, "zero3", checkpointing=True),
    Case("llama", 256, 4, "ddp"), Case("llama", 256, 4, "zero1", accumulation=2), Case("llama", 256, 4, "zero2"),
    Case("llama", 256, 4, "zero3"), Case("llama", 256, 4, "zero2", "bf16"), Case("llama", 256, 4, "zero3", "bf16"),
    Case("llama", 256, 4, "zero2", offload="optimizer"), Case("llama", 256, 4, "zero3", offload="all"),
    Case("llama", 256, 4, "zero2", accumulation=2), Case("gpt2", 512, 2, "ddp", "bf16"),
]  # fmt: skip


def footprint_of(case: Case, folder: Path, *, planned: bool = False) -> Footprint:
    """What `launch.footprint` says of the case's job file."""
    command = [sys.executable, "-m", "launch.footprint", "--config", str(write_job(case, folder, planned=planned))]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RuntimeError(told.stderr)
    return Footprint.model_validate_json(told.stdout.splitlines()[-1])


def row_of(case: Case, folder: Path) -> dict[str, Any]:
    predicted = predict(footprint_of(case, folder), plan_of(case))
    ranks = measured(case, folder)
    most = max(ranks, key=lambda rank: rank.peak_bytes)
    base = most.baseline_bytes
    row = {
        "case": case.name, "engine": case.engine, "measured": most.peak_bytes, "baseline": base,
        "predicted": predicted.peak_bytes, "moment": predicted.device.moment,
        "error": predicted.peak_bytes / most.peak_bytes - 1,
        "error_above_baseline": (predicted.peak_bytes - base) / (most.peak_bytes - base) - 1,
        "breakdown": predicted.device.breakdown | predicted.host.breakdown,
    }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("-o", default="text")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    rows = []
    try:
        for case in SINGLE + SHARDED:
            if arguments.only in case.name:
                row = row_of(case, folder)
                rows.append(row)
                print(
                    f"{row['case']:44} measured {row['measured'] / 1e6:6.0f} MB  predicted {row['predicted'] / 1e6:6.0f} "
                    f"({row['error']:+.3f}, {row['error_above_baseline']:+.3f} above the imports) {row['moment']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
