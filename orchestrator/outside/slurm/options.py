"""What Slurm alone is told of a job: by TUNEYARD_OUTSIDE for a queue, by `--with` for one job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from launch.errors import Refused
from launch.section import Names, Section
from orchestrator.job.fields import Duration

WORD = r"^[A-Za-z0-9][A-Za-z0-9_.:,@%+=/-]*$"
Word = Annotated[str, Field(pattern=WORD)]


class SlurmOptions(Section):
    """Left out, a key is what Slurm's own configuration says of it."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: str | None = Field(None, pattern=r"^[^\s\"'`$\\]+$")
    """Features that nodes must have, as sbatch's --constraint takes them."""
    dependency: Word | None = None
    """Such as afterok:1234."""
    nodes: Annotated[int, Field(ge=1, le=4096)] | None = None
    """How many nodes the processes are spread over; null for as few as hold them."""
    time: Duration | None = None
    """Limit of one run: then it saves, is requeued and goes on. null: max_duration, else the partition's limit."""
    warning: Duration | None = None
    """How long before that limit it begins to save and end; null for TUNEYARD_PAUSE_GRACE, and at most a quarter of
    the limit."""
    cpus: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPUs of a process; null for its GPU's share of the node's, and one where there is no GPU."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Host memory of each node, in 10^9 bytes; null for twice what the plan needs, where that is known."""
    exclusive: bool = False
    """Whether it shares its nodes with no other job."""
    directory: str | None = None
    """An absolute directory that all nodes see, for runs, checkpoints and models; null for TUNEYARD_HOME."""
    python: str | None = None
    """The Python on the nodes that has Tuneyard installed; null for the one that runs this command."""
    setup: Names = ()
    """Lines of shell before the start on the first node, such as `module load cuda`; the others inherit from it."""
    sbatch: Names = ()
    """More of sbatch's options, each as `--name=value`."""

    @field_validator("setup", "sbatch")
    @classmethod
    def _one_line_each(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for index, line in enumerate(lines):
            if not line.strip() or not line.isprintable():
                raise Refused("a line of text is wanted", at=(index,), hint="write one line each, in a list")
        return lines

    @field_validator("sbatch")
    @classmethod
    def _are_options(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for index, line in enumerate(lines):
            if not line.startswith("-"):
                raise Refused(f"`{line}` is no option of sbatch", at=(index,), hint="such as --mail-type=END")
        return lines

    @field_validator("directory", "python")
    @classmethod
    def _is_absolute(cls, path: str | None) -> str | None:
        if path is not None and (not path.startswith("/") or not path.isprintable()):
            raise Refused(f"`{path}` is not an absolute path", hint="begin with /, as every node sees it")
        return path
