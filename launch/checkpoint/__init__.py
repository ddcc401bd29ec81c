"""Checkpoints that are never torn and load anywhere. For a training script of one's own:

    from launch.checkpoint import checkpoints_of

    checkpoints = checkpoints_of(accelerator, model, optimizer)
    step = checkpoints.resume_step()
    ...
    checkpoints.save(step)

The manifest, which the orchestrator reads, is torch-free; so what needs torch is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.checkpoint.script import checkpoints_of as checkpoints_of

__all__ = ["checkpoints_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from launch.checkpoint import script

        return getattr(script, name)
    raise AttributeError(name)
