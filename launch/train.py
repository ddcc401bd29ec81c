"""Training, from the contract to the model directory, readable top to bottom."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed

from launch.best import Best
from launch.checkpoint import same_topology as checkpoint
from launch.config import TrainSpec
from launch.contract import AttemptFiles, ExitCode, RankResult, RunContract, TrainSummary
from launch.data import Batch, Corpus, Rows, collate, load_corpus, sampler_for
from launch.engine import Engine, build_engine, make_accelerator, peak_bytes
from launch.errors import ContractError, DataError, SpecError
from launch.export import Outcome, export
from launch.losses import loss_terms, row_losses, weights_of_classes
from launch.metrics import EarlyStop, Evaluation, evaluate, sum_over_ranks
from launch.model import build_model, load_tokenizer
from launch.progress import Progress
from launch.report import ClassReport, class_report
from launch.sampler import Indices, micro_steps, rank_micro_batches
from launch.samples import continued
from launch.schedule import rate_at
from launch.stop import StopWish

MAX_SKIPPED = 10
"""Steps in a row whose loss may be not finite, with `on_nonfinite: skip`."""


def train(contract: RunContract, files: AttemptFiles, rank: int, stop: StopWish) -> tuple[ExitCode, RankResult]:
    """Train what `contract` says, on this rank together with the others.

    Returns DONE after the last step and the export, or STOPPED at the step boundary where the ranks agreed to stop,
    and what this rank found and measured.

    Raises:
        SpecError, DataError, ContractError: the job, its data, or what runs is wrong; torch's errors otherwise.
    """
    spec, plan = contract.spec, contract.plan
    assert spec is not None
    progress = Progress(files.progress(rank))
    progress.phase("start")
    accelerator = make_accelerator(plan, spec.train, spec.trackers, str(files.run_dir / "trackers"))
    set_seed(spec.train.seed + rank)  # dropout: another mask on each rank

    progress.phase("load")
    tokenizer = load_tokenizer(spec.model, spec.data.chat_template)
    corpus = load_corpus(spec, tokenizer)
    model = build_model(spec, corpus.labels, int(tokenizer.pad_token_id), checkpointing=plan.activation_checkpointing)
    engine = build_engine(accelerator, model, plan, spec.train)
    fingerprint = agreed_fingerprint(engine, corpus.train)
    if spec.trackers:
        accelerator.init_trackers(spec.name, config={"name": spec.name, "learning_rate": spec.train.learning_rate})

    loop = Loop(contract, spec, engine, corpus, fingerprint, int(tokenizer.pad_token_id), progress, stop)
    loop.resume(Path(contract.checkpoint_dir))
    stopped = loop.run()
    if stopped:
        loop.save()
        return ExitCode.STOPPED, loop.result(None, None)

    step = loop.take_best()
    metrics, classes = loop.final_metrics()
    samples = continued(engine, tokenizer, corpus.test or corpus.validation, spec.train)
    progress.phase("export", loop.step, loop.steps, loop.consumed)
    outcome = Outcome(step, metrics, classes, tuple(samples), corpus.dropped, tuple(progress.curve))
    export(engine, tokenizer, spec, corpus.labels, outcome, Path(contract.output_dir))
    for tracker in accelerator.trackers:
        tracker.finish()
    progress.phase("done", loop.step, loop.steps, loop.consumed)
    return ExitCode.DONE, loop.result(metrics, contract.output_dir)


def part_from_peers() -> None:
    """Leave the process group, if there is one: peers that still use it fail at once instead of waiting."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Loop:
    """The steps of one attempt."""

    def __init__(
        self,
        contract: RunContract,
        spec: TrainSpec,
        engine: Engine,
        corpus: Corpus,
        fingerprint: str,
        pad_token_id: int,
        progress: Progress,
        stop: StopWish,
    ) -> None:
        self.plan, self.spec, self.optim, self.task = contract.plan, spec, spec.train, spec.model.task
        self.engine, self.corpus, self.pad_token_id = engine, corpus, pad_token_id
        self.progress, self.stop = progress, stop
        self.rank = engine.accelerator.process_index
        self.varlen = spec.data.packing and engine.module.config._attn_implementation == "flash_attention_2"
        self.sampler = sampler_for(corpus.train, self.optim)
        self.fingerprint, self.checkpoint_dir = fingerprint, Path(contract.checkpoint_dir)
        early = self.optim.early_stopping
        self.early_stop = EarlyStop(early.metric, early.patience, early.min_delta) if early else None
        self.best = Best(engine, early.metric if early else "loss") if self.optim.keep_best else None
        weights = weights_of_classes(self.optim.class_weights, corpus.train, corpus.labels)
        self.class_weights = weights.to(engine.accelerator.device) if weights is not None else None
        self.saved_at = 0
        self.steps = self.optim.max_steps or self.sampler.steps_for(self.optim.epochs or 1)
        self.step = 0
        self.consumed = 0
        self.losses: list[float] = []
        self.first_step_at: float | None = None
        self.stopped_early = False
        self.skipped = self.skipped_in_a_row = 0
        wanted = micro_steps(self.optim.global_batch_size, self.plan.world_size, self.plan.micro_batch_size)
        if self.plan.gradient_accumulation_steps != wanted:
            raise ContractError(
                f"{self.plan.gradient_accumulation_steps} accumulation steps of {self.plan.micro_batch_size} rows on "
                f"{self.plan.world_size} ranks are not the global batch of {self.optim.global_batch_size} rows",
                field="plan.gradient_accumulation_steps",
                hint=f"{wanted} would be",
            )

    def run(self) -> bool:
        """Train to the last step; True if the ranks agreed to stop before it."""
        held_out = self.corpus.validation or self.corpus.test
        if held_out is None and (self.early_stop is not None or self.best is not None):
            name = "early_stopping" if self.early_stop is not None else "keep_best"
            raise SpecError(
                f"{name} has nothing to look at: there is neither validation nor test data",
                code="no-held-out-data",
                field=f"train.{name}",
                hint="add data.validation, or data.split.validation",
            )
        if self.optim.samples and held_out is None:
            raise SpecError(
                "samples are continuations of held-out prompts: there is neither validation nor test data",
                code="no-held-out-data",
                field="train.samples",
                hint="add data.test, or data.split.test",
            )
        self.engine.module.train()
        self.progress.start_training(self.step, self.consumed)
        while self.step < self.steps:
            stop_agreed = self.train_step()
            if stop_agreed and self.step < self.steps:
                return True
            if held_out is not None and self.is_time_to_evaluate():
                metrics = self.evaluated(held_out).metrics
                if self.best is not None:
                    self.best.sees(metrics, self.step)
                if self.early_stop is not None and self.early_stop.sees(metrics):
                    self.stopped_early = True
                    break
            if self.spec.checkpoint.every_steps and self.step % self.spec.checkpoint.every_steps == 0:
                self.save()
        return False

    def is_time_to_evaluate(self) -> bool:
        """Every so many steps; the last step's weights, too, may be the best."""
        every = self.optim.eval_every
        return every is not None and (self.step % every == 0 or (self.best is not None and self.step == self.steps))

    def take_best(self) -> int:
        """Give the model the weights to export, and return the step that they are of."""
        if self.best is None or self.best.state is None:
            return self.step
        self.best.restore()
        return self.best.state.step

    def resume(self, directory: Path) -> None:
        """Go on from the newest checkpoint that fits, if the job has checkpoints."""
        if self.spec.checkpoint.every_steps is None:
            return
        state = checkpoint.resume(self.engine, self.plan, self.fingerprint, self.best, directory)
        if state is not None:
            self.step = self.saved_at = state.step
            self.consumed, self.losses, self.skipped = state.consumed, list(state.losses), state.skipped
            self.progress.curve.extend(state.curve)
            if self.early_stop is not None and state.early_stop is not None:
                self.early_stop.state = state.early_stop

    def save(self) -> None:
        """Save a checkpoint, if the job has them and this step is not saved yet."""
        if self.spec.checkpoint.every_steps is None or self.saved_at == self.step:
            return
        self.progress.phase("save", self.step, self.steps, self.consumed)
        state = checkpoint.LoopState(
            engine=self.plan.engine,
            world_size=self.plan.world_size,
            fingerprint=self.fingerprint,
            step=self.step,
            consumed=self.consumed,
            losses=tuple(self.losses),
            early_stop=self.early_stop.state if self.early_stop is not None else None,
            curve=tuple(self.progress.curve),
            skipped=self.skipped,
            best=self.best.state if self.best is not None else None,
        )
        checkpoint.save(self.engine, state, self.best, self.checkpoint_dir, self.spec.checkpoint.keep_last)
        self.saved_at = self.step

    def train_step(self) -> bool:
        """One optimizer step on the next global batch; returns whether the ranks agreed to stop after it.

        They agree by the one small all-reduce that also carries the loss.
        """
        rows = self.corpus.train
        batch = self.sampler.batch(self.consumed)
        rate = rate_at(self.optim, self.step, self.steps)
        terms = loss_terms(rows, batch, self.task, self.class_weights)
        loss_sum = self.accumulate(rows, batch, terms)
        shared = sum_over_ranks(self.engine, torch.tensor([loss_sum, float(self.stop.wished())], dtype=torch.float64))
        loss = float(shared[0]) / terms
        self.step += 1
        self.consumed += len(batch)
        if not math.isfinite(loss):
            self.skip(loss)
            return bool(shared[1] > 0)
        self.engine.step(rate)
        self.skipped_in_a_row = 0
        self.losses.append(loss)
        self.first_step_at = self.first_step_at or time.time()
        if self.step % self.optim.log_every == 0 or self.step == self.steps:
            memory = peak_bytes(self.engine.accelerator.device)
            self.progress.step(self.step, self.steps, self.consumed, loss, rate, memory)
            if self.spec.trackers:
                self.engine.accelerator.log({"train/loss": loss, "train/learning_rate": rate}, step=self.step)
        return bool(shared[1] > 0)

    def skip(self, loss: float) -> None:
        """Leave the step out, if the job lets us: its rows are consumed and its learning rate has passed.

        Raises:
            SpecError: the job does not, or MAX_SKIPPED steps in a row were left out.
        """
        self.skipped_in_a_row += 1
        if self.optim.on_nonfinite == "stop" or self.skipped_in_a_row > MAX_SKIPPED:
            before = f", after {MAX_SKIPPED} skipped steps" if self.skipped_in_a_row > MAX_SKIPPED else ""
            raise SpecError(
                f"the loss is {loss} at step {self.step}{before}",
                code="loss-not-finite",
                field="train.learning_rate",
                hint="lower the learning rate, add warmup_steps, or take bf16 or fp32 instead of fp16",
            )
        self.engine.skip()
        self.skipped += 1
        self.progress.skipped(self.step, self.steps, self.consumed, self.skipped)

    def accumulate(self, rows: Rows, batch: Indices, terms: float) -> float:
        """Gradient of the mean loss over `batch`; returns the sum of this rank's losses."""
        parts = rank_micro_batches(batch, self.rank, self.plan.world_size, self.plan.micro_batch_size)
        loss_sum = 0.0
        for i, part in enumerate(parts):
            micro = collate(rows, part.rows, self.pad_token_id, causal=self.task == "causal-lm", varlen=self.varlen).to(
                self.engine.accelerator.device
            )
            with self.engine.micro_step(last=i == len(parts) - 1):
                logits = self.engine(**micro.inputs()).logits
                loss = self.training_losses(logits, micro).sum() * (0.0 if part.dummy else 1.0)
                self.engine.backward(loss / terms)
            loss_sum += float(loss.detach())
        return loss_sum

    def training_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return row_losses(
            logits,
            batch,
            self.task,
            class_weights=self.class_weights,
            label_smoothing=self.optim.label_smoothing,
        )

    def evaluated(self, rows: Rows) -> Evaluation:
        size = self.optim.eval_batch_size or 2 * self.plan.micro_batch_size
        evaluation = evaluate(self.engine, rows, self.task, size, self.pad_token_id)
        metrics = evaluation.metrics
        self.progress.evaluation(self.step, self.steps, self.consumed, metrics)
        if self.spec.trackers:
            self.engine.accelerator.log({f"eval/{name}": value for name, value in metrics.items()}, step=self.step)
        return evaluation

    def final_metrics(self) -> tuple[dict[str, float], ClassReport | None]:
        """Metrics of the finished model, and a classifier's by class: on the test part, else on the validation part."""
        final = self.corpus.test or self.corpus.validation
        if final is None:
            return {}, None
        metrics, predicted = self.evaluated(final)
        return metrics, class_report(final.classes, predicted, self.corpus.labels) if predicted is not None else None

    def result(self, metrics: dict[str, float] | None, output_dir: str | None) -> RankResult:
        found = self.engine.describe()
        summary = TrainSummary(
            steps=self.step,
            samples=self.consumed,
            samples_per_s=self.progress.samples_per_s(self.consumed),
            losses=tuple(self.losses),
            first_step_at=self.first_step_at,
            stopped_early=self.stopped_early,
            skipped_steps=self.skipped,
            best_step=self.best.state.step if self.best is not None and self.best.state is not None else None,
            dropped_rows=self.corpus.dropped,
        )
        return RankResult(
            engine=found.engine,
            zero_stage=found.zero_stage,
            world_size=found.world_size,
            micro_batch_size=found.micro_batch_size,
            gradient_accumulation_steps=found.gradient_accumulation_steps,
            precision=found.precision,
            offload=found.offload,
            activation_checkpointing=found.activation_checkpointing,
            peak_bytes=peak_bytes(self.engine.accelerator.device),
            moment_bytes=self.engine.moment_bytes(),
            master_bytes=self.engine.master_bytes(),
            metrics=metrics if self.rank == 0 else None,
            train=summary if self.rank == 0 else None,
            output_dir=output_dir if self.rank == 0 else None,
        )


def agreed_fingerprint(engine: Engine, rows: Rows) -> str:
    """The training data's fingerprint, once all ranks have been seen to have the same.

    Raises:
        DataError: a rank read something else, for example another copy of a file on its node.
    """
    fingerprint = rows.fingerprint()
    if engine.accelerator.num_processes > 1:
        everyones: list[str | None] = [None] * engine.accelerator.num_processes
        torch.distributed.all_gather_object(everyones, fingerprint)
        if len(set(everyones)) > 1:
            other = next(rank for rank, value in enumerate(everyones) if value != everyones[0])
            raise DataError(
                f"rank {other} reads other training data than rank 0",
                code="data-differs",
                field="data.train",
                hint="put the data where all nodes see the same files",
            )
    return fingerprint
