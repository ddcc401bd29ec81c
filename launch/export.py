"""The model directory: weights and tokenizer as transformers reads them, and what one wants to know of the run."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from launch.config import TrainSpec
from launch.contract import ProgressLine
from launch.engine import Engine
from launch.model import whole
from launch.report import ClassReport

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")


def export(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    metrics: dict[str, float],
    classes: ClassReport | None,
    curve: list[ProgressLine],
    output: Path,
    *,
    step: int,
) -> None:
    """Write the model directory `output`, whole or not at all; an older one there is replaced. All ranks call it.

    The weights are the engine's, which are those of `step`.

    With an adapter, the weights are the adapter's alone and the directory is one that peft loads.

    Raises:
        OSError: the directory cannot be written.
    """
    weights = gathered_weights(engine, trained_only=spec.adapter is not None)
    if engine.accelerator.is_main_process:
        unfinished = output.with_name(f".{output.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        engine.module.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        write_report(unfinished, spec, metrics, classes, curve, step)
        _put_in_place(unfinished, output)
    if engine.accelerator.num_processes > 1:
        torch.distributed.barrier()


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
    spec: TrainSpec,
    metrics: dict[str, float],
    classes: ClassReport | None,
    curve: list[ProgressLine],
    step: int,
) -> None:
    """README.md, metrics.json, job.json, versions.json and the training curve as data and as a picture."""
    versions = {package: version(package) for package in PACKAGES}
    measured = {**metrics, **(classes.as_dict() if classes else {})}
    (directory / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n")
    (directory / "job.json").write_text(spec.model_dump_json(indent=2) + "\n")
    (directory / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    lines = [line.model_dump_json(exclude_none=True) for line in curve]
    (directory / "training-curve.jsonl").write_text("".join(line + "\n" for line in lines))
    plot_curve(curve, directory / "training-curve.png")
    (directory / "README.md").write_text(model_card(spec, metrics, classes, curve, versions, step))


def plot_curve(curve: list[ProgressLine], path: Path) -> None:
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


def model_card(
    spec: TrainSpec,
    metrics: dict[str, float],
    classes: ClassReport | None,
    curve: list[ProgressLine],
    versions: dict[str, str],
    step: int,
) -> str:
    """Markdown with the front matter that model hubs read."""
    base = (
        Path(spec.model.name_or_path).name if Path(spec.model.name_or_path).is_absolute() else spec.model.name_or_path
    )
    pipeline = "text-classification" if spec.model.task == "sequence-classification" else "text-generation"
    optim = spec.train
    last = next((line for line in reversed(curve) if line.phase == "train"), None)
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()) or "| (no held-out data) | |"
    front = [
        "---",
        f"library_name: {'peft' if spec.adapter else 'transformers'}",
        f"pipeline_tag: {pipeline}",
        f"base_model: {json.dumps(base)}",
        "---",
    ]
    steps = f"{last.step} steps, {last.samples} samples, " if last else ""
    best = f" The weights are those of step {step}, the best evaluation." if optim.keep_best else ""
    adapter = f"LoRA r={spec.adapter.r}, alpha={spec.adapter.alpha:g}" if spec.adapter else "all weights"
    return "\n".join(
        [
            *front,
            "",
            f"# {spec.name}",
            "",
            f"`{base}`, fine-tuned for {spec.model.task}: {steps}global batch {optim.global_batch_size}, "
            f"{optim.optimizer}, learning rate {optim.learning_rate:g} ({optim.schedule}), {optim.precision}, "
            f"{adapter}, seed {optim.seed}.{best}",
            "",
            "| metric (held-out data) | value |",
            "| --- | --- |",
            measured,
            "",
            *([*classes.as_markdown(), ""] if classes else []),
            "![training curve](training-curve.png)",
            "",
            "The complete job is in `job.json`. Made with "
            + ", ".join(f"{package} {number}" for package, number in versions.items())
            + ".",
            "",
        ]
    )
