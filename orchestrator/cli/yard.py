"""Which yard a verb speaks to."""

from __future__ import annotations

import os

from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.yard.home import connect

ENV_URL = "TUNEYARD_URL"


def client() -> Client:
    """The yard named by TUNEYARD_URL (with TUNEYARD_TOKEN), or else the one of TUNEYARD_HOME."""
    return connect(Settings(), os.environ.get(ENV_URL))
