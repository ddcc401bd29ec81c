"""`strategy: auto`: the fastest plan that fits. Pure.

Searched are strategy, offload, activation checkpointing, loss mode and micro-batch, at the job's own global batch: none
of them changes what is trained. What the job file says of them stays as it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from launch.config import WHOLE_WEIGHTS, LossMode, Offload, Precision
from launch.contract import Allocator, EngineName, ExecutionPlan
from launch.footprint_record import Footprint
from launch.shape import ModelShape
from orchestrator.cluster.spec import NodeKind
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.estimate import Predicted, Side, predict
from orchestrator.memory.margin import COLD, NONE, Margin, cold
from orchestrator.memory.plan import MAX_MICRO_BATCH
from orchestrator.memory.speed import StepTime, Work, step_time, work_of

CPU_FAST = 2.0
"""What malloc is taken to hold, where it keeps what is freed, of what comes and goes and has been in use at once. (Of a
GPU's allocator the estimate itself tells.)"""
ZERO_MUST_SAVE = 1.25
"""ZeRO is taken where plain training fits only if it is this much faster: there is more that can go wrong, and with
bf16 it rounds the weights themselves."""
ALTERNATIVES = 4
ORDER: tuple[EngineName, ...] = ("single", "ddp", "zero1", "zero2", "zero3")

Predict = Callable[[Footprint, ExecutionPlan, bool, int], Predicted]
"""What a rank will hold; last, whether with a copy of the state for checkpoints, and how many ranks share a host."""


STAYS = frozenset(
    {
        "weights",
        "optimizer",
        "gradients",
        "buckets",
        "context",
        "process",
        "code",
        "settled",
        "checkpoint_buffer",
        "best_weights",
        "exchange",
    }
)
"""Lines of a breakdown that are known exactly; everything else comes and goes."""


@dataclass(frozen=True)
class Room:
    """What one rank may use, in bytes. On a CPU it is one memory, the host's."""

    device: int
    host: int


@dataclass(frozen=True)
class Candidate:
    """A plan, what it needs and how long its step would take."""

    plan: ExecutionPlan
    kind: NodeKind
    predicted: Predicted
    needed: Room
    """With the margin."""
    room: Room
    seconds: StepTime

    @property
    def fits(self) -> bool:
        return self.needed.device <= self.room.device and self.needed.host <= self.room.host

    @property
    def margin_bytes(self) -> int:
        """Of all that is needed, what is margin: on a CPU for the one memory, else for the GPU's."""
        device, host = self.predicted.device.peak_bytes, self.predicted.host.peak_bytes
        return self.needed.device - device - (host if self.plan.device == "cpu" else 0)

    @property
    def bare(self) -> int:
        """What a process is expected to hold, without any margin: on a CPU of everything, else of its GPU, without what
        torch does not count."""
        if self.plan.device == "cpu":
            return needed(self.predicted, self.plan, NONE, whole_code=True).host
        device = self.predicted.device
        return device.peak_bytes - sum(device.breakdown.get(item, 0) for item in ("context", "allocator"))

    @property
    def cold_margin(self) -> int:
        """The margin before anything was learned."""
        with_it, without = (needed(self.predicted, self.plan, margin) for margin in (COLD, NONE))
        return with_it.device - without.device

    @property
    def rank(self) -> tuple[float, ...]:
        """Less is better: the step's time, ZeRO's a quarter more, and of equals the plainest."""
        plan = self.plan
        return (
            self.seconds.total * (ZERO_MUST_SAVE if plan.zero_stage else 1.0),
            ORDER.index(plan.engine),
            plan.activation_checkpointing,
            plan.loss == "whole",
            plan.allocator == "tight",
            -plan.micro_batch_size,
        )

    @property
    def excess(self) -> float:
        """Above 1, by which factor it does not fit."""
        pairs = ((self.needed.device, self.room.device), (self.needed.host, self.room.host))
        return max(needed / max(1, room) for needed, room in pairs)


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen; if nothing fits, the one that misses by least."""

    best: Candidate
    others: tuple[Candidate, ...]
    """The next best, each of another strategy, offload, checkpointing, number of ranks or kind of node."""
    margin: Margin
    reason: str

    @property
    def fits(self) -> bool:
        return self.best.fits


def search(
    job: TrainingJob,
    shape: ModelShape | None,
    footprint: Footprint,
    kinds: Sequence[NodeKind],
    margin: Margin | None = None,
    predict: Predict | None = None,
    margin_of: Callable[[ExecutionPlan], Margin] | None = None,
) -> Choice | None:
    """The best plan of `job` on `kinds`; None where no kind of node takes so many processes of such a job.

    With one `margin` for all plans, or one that `margin_of` tells of each; else with that before anything was learned.
    """
    predict = predict or predict_of(job)

    def wanted(plan: ExecutionPlan) -> Margin:
        if margin is not None:
            return margin
        return margin_of(plan) if margin_of is not None else cold(footprint, plan)

    work = work_of(shape, job, footprint)
    found = list(candidates(job, work, footprint, kinds, wanted, predict))
    if not found:
        return None
    fitting = sorted((one for one in found if one.fits), key=lambda one: one.rank)
    missing = sorted((one for one in found if not one.fits), key=lambda one: one.excess)
    best = (fitting or missing)[0]
    others = _next_best(best, [*fitting, *missing])
    return Choice(best, others, wanted(best.plan), _reason(job, best, fitting, missing))


def candidates(
    job: TrainingJob,
    work: Work,
    footprint: Footprint,
    kinds: Sequence[NodeKind],
    margin_of: Callable[[ExecutionPlan], Margin],
    predict: Predict,
) -> Iterator[Candidate]:
    """Every plan that is open, each with the largest micro-batch that fits, on every kind and number of ranks. The
    kinds have one device; what the job starts on may be any of them, so one precision is for all."""
    takers = [kind for kind in kinds if kind.takes(job.resources.accelerator)]
    precision = job.train.precision_on(bf16=all(kind.bf16 for kind in takers))
    for kind, world in placements(job, kinds):
        for frame in frames(job, world, kind, precision):
            if footprint.of(frame) is None:  # a trace leaves out what the job file rules out
                continue
            margin = margin_of(frame)
            plan, told_of = _largest(job, footprint, frame, kind, margin, predict)
            seconds = step_time(work, job, footprint, plan, kind)
            yield Candidate(plan, kind, told_of, needed(told_of, plan, margin), room_of(kind, world), seconds)


def predict_of(job: TrainingJob) -> Predict:
    """What a rank of `job` will hold, with what the job file has it keep in host memory."""

    def told_of(footprint: Footprint, plan: ExecutionPlan, buffer: bool, local: int) -> Predicted:
        return predict(
            footprint,
            plan,
            rows=-(-job.train.global_batch_size // plan.world_size),
            save_buffer=buffer,
            keep_best=job.train.keep_best,
            adapter_alone=job.adapter is not None and not job.adapter.merge,
            memory_copies=job.checkpoint.memory_every_steps is not None,
            local=local,
        )

    return told_of


def placements(job: TrainingJob, kinds: Iterable[NodeKind]) -> Iterator[tuple[NodeKind, int]]:
    """Kinds of nodes and numbers of ranks that the job may have: its bounds, and the powers of two between them."""
    low, high = job.resources.bounds
    sizes = {low, high, *range(low, min(high, low + 8)), *(1 << power for power in range(17))}
    for kind in kinds:
        if kind.takes(job.resources.accelerator) and not (kind.gpu is None and job.train.precision == "fp16"):
            most = min(high, kind.most)
            for world in sorted(size for size in sizes | {most} if low <= size <= most):
                yield kind, world


def frames(job: TrainingJob, world: int, kind: NodeKind, precision: Precision) -> Iterator[ExecutionPlan]:
    """Every plan that the job file leaves open, with the largest micro-batch."""
    rows = -(-job.train.global_batch_size // world)
    micro = min(job.train.micro_batch_size or MAX_MICRO_BATCH, rows)
    checkpointing = job.train.activation_checkpointing
    losses: tuple[LossMode, ...] = (job.train.loss_mode,) if job.train.loss_mode else ("chunked", "whole")
    if job.model.task != "causal-lm":
        losses = losses[:1]
    for engine, offload in engines(job, world, kind):
        for recompute in (False, True) if checkpointing is None else (checkpointing,):
            for loss in losses:
                for allocator in cast(tuple[Allocator, ...], ("fast", "tight")):
                    yield ExecutionPlan(
                        engine=engine,
                        world_size=world,
                        device=kind.device,
                        micro_batch_size=micro,
                        gradient_accumulation_steps=-(-rows // micro),
                        precision=precision,
                        offload=offload,
                        offload_path=job.offload_path if offload != "none" else None,
                        activation_checkpointing=recompute,
                        loss=loss,
                        allocator=allocator,
                    )


def engines(job: TrainingJob, world: int, kind: NodeKind) -> Iterator[tuple[EngineName, Offload]]:
    """Strategies with what each may keep in host memory. One rank has nothing to share, and ZeRO only to offload."""
    if job.strategy == "auto":
        plain: EngineName = "single" if world == 1 else "ddp"
        names = [plain] if job.train.optimizer in WHOLE_WEIGHTS else [plain, *ORDER[2:]]
    elif job.strategy in ("single", "ddp"):
        names = ["single" if world == 1 else "ddp"]
    else:
        names = [job.strategy]
    for name in names:
        zero = name.startswith("zero")
        offloads: tuple[Offload, ...] = ("none",)
        if zero and job.offload is not None:
            offloads = (job.offload,)
        elif zero and kind.gpu is not None:
            offloads = ("none", "optimizer", "all")
        elif not zero and job.offload not in (None, "none"):
            offloads = ()
        for offload in offloads:
            idle = zero and world == 1 and offload == "none" and job.strategy == "auto"
            on_disk = job.offload_path is not None and offload != "none"
            if not idle and (name == "zero3" or (offload != "all" and not on_disk)):
                yield name, offload


def room_of(kind: NodeKind, world: int) -> Room:
    """What a rank may use where as many ranks as possible share a node."""
    host = kind.memory_bytes // kind.local(world)
    return Room(kind.gpu_memory_bytes, host) if kind.gpu is not None else Room(host, host)


def needed(predicted: Predicted, plan: ExecutionPlan, margin: Margin, *, whole_code: bool = False) -> Room:
    """What `predicted` comes to with the margin, and with what the allocator holds.

    Code is left out, unless it is to be `whole_code`: its pages are of files, so that processes share them, and the
    kernel drops those that are not in use before it kills anybody.
    """
    held = CPU_FAST if plan.device == "cpu" and plan.allocator == "fast" else 1.0
    host, device = _with_margin(predicted.host, margin, 1.0), _with_margin(predicted.device, margin, held)
    if not whole_code:
        host -= int(predicted.host.breakdown.get("code", 0) * (1 + margin.static))
    return Room(device, host) if plan.device == "cuda" else Room(device + host, device + host)


def _with_margin(side: Side, margin: Margin, held: float) -> int:
    stays = sum(count for name, count in side.breakdown.items() if name in STAYS)
    comes = max(0, side.peak_bytes - stays) * held
    return int(stays * (1 + margin.static) + comes * (1 + margin.dynamic))


def _largest(
    job: TrainingJob,
    footprint: Footprint,
    frame: ExecutionPlan,
    kind: NodeKind,
    margin: Margin,
    predict: Predict,
) -> tuple[ExecutionPlan, Predicted]:
    """`frame` with the largest micro-batch that fits, up to its own; with one row a pass if none does."""
    rows = -(-job.train.global_batch_size // frame.world_size)
    room = room_of(kind, frame.world_size)

    def at(micro: int) -> tuple[ExecutionPlan, Predicted, bool]:
        changes = {"micro_batch_size": micro, "gradient_accumulation_steps": -(-rows // micro)}
        plan = frame.model_copy(update=changes)
        # Beside a GPU the copy is only made where the host has room for it; otherwise saves take longer.
        for buffer in dict.fromkeys(
            (job.checkpoint.asynchronous, job.checkpoint.asynchronous and plan.device == "cpu")
        ):
            told_of = predict(footprint, plan, buffer, kind.local(plan.world_size))
            needs = needed(told_of, plan, margin)
            fits = needs.device <= room.device and needs.host <= room.host
            if fits:
                break
        return plan, told_of, fits

    plan, told_of, fits = at(frame.micro_batch_size)
    if fits or job.train.micro_batch_size is not None:
        return plan, told_of
    # Of one number of passes, the smallest micro-batch splits the rows evenly and holds least; a larger one of fewer
    # passes may hold less than a smaller one of more. Only within a number of passes is memory monotone.
    high = frame.micro_batch_size
    while high > 1:
        passes = -(-rows // (high - 1))
        low = -(-rows // passes)
        if at(low)[2]:
            while high - low > 1:  # low fits; high does not
                middle = (low + high) // 2
                low, high = (middle, high) if at(middle)[2] else (low, middle)
            return at(low)[:2]
        high = low
    return at(1)[:2]


def _next_best(best: Candidate, ordered: Iterable[Candidate]) -> tuple[Candidate, ...]:
    def way(one: Candidate) -> tuple[object, ...]:
        plan = one.plan
        return plan.engine, plan.offload, plan.activation_checkpointing, plan.world_size, one.kind.name

    seen, others = {way(best)}, []
    for one in ordered:
        if way(one) not in seen:
            seen.add(way(one))
            others.append(one)
    return tuple(others[:ALTERNATIVES])


def why_not(one: Candidate, best: Candidate) -> str:
    """Why `one` was not taken: `a step takes 12 % longer`."""
    if not one.fits:
        return f"does not fit: {missing(one)}"
    more = one.seconds.total / best.seconds.total - 1
    if more >= 0.005:
        return f"a step takes {more:.0%} longer"
    if one.plan.zero_stage and not best.plan.zero_stage:
        return "not faster by enough to be worth the sharding"
    return "as fast, and less plain"


def missing(one: Candidate) -> str:
    """`needs 91.2 GiB of 79.1 GiB on the GPU`."""
    where = (
        "of host memory a process" if one.plan.device == "cpu" or one.needed.device <= one.room.device else "on the GPU"
    )
    short = one.needed.device > one.room.device
    needs, has = (one.needed.device, one.room.device) if short else (one.needed.host, one.room.host)
    return f"needs {needs / 2**30:.1f} GiB, and there are {has / 2**30:.1f} GiB {where}"


def _reason(job: TrainingJob, best: Candidate, fitting: Sequence[Candidate], missing_: Sequence[Candidate]) -> str:
    if not best.fits:
        return f"nothing fits; what misses by least ({told(best.plan)}) {missing(best)}"
    plain = [one for one in (*fitting, *missing_) if not one.plan.zero_stage]
    if job.strategy != "auto" or not best.plan.zero_stage:
        return f"the fastest of {len(fitting)} plans that fit, of {len(fitting) + len(missing_)}"
    if plain and not any(one.fits for one in plain):
        least = min(plain, key=lambda one: one.excess)
        return f"the fastest that fits; without sharding it {missing(least)}"
    return "the fastest that fits, by more than sharding costs"


def told(plan: ExecutionPlan) -> str:
    """A plan in a few words."""
    words = [f"{plan.engine} on {plan.world_size}", f"micro-batch {plan.micro_batch_size}"]
    words += ["activation checkpointing"] * plan.activation_checkpointing
    words += [f"offload {plan.offload}"] * (plan.offload != "none") + ["whole logits"] * (plan.loss == "whole")
    return ", ".join(words)
