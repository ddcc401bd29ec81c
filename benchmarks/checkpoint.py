"""What saving costs: training's wait, its steps meanwhile, the storage's bandwidth, and loading elsewhere.

    python -m benchmarks.checkpoint [--saves 20] [--loads 5] [--directory DIR]

Two ranks train a Llama of 95 million parameters with ZeRO-2 in fp32, whose state (weights and two moments) has more
than a GiB. In one run, alternating:

- `blocked_ratio`: how long training waits for a save, against Accelerate's `save_state` of the same state; p95;
- `step_ratio`: how much longer a step takes while a save is being written: of the steps that overlap with one, their
  time under it over the time that the same work takes without;
- `throughput_ratio`: a bare loop that writes the same buffers by the same processes, with fsync, to fresh files,
  against a save from shards to commit; median of pairs;
- `hash_ratio`: hashing's share of a save; median;
- `load_ratio`: loading what another number of ranks saved, against what the same number saved; the worse median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_world import ENV_TASK
from launch.config import TrainSpec
from tests.worlds import a_contract, a_plan, a_spec, start, write_dialogues, write_llama

LIMITS = {"blocked_ratio": 0.06, "step_ratio": 1.3, "throughput_ratio": 0.8, "hash_ratio": 0.1, "load_ratio": 1.5}
AT_LEAST = ("throughput_ratio",)


def write_model(directory: Path) -> Path:
    """95 million parameters, with the tokenizer of a small one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_llama(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=10, num_attention_heads=12, intermediate_size=2048,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class Bench:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec: TrainSpec = a_spec(
            write_model(root / "model"), write_dialogues(root / "dialogues.jsonl"), model={"task": "causal-lm"},
            data={"split": None, "prompt_column": "prompt", "response_column": "response"},
            train={"max_steps": 100_000, "global_batch_size": 4},
        )  # fmt: skip

    def run(self, engine: str, size: int, **task: Any) -> list[dict[str, Any]]:
        """What each rank found."""
        folder = self.root / f"run-{engine}-{size}-{task['do']}"
        contract = a_contract(folder, a_plan(self.spec, engine, size, 4 // size), self.spec)
        launched = start(
            contract, {ENV_TASK: json.dumps({"root": str(self.root), **task})}, "benchmarks.checkpoint_world"
        )
        launched.wait(3600)
        results = [launched.files.rank(rank) / "result.json" for rank in range(size)]
        if not all(path.exists() for path in results):
            raise SystemExit(launched.logs())
        return [json.loads(path.read_text()) for path in results]


def slowed(steps: list[float], under: list[float], quiet: float) -> float:
    """How many times slower training is while a save is written. A step of `quiet` seconds, of whose real duration some
    seconds were `under` a save, has done in them what takes quiet - (duration - under) seconds without."""
    return sum(under) / sum(quiet - (step - part) for step, part in zip(steps, under, strict=True))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on which file system; a temporary directory by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as name:
        bench = Bench(Path(name))
        found = bench.run("zero2", 2, do="saves", count=options.saves)[0]
        blocked = [a / b for a, b in zip(found["blocked"], found["stock"], strict=True)]
        throughput = [a / b for a, b in zip(found["bare"], found["save"], strict=True)]
        hashing = [a / b for a, b in zip(found["hash"], found["save"], strict=True)]
        for key in ("blocked", "stock", "quiet_step", "saving_step", "under", "save", "bare", "hash"):
            print(f"{key:<12} median {statistics.median(found[key]):.3f} s of {len(found[key])}", file=sys.stderr)
        sizes = (1, 2, 4)
        for size in sizes:
            bench.run("zero2", size, do="save", name=f"by-{size}")
        loads = bench.run("zero2", 2, do="loads", names=[f"by-{size}" for size in sizes], count=options.loads)[0]
        medians = {name: statistics.median(times) for name, times in loads.items()}
        print(f"loads by two ranks: {medians}", file=sys.stderr)
    figures: dict[str, Any] = {
        "bytes": found["bytes"],
        "saves": options.saves,
        "blocked_ratio": percentile(blocked, 0.95),
        "blocked_ratio_median": statistics.median(blocked),
        "step_ratio": slowed(found["saving_step"], found["under"], statistics.median(found["quiet_step"])),
        "throughput_ratio": statistics.median(throughput),
        "hash_ratio": statistics.median(hashing),
        "load_ratio": max(medians["by-1"], medians["by-4"]) / medians["by-2"],
        "save_s": statistics.median(found["save"]),
        "stock_s": statistics.median(found["stock"]),
    }
    met = {
        name: figures[name] >= limit if name in AT_LEAST else figures[name] <= limit for name, limit in LIMITS.items()
    }
    print(json.dumps({**figures, "limits": LIMITS, "within_limits": all(met.values())}))


if __name__ == "__main__":
    main()
