"""`python -m benchmarks.memory_gpu`: predicted against measured memory of trainings on one GPU.

Each in a fresh process, several side by side. Measured are three things: what torch has allocated at most, what the
process has held of the card (NVML) and of the host, looked at 20 times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch

from benchmarks.memory import footprint_of, predicted_of
from benchmarks.memory_world import Case, begun, results, write_job
from tests.worlds import Launched

LARGE: dict[str, Any] = {"hidden": 1024, "layers": 24, "device": "cuda", "precision": "bf16"}
CASES = [
    Case("bert", 512, 32, **LARGE), Case("bert", 512, 32, **LARGE | {"precision": "fp32"}),
    Case("bert", 512, 64, checkpointing=True, **LARGE), Case("bert", 512, 32, "zero2", **LARGE),
    Case("gpt2", 512, 16, **LARGE), Case("gpt2", 512, 16, loss="whole", **LARGE),
    Case("gpt2", 512, 16, "zero3", checkpointing=True, **LARGE),
    Case("llama", 1024, 8, **LARGE), Case("llama", 1024, 8, **LARGE | {"precision": "fp32"}),
    Case("llama", 1024, 8, loss="whole", **LARGE), Case("llama", 1024, 16, checkpointing=True, **LARGE),
    Case("llama", 1024, 8, lora=True, **LARGE), Case("llama", 1024, 8, accumulation=2, **LARGE),
    Case("llama", 1024, 8, "zero1", **LARGE), Case("llama", 1024, 8, "zero2", **LARGE),
    Case("llama", 1024, 8, "zero3", **LARGE), Case("llama", 1024, 8, "zero3", checkpointing=True, **LARGE),
    Case("llama", 1024, 8, allocator="fast", **LARGE),
    Case("llama", 1024, 8, "zero2", offload="optimizer", **LARGE),
]  # fmt: skip
NOT_TENSORS = ("allocator", "context")
LOOK_S = 0.05


def row_of(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes, and errors as shares of what was measured."""
    predicted = predicted_of(case, footprint_of(case, folder))
    launched = begun(case, folder)
    card, host = watched(launched)
    result = results(case, launched)[0]
    tensors = sum(size for item, size in predicted.device.breakdown.items() if item not in NOT_TENSORS)
    return {
        "case": case.name, "moment": predicted.device.moment,
        "allocated": result.peak_bytes, "predicted_allocated": tensors, "error": tensors / result.peak_bytes - 1,
        "card": card, "predicted_card": predicted.device.peak_bytes,
        "card_error": predicted.device.peak_bytes / card - 1 if card else None,
        "host": host, "predicted_host": predicted.host.peak_bytes,
    }  # fmt: skip


def watched(launched: Launched) -> tuple[int, int]:
    """The most that the rank has held of the card, 0 where the driver does not tell, and of the host."""
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    card = host = 0
    while launched.launchers[0].poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            pid = json.loads(launched.files.process(0).read_text())["pid"]
            host = max(host, psutil.Process(pid).memory_info().rss)
            ours = [one for one in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu) if one.pid == pid]
            card = max([card, *(one.usedGpuMemory or 0 for one in ours)])
        time.sleep(LOOK_S)
    return card, host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--at-once", type=int, default=4, help="trainings side by side")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.memory_gpu: there is no GPU")
    cases = [case for case in CASES if options.only in case.name]
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        for case in cases:  # what they share is written before they begin
            write_job(case, folder)
        with ThreadPoolExecutor(options.at_once) as pool:
            told = [(case, pool.submit(row_of, case, folder)) for case in cases]
            for case, one in told:
                try:
                    row = one.result()
                except Exception as problem:
                    print(f"{case.name:44} {str(problem)[-1500:]}", flush=True)
                    continue
                rows.append(row)
                sizes = [
                    f"{row[key] / 1e9:6.2f}" for key in ("allocated", "predicted_allocated", "card", "predicted_card")
                ]
                hosts = [f"{row[key] / 1e9:5.2f}" for key in ("host", "predicted_host")]
                print(
                    f"{row['case']:44} allocated {sizes[0]} GB, predicted {sizes[1]} ({row['error']:+.3f});"
                    f" of the card {sizes[2]}, predicted {sizes[3]}; of the host {hosts[0]}, predicted {hosts[1]}",
                    flush=True,
                )
    errors = [abs(row["error"]) for row in rows]
    figures = {
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "configurations": len(rows),
        "failed": len(cases) - len(rows),
        "mape_allocated": round(mean(errors), 4) if errors else None,
        "worst_allocated": round(max(errors), 4) if errors else None,
    }  # fmt: skip
    print(json.dumps(figures | {"rows": rows}))
    if figures["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
