"""`tuneyard schema`."""

from __future__ import annotations

import json
import sys

from orchestrator.job.spec import job_schema


def schema() -> None:
    """Print the JSON Schema of a job file; editors complete and check from it.

    For example: tuneyard schema > tuneyard.schema.json, and as the first line of a job file:
    # yaml-language-server: $schema=tuneyard.schema.json
    """
    sys.stdout.write(json.dumps(job_schema(), indent=2) + "\n")
