"""The command `tuneyard`: one file per verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys

from orchestrator.cli.app import app
from orchestrator.cli.output import print_json, show_error
from orchestrator.cli.status import BAD_INPUT, INTERRUPTED
from orchestrator.errors import TuneyardError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; exit statuses are those of `orchestrator.cli.status`."""
    as_json = wants_json(sys.argv[1:])
    try:
        app()
    except TuneyardError as problem:
        sys.exit(show_error(problem, as_json=as_json))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as ending:
        if as_json and ending.code == BAD_INPUT:  # only a wrong flag or argument ends so: errors are handled above
            tell = getattr(ending.__context__, "format_message", lambda: "the command line is wrong")
            error = TuneyardError(tell(), code="usage", hint="see `tuneyard --help` and `tuneyard VERB --help`")
            print_json({"errors": [error.as_dict()]})
        raise


def wants_json(arguments: list[str]) -> bool:
    """Whether `-o json` is among the arguments, in any of its spellings."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        one in ("-ojson", "--output=json") or (one in ("-o", "--output") and two == "json") for one, two in pairs
    )
