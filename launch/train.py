"""Training, from the contract to the model directory, readable top to bottom."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch

from launch.best import Best
from launch.checkpoint import random_state
from launch.checkpoint.manifest import Manifest
from launch.config import TrainSpec
from launch.contract import AttemptFiles, ExitCode, RankResult, RunContract
from launch.data import Batch, Corpus, Rows, load_corpus, sampler_for
from launch.determinism import fix_numerics, seed_all
from launch.dropout import drop_cheaply
from launch.engine import Engine, build_engine, make_accelerator, peak_bytes
from launch.export import Outcome, export
from launch.feed import Feed, check_accumulation
from launch.gathers import tell_of_gathers
from launch.guard import Guard
from launch.host import resident_bytes, take_share
from launch.instructions import SLOW_BF16, USE_FP32, multiplies_bf16
from launch.losses import MAX_SKIPPED, loss_terms, not_finite, weights_of_classes
from launch.metrics import Asking, EarlyStop, Evaluation, Interrupted, check_held_out, evaluate
from launch.model import build_model, load_tokenizer
from launch.objective import Objective, check_loss_mode, objective_of
from launch.progress import Progress, SampleLog
from launch.report import ClassReport, class_report
from launch.result import Found, rank_result, state_of, summary_of
from launch.rollback import go_back, leave_out
from launch.samples import continued
from launch.saving import LoopState, Owed, Place, Saving
from launch.schedule import rate_at
from launch.stop import StopWish
from launch.tally import Heard, Step, Tally, Wishes, either
from launch.tracking import start_trackers
from launch.vocabulary import keep_used
from launch.witness import agreed_fingerprint, begin_record, check_data


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
    share = take_share(plan.device, plan.allocator)
    if rank == 0 and plan.device == "cpu" and plan.precision == "bf16" and not multiplies_bf16():
        print(f"{SLOW_BF16}; {USE_FP32}", flush=True)
    baseline = resident_bytes() if plan.device == "cpu" else 0
    fix_numerics(spec.train, contract.origin.pinned, rank)
    accelerator = make_accelerator(plan, spec.train, spec.trackers, contract.tracker_dir)
    seed_all(spec.train.seed, rank)

    progress.phase("load")
    tokenizer = load_tokenizer(spec.model, spec.data.chat_template)
    corpus = load_corpus(spec, tokenizer)
    pad_token_id = int(tokenizer.pad_token_id)
    model = build_model(spec, corpus.labels, pad_token_id, checkpointing=plan.activation_checkpointing)
    keep_used(model, spec.model.vocabulary, corpus.parts().values(), pad_token_id)
    if plan.device == "cpu":
        drop_cheaply(model)
    weights = weights_of_classes(spec.train.class_weights, corpus.train, corpus.labels)
    objective = objective_of(spec, model, weights, plan.loss)
    engine = build_engine(accelerator, model, plan, spec.train)
    if plan.zero_stage == 3:
        tell_of_gathers(progress.pulse.gathered)
    found = Found(objective.probe(engine, accelerator.device), share.allocator, baseline)
    check_loss_mode(spec.train, found.loss)
    fingerprint = agreed_fingerprint(engine, corpus.train)
    check_data(contract, corpus)
    saving = Saving(contract, engine, tokenizer, progress)
    seen = SampleLog(files.samples(rank)) if spec.train.log_samples else None
    loop = Loop(
        contract, spec, engine, objective, corpus, fingerprint, pad_token_id, progress, stop, saving, found, seen
    )
    loop.resume()
    share.pin()
    record = begin_record(contract, engine, corpus, loop.step, saving.attempt)
    if spec.trackers:
        folder = Path(contract.tracker_dir)
        progress.follow = start_trackers(accelerator, spec, contract.job_id, folder, loop.step)
    try:
        stopped = loop.run()
    except Exception as problem:
        saving.let_finish()
        loop.leave_state(problem)
        raise
    if not stopped:
        step = loop.take_best()
        try:
            metrics, classes = loop.final_metrics()
        except Interrupted:
            loop.put_back()
            stopped = True
    if stopped:
        if loop.step > 0:
            loop.save(wait=True)
        if saving.saved(loop.step):
            saving.forget_copies()
        return ExitCode.STOPPED, loop.result(None, None)

    samples = continued(engine, tokenizer, corpus.test or corpus.validation, spec.train)
    progress.phase("export", loop.step, loop.steps, loop.consumed)
    outcome = Outcome(step, metrics, classes, tuple(samples), corpus.dropped, tuple(progress.curve))
    export(engine, tokenizer, spec, corpus.labels, outcome, record, Path(contract.output_dir))
    saving.conclude()
    saving.forget_copies()
    for tracker in accelerator.trackers:
        tracker.finish()
    progress.phase("done", loop.step, loop.steps, loop.consumed)
    return ExitCode.DONE, loop.result(metrics, contract.output_dir)


class Loop:
    """The steps of one attempt."""

    def __init__(
        self,
        contract: RunContract,
        spec: TrainSpec,
        engine: Engine,
        objective: Objective,
        corpus: Corpus,
        fingerprint: str,
        pad_token_id: int,
        progress: Progress,
        stop: StopWish,
        saving: Saving,
        found: Found,
        seen: SampleLog | None = None,
    ) -> None:
        self.plan, self.spec, self.optim, self.task = contract.plan, spec, spec.train, spec.model.task
        self.engine, self.objective, self.corpus, self.pad_token_id = engine, objective, corpus, pad_token_id
        self.progress, self.stop, self.found = progress, stop, found
        self.rank = engine.accelerator.process_index
        self.device = engine.accelerator.device
        sampler = sampler_for(corpus.train, self.optim)
        self.feed = Feed(
            corpus.train,
            sampler,
            self.plan,
            self.rank,
            pad_token_id,
            causal=self.task == "causal-lm",
            varlen=spec.data.packing and engine.module.config._attn_implementation == "flash_attention_2",
            ahead=self.plan.device == "cuda",
        )
        self.fingerprint, self.saving, self.seen = fingerprint, saving, seen
        early = self.optim.early_stopping
        self.early_stop = EarlyStop(early.metric, early.patience, early.min_delta) if early else None
        self.best = Best(engine, early.metric if early else "loss") if self.optim.keep_best else None
        self.class_weights = weights_of_classes(self.optim.class_weights, corpus.train, corpus.labels)
        # A host that waits for each step's loss leaves a GPU idle between steps. It is read a step later, unless the
        # loss decides whether the step is taken.
        self.tally = Tally(self.device, late=self.plan.device == "cuda" and self.optim.on_nonfinite == "stop")
        self.measured: tuple[int, dict[str, float]] | None = None  # the last evaluation, and of which step
        self.guard = Guard(self.optim.divergence)
        self.owes: Owed | None = None
        self.place: Place | None = None  # while a step is made: where it began
        self.torn = False  # while the optimizer changes weights
        self.last: dict[str, torch.Tensor] | None = None  # weights of the last step, while those of the best are there
        self.steps = self.optim.max_steps or sampler.steps_for(self.optim.epochs or 1)
        self.step = 0
        self.consumed = 0
        self.losses: list[float] = []
        self.first_step_at: float | None = None
        self.stopped_early = False
        self.skipped = self.skipped_in_a_row = 0
        check_accumulation(self.plan, self.optim.global_batch_size)

    def run(self) -> bool:
        """Train to the last step; True if the ranks agreed to stop before it."""
        held_out = self.corpus.validation or self.corpus.test
        check_held_out(self.optim, held_out)
        self.engine.module.train()
        self.progress.start_training(self.step, self.consumed)
        try:
            return Asking(self.engine, self.stop.wished).agreed() or self.takes_steps(held_out)
        except Interrupted:
            return True

    def takes_steps(self, held_out: Rows | None) -> bool:
        """As `run`. Raises Interrupted instead where that was in an evaluation."""
        if self.owes == "evaluation" and held_out is not None:
            self.look(held_out)
        while self.step < self.steps and self.owes is None:
            wishes = self.train_step()
            evaluates = held_out is not None and self.is_time_to_evaluate()
            saves, copies = self.saving.is_due(self.step), self.saving.copies_at(self.step)
            if self.guard.found is not None:
                go_back(self, self.guard.found)
                continue
            if any(wishes) or evaluates or saves or copies or self.step == self.steps:
                wishes = either(wishes, self.settle())
            if wishes.give_up:
                self.saving.finish()
            if wishes.stop and self.step < self.steps:
                self.owes = "evaluation" if evaluates else None
                return True
            if held_out is not None and evaluates:
                self.look(held_out)
            if (saves or wishes.save) and self.owes is None:
                self.save()
            if copies or wishes.copy:
                self.saving.copy(self.step, self.consumed, state_of(self), self.best)
        self.owes = "end"
        return False

    def look(self, held_out: Rows) -> None:
        """Evaluate after this step, which may be the last then."""
        self.owes = "evaluation"
        metrics = self.evaluated(held_out).metrics
        self.owes = None
        self.measured = (self.step, metrics)
        if self.best is not None:
            self.best.sees(metrics, self.step)
        if self.early_stop is not None and self.early_stop.sees(metrics):
            self.stopped_early, self.owes = True, "end"

    def is_time_to_evaluate(self) -> bool:
        """Also after the last step, whose weights may be the best."""
        every = self.optim.eval_every
        return every is not None and (self.step % every == 0 or (self.best is not None and self.step == self.steps))

    def take_best(self) -> int:
        """Give the model the weights to export, and return the step that they are of."""
        if self.best is None or self.best.state is None:
            return self.step
        self.saving.await_copy()
        self.last = self.engine.fragments()
        self.best.restore()
        return self.best.state.step

    def put_back(self) -> None:
        """Give the model the weights of the last step again, to go on from them."""
        if self.last is not None:
            self.engine.restore(self.last)

    def resume(self) -> None:
        """Begin the attempt: go on from the newest good checkpoint, if the job has one."""
        self.progress.phase("load")
        found = self.saving.resume(self.fingerprint, self.best)
        if found is None:
            return
        self.goes_on_from(*found)

    def goes_on_from(self, manifest: Manifest, state: LoopState) -> None:
        """The engine's state is that of this checkpoint: so is the loop's."""
        self.step, self.consumed = manifest.step, manifest.samples
        self.losses, self.skipped = list(state.losses), state.skipped
        self.owes = state.owes
        self.progress.curve[:] = state.curve
        self.guard.go_on(self.step, state.losses, state.left_out, state.rollbacks)
        self.measured = None
        if self.best is not None and state.best is None:
            self.best.forget()
        if self.early_stop is not None and state.early_stop is not None:
            self.early_stop.state = state.early_stop
            self.stopped_early = self.owes == "end" and self.early_stop.over
        if not self.saving.random_restored:
            # This rank's own random numbers are not known; the first ones again would repeat its masks.
            seed_all(self.optim.seed + self.step, self.rank)

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint of this step, if there is none; with `wait`, return when it is known what became of it."""
        self.progress.pulse.enter("save", self.step)
        metrics = self.measured[1] if self.measured is not None and self.measured[0] == self.step else None
        self.saving.save(self.step, self.consumed, state_of(self), metrics, self.best, wait=wait)

    def leave_state(self, problem: Exception) -> None:
        """Before this rank ends by `problem`: until the optimizer changes it, its state is that of the last step."""
        if not self.torn and not self.tally.late:
            self.saving.leave(problem, self.place or self.here(), state_of(self), self.best)

    def here(self) -> Place:
        return Place(self.step, self.consumed, len(self.losses), self.skipped, random_state.now())

    def train_step(self) -> Wishes:
        """One optimizer step on the next global batch; returns what the ranks have agreed on.

        They agree by the one small all-reduce that also carries the loss.
        """
        self.saving.tell()
        if self.guard.leaves_out(self.step + 1):
            return leave_out(self)
        self.place = self.here()
        self.enter("data", self.step + 1)
        batch = self.feed.chosen(self.consumed)
        rate = rate_at(self.optim, self.step, self.steps)
        terms = loss_terms(self.corpus.train, batch, self.task, self.class_weights)
        loss_sum = self.accumulate(terms)
        self.step += 1
        self.consumed += len(batch)
        due, copy = self.saving.is_due_by_time(), self.saving.copies_by_time()
        wishes = Wishes(self.stop.wished(), due, self.saving.has_failed(), copy)
        self.enter("exchange", self.step)
        own_s = self.progress.pulse.own_s if self.device.type == "cpu" else 0.0  # a GPU runs behind its host
        told = self.tally.tell(Step(self.step, self.consumed, rate, terms), loss_sum, wishes, own_s)
        self.enter("update", self.step)
        if self.tally.late:
            self.place = None
            self.engine.step(rate)
            return self.take(told) if told is not None else Wishes()
        assert told is not None
        if math.isfinite(told.loss):
            self.torn = True
            self.engine.step(rate)
        heard = self.take(told)
        self.place, self.torn = None, False
        return heard

    def take(self, told: Heard) -> Wishes:
        """Note what became of a step; returns what the ranks wished then."""
        step, loss, wishes, own_s = told
        self.progress.pace.see(own_s)
        if not math.isfinite(loss):
            self.skip(step, loss)
            return wishes
        self.skipped_in_a_row = 0
        self.losses.append(loss)
        self.guard.sees(step.number, loss)
        self.first_step_at = self.first_step_at or time.time()
        if step.number % self.optim.log_every == 0 or step.number == self.steps:
            self.progress.step(step.number, self.steps, step.consumed, loss, step.rate, peak_bytes(self.device))
        return wishes

    def settle(self) -> Wishes:
        """Take in what the ranks have told of a step and nobody has looked at yet."""
        told = self.tally.rest()
        return self.take(told) if told is not None else Wishes()

    def skip(self, step: Step, loss: float) -> None:
        """Leave the step out, if the job lets us: its rows are consumed and its learning rate has passed.

        Raises:
            SpecError: the job does not, or MAX_SKIPPED steps in a row were left out.
        """
        self.skipped_in_a_row += 1
        if self.optim.on_nonfinite == "stop" or self.skipped_in_a_row > MAX_SKIPPED:
            raise not_finite(loss, step.number, self.skipped_in_a_row - 1)
        self.engine.skip()
        self.guard.sees(step.number, loss)
        self.skipped += 1
        self.progress.skipped(step.number, self.steps, step.consumed, self.skipped)

    def accumulate(self, terms: float) -> torch.Tensor:
        """Gradient of the mean loss over the next global batch; returns the sum of this rank's losses."""
        micros = list(self.feed.step(self.consumed, self.device))
        if self.seen is not None:
            self.seen.write(self.step + 1, [int(row) for micro in micros for row in micro.rows])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            with self.engine.micro_step(last=last):
                self.enter("forward", self.step + 1)
                loss = self.summed_loss(micro.batch) * micro.weight
                self.enter("backward", self.step + 1)
                if last:
                    self.progress.pulse.waits()
                self.engine.backward(loss / terms)
            total += loss.detach()
        return total

    def enter(self, part: str, step: int) -> None:
        """Tell who looks from outside which part of a step begins."""
        self.progress.pulse.enter("step" if self.first_step_at else "first-step", step, part)

    def summed_loss(self, batch: Batch) -> torch.Tensor:
        return self.objective.summed(self.engine, batch)

    def evaluated(self, rows: Rows) -> Evaluation:
        size = self.optim.eval_batch_size or 2 * self.plan.micro_batch_size
        moves = partial(self.progress.pulse.enter, "evaluate", self.step)
        asked = self.stop.wished
        evaluation = evaluate(self.engine, self.objective, rows, self.task, size, self.pad_token_id, moves, asked)
        self.progress.evaluation(self.step, self.steps, self.consumed, evaluation.metrics)
        return evaluation

    def final_metrics(self) -> tuple[dict[str, float], ClassReport | None]:
        """Metrics of the finished model, and a classifier's by class: on the test part, else on the validation part."""
        final = self.corpus.test or self.corpus.validation
        if final is None:
            return {}, None
        metrics, predicted = self.evaluated(final)
        return metrics, class_report(final.classes, predicted, self.corpus.labels) if predicted is not None else None

    def result(self, metrics: dict[str, float] | None, output_dir: str | None) -> RankResult:
        return rank_result(self.engine, self.found, summary_of(self), metrics, output_dir)
