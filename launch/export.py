"""The model directory: weights and tokenizer as transformers reads them, and what one wants to know of the run."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from launch.checkpoint.base_weights import BaseWeights
from launch.config import AdapterSpec, TrainSpec
from launch.contract import ProgressLine
from launch.engine import Engine
from launch.model import load_model, whole
from launch.provenance import RECORD, RunRecord
from launch.report import ClassReport
from launch.samples import Sample
from launch.vocabulary import whole_tables

CARD_PACKAGES = ("tuneyard", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")


@dataclass(frozen=True)
class Outcome:
    """What is told of a finished training beside its weights."""

    step: int
    """The step whose weights are exported."""
    metrics: dict[str, float]
    """Of those very weights, on held-out data."""
    classes: ClassReport | None
    samples: tuple[Sample, ...]
    dropped: dict[str, int]
    """Rows of each part that were left out, having no target."""
    curve: tuple[ProgressLine, ...]


def export(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    labels: tuple[str, ...],
    outcome: Outcome,
    record: Future[RunRecord] | None,
    output: Path,
) -> None:
    """Write the model directory `output`, whole or not at all; an older one there is replaced. All ranks call it.

    The weights are the engine's, which are those of `outcome.step`. With an adapter, they are the adapter's alone and
    the directory is one that peft loads, unless it is to be merged into the base. `record` is rank 0's.

    Raises:
        OSError: the directory cannot be written.
    """
    weights = gathered_weights(engine, trained_only=spec.adapter is not None)
    if engine.accelerator.is_main_process:
        if spec.model.vocabulary == "used":
            unset_hf_deepspeed_config()  # as in `merged`: a base that is loaded whole is so on this rank alone
            weights = whole_tables(engine.module, weights, BaseWeights(spec.model, engine.module))
        unfinished = output.with_name(f".{output.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if spec.adapter is not None and spec.adapter.merge:
            with tempfile.TemporaryDirectory(dir=unfinished) as adapter:
                engine.module.save_pretrained(adapter, state_dict=weights)
                merged(Path(adapter), spec, labels, int(tokenizer.pad_token_id)).save_pretrained(unfinished)
        else:
            engine.module.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        assert record is not None
        write_report(unfinished, record.result(), outcome)
        _put_in_place(unfinished, output)
    if engine.accelerator.num_processes > 1:
        torch.distributed.barrier()


def merged(adapter: Path, spec: TrainSpec, labels: tuple[str, ...], pad_token_id: int) -> PreTrainedModel:
    """The base model, read again and whole, with the adapter in the directory `adapter` merged into its weights.

    On one rank alone: nothing here is sharded, whatever the engine was.
    """
    from peft import PeftModel

    unset_hf_deepspeed_config()  # otherwise the base would be sharded as it loads, by all ranks together
    base, _ = load_model(spec.model, labels, pad_token_id)
    whole_model: PreTrainedModel = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return whole_model


def gathered_weights(engine: Engine, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """The whole weights by name, on the CPU of rank 0; empty elsewhere.

    One parameter after the other, so that ZeRO-3 never holds more than one whole parameter a rank.
    """
    main = engine.accelerator.is_main_process
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with whole([parameter]):
            if main:
                weights[name] = parameter.detach().cpu().clone()
    if main and not trained_only:
        persistent = engine.module.state_dict().keys()
        buffers = engine.module.named_buffers()
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers if name in persistent}
    return weights


def _put_in_place(unfinished: Path, output: Path) -> None:
    """Rename, the old directory out of the way first: a directory cannot be replaced by a rename."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    unfinished.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def write_report(
    directory: Path,
    record: RunRecord,
    outcome: Outcome,
) -> None:
    """README.md, metrics.json, job.json, versions.json, run.json, the training curve (data, picture), samples."""
    spec, versions = record.spec, record.surroundings.versions
    measured = {**outcome.metrics, **(outcome.classes.as_dict() if outcome.classes else {})}
    (directory / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n")
    (directory / "job.json").write_text(spec.model_dump_json(indent=2) + "\n")
    (directory / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    (directory / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
    lines = [line.model_dump_json(exclude_none=True) for line in outcome.curve]
    (directory / "training-curve.jsonl").write_text("".join(line + "\n" for line in lines))
    plot_curve(outcome.curve, directory / "training-curve.png")
    if outcome.samples:
        texts = [json.dumps(sample._asdict(), ensure_ascii=False) for sample in outcome.samples]
        (directory / "samples.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    (directory / "README.md").write_text(model_card(record, outcome), encoding="utf-8")


def plot_curve(curve: Sequence[ProgressLine], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    trained = [(line.step, line.loss) for line in curve if line.loss is not None]
    axes.plot([step for step, _ in trained], [loss for _, loss in trained], label="training", linewidth=1)
    held_out = [line for line in curve if line.metrics is not None]
    if held_out:
        losses = [line.metrics["loss"] for line in held_out if line.metrics]
        axes.plot([line.step for line in held_out], losses, "o-", label="held-out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def model_card(record: RunRecord, outcome: Outcome) -> str:
    """Markdown with the front matter that model hubs read."""
    spec, versions = record.spec, record.surroundings.versions
    base = (
        Path(spec.model.name_or_path).name if Path(spec.model.name_or_path).is_absolute() else spec.model.name_or_path
    )
    pipeline = "text-classification" if spec.model.task == "sequence-classification" else "text-generation"
    optim = spec.train
    last = next((line for line in reversed(outcome.curve) if line.phase == "train"), None)
    measured = (
        "\n".join(f"| {name} | {value:.4f} |" for name, value in outcome.metrics.items()) or "| (no held-out data) | |"
    )
    front = [
        "---",
        f"library_name: {'peft' if spec.adapter and not spec.adapter.merge else 'transformers'}",
        f"pipeline_tag: {pipeline}",
        f"base_model: {json.dumps(base)}",
        "---",
    ]
    steps = f"{last.step} steps, {last.samples} samples, " if last else ""
    best = f" The weights are those of step {outcome.step}, the best evaluation." if optim.keep_best else ""
    adapter = adapter_words(spec.adapter) if spec.adapter else "all weights"
    absent = [
        f"{number} of the {name} rows have no target within {spec.data.max_length} tokens and were left out."
        for name, number in outcome.dropped.items()
        if number
    ]
    rows = "sequences of packed rows" if spec.data.packing else "rows"
    return "\n".join(
        [
            *front,
            "",
            f"# {spec.name}",
            "",
            f"`{base}`, fine-tuned for {spec.model.task}: {steps}global batch {optim.global_batch_size} {rows}, "
            f"{optim.optimizer}, learning rate {optim.learning_rate:g} ({optim.schedule}), {record.plan.precision}, "
            f"{adapter}, seed {optim.seed}.{best}",
            *absent,
            "",
            "| metric (held-out data) | value |",
            "| --- | --- |",
            measured,
            "",
            *([*outcome.classes.as_markdown(), ""] if outcome.classes else []),
            "![training curve](training-curve.png)",
            "",
            *sample_words(outcome.samples),
            "The complete job is in `job.json`. Made with "
            + ", ".join(f"{package} {versions[package]}" for package in CARD_PACKAGES if package in versions)
            + ".",
            f"To run it again as `{RECORD}` tells, and compare the weights: `tuneyard reproduce DIRECTORY`.",
            "",
        ]
    )


def adapter_words(adapter: AdapterSpec) -> str:
    """The adapter in a few words, as the card tells it."""
    kind = f"{'rs' if adapter.use_rslora else ''}LoRA{' with DoRA' if adapter.use_dora else ''}"
    return f"{kind} r={adapter.r}, alpha={adapter.alpha:g}{', merged' if adapter.merge else ''}"


def sample_words(samples: Sequence[Sample]) -> list[str]:
    """A section of the card with the samples, in code fences that no text of theirs can close."""
    if not samples:
        return []
    lines = ["## Samples", "", "Greedy continuations of the first held-out prompts.", ""]
    for sample in samples:
        for title, text in (("Prompt", sample.prompt), ("Generated", sample.generated), ("Data", sample.reference)):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            lines += [f"{title}:", "", f"{fence}text", text, fence, ""]
    return lines
