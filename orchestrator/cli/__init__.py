"""The command `tuneyard`: one file per verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys

from orchestrator.cli.app import app
from orchestrator.cli.output import show_error
from orchestrator.errors import TuneyardError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; exit statuses are those of `orchestrator.cli.status`."""
    try:
        app()
    except TuneyardError as problem:
        sys.exit(show_error(problem, as_json="json" in sys.argv))
