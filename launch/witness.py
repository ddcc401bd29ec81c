"""What ranks know of their own run: the record that the model directory gets, and whether the data are as pinned."""

from __future__ import annotations

import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from launch.config import ModelSpec
from launch.contract import RunContract
from launch.data import Corpus, Rows
from launch.engine import Engine
from launch.errors import DataError
from launch.provenance import BaseWeights, NodeUse, RunRecord, base_files, surroundings
from launch.vocabulary import mark_of

PARTS = ("train", "validation", "test")


def fingerprints(corpus: Corpus) -> dict[str, str]:
    """Of each part that the job has."""
    parts = {part: getattr(corpus, part) for part in PARTS}
    return {part: rows.fingerprint() for part, rows in parts.items() if rows is not None}


def check_data(contract: RunContract, corpus: Corpus) -> None:
    """Before a step is taken, see that a repeated run reads what the first one read.

    Raises:
        DataError: a part has other rows, the same rows in another order, or other tokens for the same text.
    """
    spec, pinned = contract.spec, contract.origin.pinned
    if spec is None or pinned is None:
        return
    found = fingerprints(corpus)
    for part in PARTS:
        if found.get(part) != pinned.data.get(part):
            raise DataError(
                f"the {part} data are not those of the run that is to be reproduced",
                code="data-changed",
                field=f"data.{part}" if getattr(spec.data, part) else "data.train",  # a part may be cut from that
                hint="put back the files as they were, with the tokenizer and the chat template: "
                "one row more, less or moved is another training",
            )


def begin_record(
    contract: RunContract, engine: Engine, corpus: Corpus, resumed_at: int, attempt: int
) -> Future[RunRecord] | None:
    """The record of this run, on rank 0; None elsewhere. All ranks call it, before the first step.

    The weights that it begins with are hashed while it trains: large ones take a while, and later they may be others.
    """
    ranks = gathered(engine, (torch.get_num_threads(), gpu_name(engine.accelerator.device)))
    if not engine.accelerator.is_main_process:
        return None
    spec = contract.spec
    assert spec is not None
    commit = getattr(engine.module.config, "_commit_hash", None)

    def record() -> RunRecord:
        return RunRecord(
            job=contract.job_id,
            spec=spec,
            seed=spec.train.seed,
            plan=contract.plan,
            nodes=tuple(
                NodeUse(processes=node.processes, threads=node.threads, gpus=len(node.gpus)) for node in contract.nodes
            ),
            threads=tuple(threads for threads, _ in ranks),
            env=tuple(sorted({*contract.env, *contract.env_from})),
            data=fingerprints(corpus),
            base=base_weights(spec.model, commit),
            job_file=contract.origin.git,
            surroundings=surroundings().model_copy(
                update={
                    "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                    "gpus": tuple(name for _, name in ranks if name is not None),
                }
            ),
            attempts=attempt,
            resumed_at=resumed_at,
            command=shlex.join(["tuneyard", "reproduce", contract.output_dir]),
        )

    background = ThreadPoolExecutor(1, thread_name_prefix="record")
    future = background.submit(record)
    background.shutdown(wait=False)
    return future


def base_weights(model: ModelSpec, commit: str | None) -> BaseWeights:
    """Which weights `model` names now."""
    directory = Path(model.name_or_path)
    if not directory.is_dir():
        return BaseWeights(commit=commit)
    try:
        return BaseWeights(files=base_files(directory))
    except OSError as problem:  # they have been loaded, so a training is not lost for want of their hash
        print(f"the base model's files are not recorded: {problem}")
        return BaseWeights()


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def gathered(engine: Engine, mine: tuple[int, str | None]) -> list[tuple[int, str | None]]:
    """Threads and GPU of every rank, by rank."""
    if engine.accelerator.num_processes == 1:
        return [mine]
    everyones: list[tuple[int, str | None]] = [mine] * engine.accelerator.num_processes
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


def agreed_fingerprint(engine: Engine, rows: Rows) -> str:
    """The training data's fingerprint, once all ranks have been seen to have the same. Where a part of the vocabulary
    is trained, it is of that, too: with other held-out data the same weights are of other tokens.

    Raises:
        DataError: a rank read something else, for example another copy of a file on its node.
    """
    fingerprint = rows.fingerprint() + mark_of(engine.module)
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
