"""`python -m benchmarks.memory_published [-o json]`: our formulas beside GPU peaks that others measured and published.

Nothing is run here. Those trainings are not ours: their engine (FSDP, a ZeRO-3), numbers, optimizer and loss are as
each row of the file says, so the parts are put together here for them, from the same formulas of activations and the
same shapes. What is other people's code is a constant below, with where it comes from. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import AdapterSpec, TrainSpec
from launch.families import Weight
from launch.shape import ModelShape, Trained, shape_of_config, trained
from orchestrator.memory.activations import FP32, HALF, WHOLE, Attention, Setting, backward, boundary, ends, kept

DATA = Path(__file__).parent / "data" / "gpu-peaks.csv"
GIB = 1 << 30
GOAL = 0.10
WORST = 8

NF4 = 0.5 + FP32 / 64
"""Bytes of a weight: four bits, and a constant in fp32 for each 64 of them (Dettmers et al. 2023, QLoRA)."""
SHIFTED = {"gpt_bigcode": 4 * 2.0, "granite": 3 * 4.0}
USUAL = 2 + 3 * 4.0
"""Bytes a logit of the plain loss in transformers of that time: bf16 logits that the caller holds, their fp32 copy, its
copy shifted by a token, the logarithms of its softmax. Granite's forward lets go of the first, GPT-BigCode's stays in
bf16, and has four: logits, shifted, softmax, gradient."""
FAST = 2 * 4.0
"""The same with a kernel that writes the gradient over the logits (Unsloth's): the fp32 copy, and it shifted."""
FOREACH = 1
"""torch's AdamW with foreach makes a temporary of one number a weight: the root of the second moment."""
PREFETCHED = 2
"""Layers whose weights FSDP1 holds whole at once: the one at work and the next."""
FROZEN_ALIVE = 2
"""Layers whose recomputed activations FSDP1 holds at once where its weights are frozen: a layer is let go of by the
gradient of its inputs, one layer late. Inferred from how the published peaks grow with the batch, not from its code."""
RESERVED = 1.2
"""What the caching allocator holds of what has been allocated: about the middle of this file's pairs of allocated and
nvidia-smi, which go from 1.0 to 1.8. The one constant here that is fitted."""
CONTEXT = 0.5 * GIB
"""Of a CUDA process, which nvidia-smi counts."""
FAMILY = {
    "santacoder": "gpt_bigcode",
    "powerlm": "granite",
    "granite": "granite",
    "mistral": "mistral",
    "qwen": "qwen2",
}
FAMILY |= {"gemma-2": "gemma2", "gemma": "gemma", "starcoder": "gpt_bigcode", "gpt2": "gpt2"}
RENAMED = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


@dataclass(frozen=True)
class Run:
    """One published row, read."""

    row: Mapping[str, str]
    shape: ModelShape
    parts: Trained
    setting: Setting
    ranks: int
    tokens: int
    weight: float
    """Bytes of a frozen weight, or of a trained one where nothing is frozen."""
    trained_weight: int
    gradient: int
    moment: int

    @property
    def frozen(self) -> bool:
        return bool(self.parts.adapted)


def read(path: Path) -> list[Run]:
    with path.open(newline="") as stream:
        return [run_of(row) for row in csv.DictReader(stream)]


def run_of(row: Mapping[str, str]) -> Run:
    model = row["model"].lower()
    kind = next((family for name, family in FAMILY.items() if name in model), "llama")
    config: dict[str, Any] = {
        "model_type": kind,
        "tie_word_embeddings": row["tied_embeddings"] == "yes",
        "vocab_size": int(row["vocab"]),
    }
    sizes = {"hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    if kind.startswith("gpt"):
        sizes = {"n_embd": "hidden", "n_layer": "layers", "n_head": "heads", "n_inner": "ffn"}
        config |= {"multi_query": row["kv_heads"] == "1", "n_positions": max(2048, int(row["seq_len"]))}
        config |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    else:
        sizes |= {"num_key_value_heads": "kv_heads", "intermediate_size": "ffn", "head_dim": "head_dim"}
    shape = shape_of_config(config | {key: int(row[column]) for key, column in sizes.items()}, "causal-lm")
    assert shape is not None
    parts = trained(shape, spec_of(row, kind))
    half = not row["weights_dtype"].startswith("fp32") or "autocast" in row["compute_dtype"]
    fp32_state = "fp32" in row["optimizer_dtype"]
    adapted = bool(parts.adapted)
    weights = row["weights_dtype"].lower()
    base = NF4 if "nf4" in weights else 4.0 if weights.startswith("fp32") else 2.0
    own = 4 if fp32_state or "lora fp32" in weights else 2
    setting = Setting(
        numbers=HALF if half else WHOLE,
        length=int(row["seq_len"]),
        attention=attention(row["attention_impl"]),
        device="cuda",
        padded=False,
        lora=int(row["lora_rank"] or 0) * sum(weight.layer == 0 for weight in parts.adapted),
        dropout=False,
        fused="rmsnorm" in row["loss_mode"].lower(),
    )
    return Run(
        row, shape, parts, setting, int(row["gpu_count"]) if "FSDP" in row["parallelism"] else 1,
        int(row["micro_batch"]) * int(row["seq_len"]), base if adapted else (4.0 if fp32_state else base),
        own, 4 if row["grads_dtype"].startswith("fp32") else 2, own,
    )  # fmt: skip


def attention(text: str) -> Attention:
    return "flash" if "flash" in text else "sdpa" if "sdpa" in text else "eager"


def spec_of(row: Mapping[str, str], kind: str) -> TrainSpec:
    adapter = None
    if row["lora_rank"]:
        named = tuple(RENAMED.get(name, name) for name in row["lora_targets"].split(";") if name)
        if named == ("c_attn",) and kind == "qwen2":  # Qwen's first code fuses the three
            named = ("q_proj", "k_proj", "v_proj")
        adapter = AdapterSpec(r=int(row["lora_rank"]), target_modules=named or "all-linear")
    return TrainSpec.model_validate(
        {
            "name": "published",
            "model": {"name_or_path": "org/model", "task": "causal-lm"},
            "data": {"train": ("data",)},
            "train": {"max_steps": 1},
            "adapter": adapter,
        }
    )


def allocated(run: Run) -> dict[str, float]:
    """Bytes at each moment that may be the worst."""
    of, at, tokens = run.shape.traits, run.setting, run.tokens
    weights = run.parts.weights
    ours = sum(weight.elements for weight in weights if weight.name in run.parts.names)
    others = sum(w.elements * _frozen_width(w, run) for w in weights if w.name not in run.parts.names)
    held = run.trained_weight if run.frozen else run.weight
    state = (others + ours * (held + 2 * run.moment)) / run.ranks
    gradients = ours * run.gradient / run.ranks
    step = state + gradients + FOREACH * ours * run.moment / run.ranks

    whole = 0.0
    layer_weights = sum(w.elements for w in weights if w.layer == 0)
    width = 2.0 if run.row["base_quantization"] == "none" else NF4
    outside = sum(w.elements for w in weights if w.layer is None)
    if run.ranks > 1:  # the unit around all layers stays whole; of the layers, a few
        whole = 2 * outside + PREFETCHED * width * layer_weights
    elif run.row["base_quantization"] != "none":
        whole = 2.0 * max(w.elements for w in weights if w.layer == 0)  # a weight is written out for its product
    layer = tokens * sum(kept(of, at).values())
    checkpointing = not run.row["activation_checkpointing"].startswith("none")
    body = of.layers * (tokens * boundary(of, at) if checkpointing else layer)
    alive = FROZEN_ALIVE if run.ranks > 1 and run.frozen else 1
    again = alive * layer if checkpointing else 0.0
    head = 2 * of.vocabulary * of.hidden * (not run.frozen)
    tail = tokens * (ends(of, at) + 2 * of.hidden)
    moments = {
        "loss": state + whole + body + tail + loss(run),
        "layer": state + whole + body + again + tokens * backward(of, at) + head + 2 * layer_weights * (not run.frozen),
        "step": step,
    }
    if run.ranks == 1:
        moments["end"] = state + gradients + 2 * head / max(1, 2 if not of.tied else 1)
    return moments


def _frozen_width(weight: Weight, run: Run) -> float:
    """Bytes of an element: of a quantised base, the layers' products alone are."""
    quantised = weight.kind == "linear" and weight.layer is not None
    return NF4 if run.row["base_quantization"] != "none" and quantised else 2.0


def loss(run: Run) -> float:
    """Bytes of the logits, by whose code it is."""
    of, text = run.shape.traits, run.row["loss_mode"].lower()
    logits = float(run.tokens * of.vocabulary)
    if "fused-linear" in text or "chunked" in text:
        # Liger: as many tokens at once as make the logits as large as the hidden states, twice; and the gradients of
        # hidden states and, where it is trained, weight.
        pieces = -(-of.vocabulary // of.hidden)
        chunk = (run.tokens / pieces) * of.vocabulary
        return chunk * (FP32 + 2) + 2 * run.tokens * of.hidden + 2 * of.vocabulary * of.hidden * (not run.frozen)
    if "fast ce" in text or "unsloth" in text:
        return FAST * logits
    return SHIFTED.get(run.shape.model_type, USUAL) * logits


def predicted(run: Run) -> tuple[float, str]:
    """GiB of the row's metric, and the moment of the peak."""
    moments = allocated(run)
    moment = max(moments, key=lambda name: moments[name])
    peak, metric = moments[moment], run.row["metric"]
    if "reserved" in metric or "nvidia-smi" in metric:
        peak *= RESERVED
    if "nvidia-smi" in metric:
        peak += CONTEXT
    return peak / GIB, moment


def farthest(errors: list[float]) -> float:
    """From zero, on either side."""
    return max(errors, key=abs)


def compare(runs: list[Run]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for run in runs:
        ours, moment = predicted(run)
        theirs = float(run.row["peak_gib"])
        rows.append(
            {
                "row": run.row["row_id"],
                "run": run.row["run_id"],
                "metric": re.sub(r" .*", "", run.row["metric"]),
                "confidence": run.row["confidence"],
                "published_gib": theirs,
                "predicted_gib": round(ours, 3),
                "error": round(ours / theirs - 1, 4),
                "moment": moment,
            }
        )
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[f"{row['metric']}/{row['confidence']}"].append(row["error"])
    told = {
        name: {
            "rows": len(errors),
            "median_absolute_error": round(statistics.median(map(abs, errors)), 4),
            "median_error": round(statistics.median(errors), 4),
            "worst": round(farthest(errors), 4),
        }
        for name, errors in sorted(groups.items())
    }
    main_group = told.get("max_allocated/high", {"median_absolute_error": None})
    return {
        "measured_by": "others, as published; not run by us",
        "goal": GOAL,
        "median_absolute_error": main_group["median_absolute_error"],
        "groups": told,
        "worst": sorted(rows, key=lambda row: -abs(row["error"]))[:WORST],
        "rows": rows,
    }


def explained(run: Run) -> str:
    """What is known of a row that is far off."""
    row, reasons = run.row, []
    if "?" in row["weights_dtype"] + row["grads_dtype"] + row["optimizer_dtype"] or "probably" in row["weights_dtype"]:
        reasons.append("its number types are not stated")
    if row["metric"].startswith(("nvidia-smi", "max_reserved")):
        reasons.append("it counts what the allocator reserves, which depends on its history")
    if run.frozen and run.ranks > 1:
        reasons.append("FSDP1 with frozen weights, whose layers are let go of late")
    if not row["notes"]:
        return "; ".join(reasons)
    return "; ".join([*reasons, row["notes"].split(";")[0]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory_published", description=__doc__)
    parser.add_argument("--file", type=Path, default=DATA, help="published peaks, in the same columns")
    parser.add_argument("-o", dest="output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    runs = read(arguments.file)
    told = compare(runs)
    if arguments.output == "text":
        by_row = {run.row["row_id"]: run for run in runs}
        print(f"{'row':>4} {'run':28} {'metric':14} {'conf.':7} {'published':>9} {'predicted':>9} {'error':>7}  moment")
        for row in told["rows"]:
            where = f"{row['row']:>4} {row['run']:28} {row['metric']:14} {row['confidence']:7}"
            found = f"{row['published_gib']:9.2f} {row['predicted_gib']:9.2f} {row['error']:+7.1%}"
            print(f"{where} {found}  {row['moment']}")
        print("\nmeasured by others, as published; not run by us")
        for name, group in told["groups"].items():
            error = f"median absolute error {group['median_absolute_error']:.1%}, worst {group['worst']:+.1%}"
            print(f"{name:22} {group['rows']:3} rows, {error}")
        print("\nworst rows")
        for row in told["worst"]:
            print(f"{row['row']:>4} {row['error']:+.1%}: {explained(by_row[row['row']])}")
    print(json.dumps({key: value for key, value in told.items() if key != "rows" or arguments.output == "json"}))


if __name__ == "__main__":
    main()
