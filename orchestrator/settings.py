"""Settings of a yard, from `TUNEYARD_*` environment variables. Flags of the CLI win over them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.errors import SettingsError

PREFIX = "TUNEYARD_"


class Settings(BaseSettings):
    """Where a yard keeps its things, and how patient it is. All durations are seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", use_attribute_docstrings=True)

    home: Path = Path("~/.tuneyard")
    """Directory of the yard's state: database, runs, models, logs."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL (it may hold a password); unset means SQLite in `home`."""
    host: str = "127.0.0.1"
    """Address the API listens on. Every request needs the token, on loopback too."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the API; 0 takes a free one."""
    token: SecretStr | None = None
    """The API's token; unset makes one and keeps it in `home`, readable by its owner alone."""
    metrics_token: SecretStr | None = Field(None, min_length=16)
    """A token that is good for GET /metrics alone, for a monitoring system; the API's is, too."""
    redis: str | None = Field(None, pattern=r"^[^\s/]+:\d+$")
    """host:port of a Redis, for a yard on this machine: Ray's head can then be killed and started again while trainings
    go on. Unset, a new head makes the cluster anew, and jobs go on from their checkpoints."""
    cpu_slots: int | None = Field(None, ge=1)
    """Ranks that one node without GPUs takes at a time; unset means its cores, and at least 4."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory that ranks on this machine may have together, in 10^9 bytes; unset means nine tenths of it, or what
    the cgroup around the yard allows."""
    standbys: int = Field(1, ge=0)
    """Processes that each node keeps with their imports done, so that an attempt starts seconds sooner. Each holds some
    hundred megabytes (`tuneyard nodes` shows it); 0 keeps none."""
    tick: float = Field(0.25, gt=0)
    """Time between two looks of the controller at the world."""
    leash: float = Field(30.0, gt=0)
    """A rank ends itself when its node agent has been silent for so long."""
    leash_margin: float = Field(5.0, ge=0)
    """Added to the leash before a lost attempt is taken for ended."""
    lease: float = Field(10.0, gt=0)
    """A controller that has not renewed its lease for so long can be replaced."""
    stop_grace: float = Field(60.0, ge=0)
    """Time a cancelled job has to reach a step boundary before its processes are ended."""
    pause_grace: float = Field(600.0, ge=0)
    """Time a paused job has to save before its processes are ended: a slow store must be able to take it all."""

    fleet: str | None = Field(None, pattern=r"^[a-z0-9-]{1,63}/[a-z0-9-]{1,63}$")
    """NAMESPACE/NAME of the RayCluster that the yard runs on, which it is to let grow and shrink; unset leaves it as it
    is. Bounds are minReplicas and maxReplicas of its worker groups."""
    fleet_idle: float = Field(300.0, gt=0)
    """How long a node of it must have been idle before it is given back."""
    rules: dict[str, bool | float] = {}
    """How the queue is ordered, and who is stopped for whom: JSON of what is to be otherwise, as {"min_run_s": 60}."""
    outside: dict[str, dict[str, dict[str, Any]]] = {}
    """What systems that queue jobs themselves are told beside a job, by system and queue, * for every queue: JSON as
    {"slurm": {"*": {"partition": "gpu"}, "research": {"account": "lab-7"}}}; `--with` wins over it."""
    k8s_patience: float = Field(150.0, gt=0)
    """How long `submit --to k8s` and its sisters wait for an API server that does not answer."""
    prices: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """What an hour of a slot costs, by its kind: JSON as {"H100": 2.5, "cpu": 0.04}. What holds a slot without a price
    has no cost."""
    currency: str | None = None
    """The name of the money that prices are in."""

    def __init__(self, **values: Any) -> None:
        """Raises SettingsError: a variable has a value that it cannot have."""
        try:
            super().__init__(**values)
        except ValidationError as problem:
            # The input is left out: it may be a secret.
            first = problem.errors(include_input=False)[0]
            name = PREFIX + str(first["loc"][0]).upper()
            raise SettingsError(
                f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", field=name, hint=f"set {name} to another value"
            ) from None

    @property
    def root(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().resolve()

    @property
    def url(self) -> str:
        """The database's SQLAlchemy URL, password and all: never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.root / 'yard.db'}"
