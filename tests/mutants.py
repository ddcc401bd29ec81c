"""`python -m tests.mutants`: launch with one deliberate mistake, named by the environment variable MUTANT.

Each is a mistake that a training program of this kind could have; a comparison that does not see it is worth nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch


def no_clip() -> None:
    import launch.engine

    configured = launch.engine.deepspeed_config
    launch.engine.deepspeed_config = lambda *arguments: {**configured(*arguments), "gradient_clipping": 0.0}


def no_weight_decay() -> None:
    import launch.engine

    grouped = launch.engine.weight_decay_groups
    launch.engine.weight_decay_groups = lambda model, _decay: grouped(model, 0.0)


def mean_of_means() -> None:
    """Each micro-batch counts the same, however many rows it has."""
    import launch.train

    def accumulate(loop: launch.train.Loop, _terms: float) -> torch.Tensor:
        micros = list(loop.feed.step(loop.consumed, loop.device))
        total = torch.zeros((), dtype=torch.float64)
        for i, micro in enumerate(micros):
            with loop.engine.micro_step(last=i == len(micros) - 1):
                logits = loop.engine(**micro.batch.inputs()).logits
                loss = torch.nn.functional.cross_entropy(logits, micro.batch.targets)
                loop.engine.backward(loss / len(micros) / loop.plan.world_size)
            total += micro.weight * loss.detach() * len(micro.batch.targets)
        return total

    launch.train.Loop.accumulate = accumulate


def no_averaging() -> None:
    """The ranks never exchange gradients: each trains on its own part."""
    import launch.engine

    @contextlib.contextmanager
    def alone(engine: launch.engine.PlainEngine, *, last: bool) -> Iterator[None]:  # noqa: ARG001
        with engine.accelerator.no_sync(engine._wrapped):
            yield

    launch.engine.PlainEngine.micro_step = alone


def nan_at_3() -> None:
    """Not a mistake but bad luck: rank 0's loss in step 3 is not a number; those of the other ranks are."""
    import launch.train

    losses = launch.train.Loop.summed_loss

    def unlucky(loop: launch.train.Loop, *arguments: Any) -> torch.Tensor:
        return losses(loop, *arguments) * (float("nan") if loop.step == 2 and loop.rank == 0 else 1.0)

    launch.train.Loop.summed_loss = unlucky


def nan_from_3() -> None:
    """Rank 0's loss is not a number from step 3 on."""
    import launch.train

    losses = launch.train.Loop.summed_loss

    def unlucky(loop: launch.train.Loop, *arguments: Any) -> torch.Tensor:
        return losses(loop, *arguments) * (float("nan") if loop.step >= 2 and loop.rank == 0 else 1.0)

    launch.train.Loop.summed_loss = unlucky


def bad_steps() -> None:
    """Not a mistake but bad data: in the steps BAD_STEPS, every rank's loss is BAD_FACTOR times what it would be."""
    import launch.train

    if "STOP_AT" in os.environ:
        stop_at()

    losses = launch.train.Loop.summed_loss
    steps, factor = {int(step) for step in os.environ["BAD_STEPS"].split(",")}, float(os.environ["BAD_FACTOR"])

    def unlucky(loop: launch.train.Loop, *arguments: Any) -> torch.Tensor:
        return losses(loop, *arguments) * (factor if loop.step + 1 in steps else 1.0)

    launch.train.Loop.summed_loss = unlucky


def crash_at_6() -> None:
    """Not a wrong training but a failing one."""
    import launch.train

    train_step = launch.train.Loop.train_step

    def failing(loop: launch.train.Loop) -> bool:
        if loop.step == 5:
            raise RuntimeError("crash-at-6")
        return train_step(loop)

    launch.train.Loop.train_step = failing


def late() -> None:
    """Not a mistake: losses are read a step later, as on a GPU; and batches are laid out ahead."""
    import launch.train

    tally, feed = launch.train.Tally, launch.train.Feed
    launch.train.Tally = lambda device, **_: tally(device, late=True)
    launch.train.Feed = lambda *arguments, **options: feed(*arguments, **{**options, "ahead": True})


def stop_at() -> None:
    """Not a mistake: rank 0 is asked to stop so that step STOP_AT is the last."""
    import launch.train

    train_step, last = launch.train.Loop.train_step, int(os.environ["STOP_AT"])

    def asked(loop: launch.train.Loop) -> launch.tally.Wishes:
        if loop.step + 1 == last and loop.rank == 0:
            loop.stop._signalled = True
        return train_step(loop)

    launch.train.Loop.train_step = asked


def stop_in_evaluation() -> None:
    """Not a mistake: rank 0 is asked to stop in the STOP_IN-th evaluation of the attempt."""
    import launch.train

    evaluated, wanted = launch.train.Loop.evaluated, int(os.environ["STOP_IN"])
    seen = []

    def asked(loop: launch.train.Loop, *arguments: Any) -> launch.metrics.Evaluation:
        seen.append(loop.step)
        if len(seen) == wanted and loop.rank == 0:
            loop.stop._signalled = True
        return evaluated(loop, *arguments)

    launch.train.Loop.evaluated = asked


def freeze_at() -> None:
    """Not a mistake: rank 0 is stopped by a signal at boundary FREEZE_AT of the second save."""
    import launch.checkpoint.checkpoints as module

    seen = []

    def frozen(boundary: str) -> None:
        if boundary == os.environ["FREEZE_AT"] and int(os.environ.get("RANK", "0")) == 0:
            seen.append(boundary)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGSTOP)

    module.passing = frozen


MUTANTS = {
    "bad-steps": bad_steps,
    "stop-at": stop_at,
    "stop-in-evaluation": stop_in_evaluation,
    "freeze-at": freeze_at,
    "late": late,
    "crash-at-6": crash_at_6,
    "nan-at-3": nan_at_3,
    "nan-from-3": nan_from_3,
    "no-clip": no_clip,
    "no-weight-decay": no_weight_decay,
    "mean-of-means": mean_of_means,
    "no-averaging": no_averaging,
}

if __name__ == "__main__":
    MUTANTS[os.environ["MUTANT"]]()
    from launch.__main__ import main

    main()
