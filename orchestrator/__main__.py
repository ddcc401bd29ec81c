"""`python -m orchestrator` is `tuneyard`."""

from orchestrator.cli import main

main()
