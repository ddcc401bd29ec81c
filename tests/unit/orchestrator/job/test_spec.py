from __future__ import annotations

from typing import Any

import pytest

from orchestrator.job.spec import dump_job, parse_job
from tests.builders import a_training_job


@pytest.mark.parametrize("resources", [{}, {"accelerator": "any"}, {"accelerator": "cpu"}, {"num_processes": "1..2"}])
def test_products_of_bytes_ask_for_cpus(resources: dict[str, Any]) -> None:
    job = a_training_job(train={"max_steps": 1, "precision": "int8"}, resources=resources)
    assert job.resources.accelerator == "cpu"
    assert job.resources.num_processes == resources.get("num_processes", 1)
    assert parse_job(dump_job(job)) == job
    assert a_training_job(train={"max_steps": 1}, resources=resources).resources.accelerator in ("any", "cpu")
