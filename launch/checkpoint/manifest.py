"""What is written beside the bytes of a checkpoint: manifest, commit marker, claim. Torch-free.

A store of checkpoints, which all attempts of a job share, holds

    step-N.attempt-A/rank-R.safetensors   what rank R owned, as safetensors
    step-N.attempt-A/MANIFEST.json        everything else, and the hashes of the shards
    step-N.attempt-A/COMMITTED            created last and exclusively: names the manifest by its hash
    step-N.attempt-A/QUARANTINED.json     why it is never loaded again
    step-N.attempt-A/PINNED               never deleted by retention
    claims/attempt-A.begun                attempt A has begun: lower attempts change nothing any more
    claims/attempt-A.json                 which checkpoint it starts from
    assets/HASH/...                       what an export needs beside the weights: configuration, tokenizer

Nothing is renamed and nothing is written twice, so an object store gives the same guarantees as a file system.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import xxhash
from pydantic import ValidationError

from launch.contract import ExecutionPlan, Record
from launch.errors import TuneyardError

FORMAT = 1
BLOCK = 4 << 20
"""Bytes hashed together: a range of a shard is checked by reading the blocks that it lies in."""

MANIFEST = "MANIFEST.json"
COMMITTED = "COMMITTED"
QUARANTINED = "QUARANTINED.json"
PINNED = "PINNED"

_ID = re.compile(r"step-(\d+)\.attempt-(\d+)")


class CheckpointError(TuneyardError):
    """A checkpoint cannot be written, found or read; `code` says what is the matter."""

    code = "checkpoint-failed"


class Damaged(CheckpointError):
    """The bytes are not those that were committed."""

    code = "checkpoint-damaged"


class Unusable(CheckpointError):
    """What there is cannot be gone on from, however often one tries."""

    code = "checkpoint-unusable"


class Superseded(CheckpointError):
    """A higher attempt has begun: what this one still does would count for nothing."""

    code = "attempt-superseded"


class CheckpointId(NamedTuple):
    """Ordered by step, then attempt; its text is the name of its directory."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{self.step}.attempt-{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> CheckpointId | None:
        """None if `text` is no such name, written as __str__ writes it."""
        match = _ID.fullmatch(text)
        found = cls(int(match[1]), int(match[2])) if match else None
        return found if str(found) == text else None


class LogicalTensor(Record):
    """A tensor as the training knows it, however it was divided."""

    dtype: str
    """torch's name without the module: float32, bfloat16, int64, uint8, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Fragment(Record):
    """Elements [start, start + length) of a flattened logical tensor, and where they lie in a shard."""

    name: str
    start: int
    length: int
    offset: int
    """Bytes from the beginning of the file."""


class Shard(Record):
    """One rank's file."""

    file: str
    size: int
    """Bytes."""
    blocks: tuple[str, ...]
    """Hash of every BLOCK bytes; the last block may be shorter."""
    fragments: tuple[Fragment, ...]


class Manifest(Record):
    """A checkpoint, whole; what it says of the loop is the loop's own."""

    format: int = FORMAT
    id: str
    step: int
    attempt: int
    parent: str | None
    """The checkpoint before it in the run, of this attempt or the one it started from."""
    created: float
    """Unix time."""
    job: str
    plan: ExecutionPlan
    samples: int
    """Consumed by all ranks together; the order of the data is a pure function of it."""
    scalars: dict[str, float]
    """Single numbers of the engine: steps that the optimizer has taken, the loss scale."""
    metrics: dict[str, float] | None = None
    """Of an evaluation at this very step."""
    loop: dict[str, Any] = {}
    assets: str | None = None
    tensors: dict[str, LogicalTensor]
    shards: tuple[Shard, ...]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


class Commit(Record):
    """The content of COMMITTED."""

    manifest: str
    """Hash of the bytes of MANIFEST.json."""


class Claim(Record):
    """What an attempt starts from; immutable."""

    attempt: int
    starts_from: str | None


class SealedClaim(Record):
    """The content of claims/attempt-A.json: a flipped bit in a bare claim would name another checkpoint, or none."""

    claim: Claim
    hash: str
    """Of the claim's JSON."""


class Quarantine(Record):
    """Why a checkpoint is not loaded any more."""

    reason: str
    by_attempt: int
    at: float


def hash_of(data: bytes | memoryview) -> str:
    """XXH3, 64 bits: finds what storage does to bytes, not what an adversary does."""
    return xxhash.xxh3_64_hexdigest(data)


def block_range(index: int, size: int) -> tuple[int, int]:
    """First byte of block `index` of a file of `size` bytes, and the byte after its last."""
    return index * BLOCK, min((index + 1) * BLOCK, size)


def sealed(claim: Claim) -> bytes:
    """What is stored of `claim`."""
    return SealedClaim(claim=claim, hash=hash_of(claim.model_dump_json().encode())).model_dump_json().encode()


def read_claim(attempt: int, data: bytes) -> Claim:
    """The claim of `attempt` in what `sealed` gave.

    Raises:
        Damaged: it is torn or changed, or another attempt's.
    """
    try:
        found = SealedClaim.model_validate_json(data)
    except ValidationError as problem:
        raise Damaged("is torn") from problem
    if found.claim.attempt != attempt or found.hash != hash_of(found.claim.model_dump_json().encode()):
        raise Damaged("is not what was claimed")
    return found.claim


def read_commit(name: str, marker: bytes, manifest: bytes) -> Manifest:
    """The manifest of the checkpoint in directory `name`, once it is what the marker says.

    Raises:
        Damaged: either is torn or of something else.
    """
    try:
        commit = Commit.model_validate_json(marker)
    except ValidationError as problem:
        raise Damaged(f"{name}/{COMMITTED} is not a commit marker: it is torn") from problem
    if hash_of(manifest) != commit.manifest:
        raise Damaged(
            f"{name}/{MANIFEST} is not the manifest that was committed: its hash differs from what {COMMITTED} says"
        )
    try:
        found = Manifest.model_validate_json(manifest)
    except ValidationError as problem:
        raise Damaged(f"{name}/{MANIFEST} cannot be read: {problem.errors()[0]['msg']}") from problem
    if found.format > FORMAT:
        raise CheckpointError(
            f"{name} is of format {found.format}, and this version of tuneyard reads up to {FORMAT}",
            code="checkpoint-too-new",
            hint="load it with the version that wrote it, or a newer one",
        )
    if found.id != name:
        raise Damaged(f"{name} holds the checkpoint {found.id}: a directory was renamed or swapped")
    return found
