"""What only a simulation can run into."""

from __future__ import annotations

from orchestrator.errors import TuneyardError


class UnsettledError(TuneyardError):
    """A policy that, asked again and again at one instant, always wants something else."""

    code = "unsettled"


class StuckError(TuneyardError):
    """Jobs wait on an idle cluster, and nothing is going to happen."""

    code = "stuck"
