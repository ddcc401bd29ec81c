"""Opens a system by its name; nothing of the others is imported."""

from __future__ import annotations

from orchestrator.outside.protocol import Outside, System
from orchestrator.settings import Settings


def open_system(system: System, settings: Settings) -> Outside:
    """The system as this home knows it. Whether it answers is found out when it is asked."""
    match system:
        case System.SLURM:
            from orchestrator.outside.slurm.system import Slurm

            return Slurm(settings)
        case System.KUBERNETES:
            from orchestrator.outside.k8s.system import Kubernetes

            return Kubernetes(settings)
