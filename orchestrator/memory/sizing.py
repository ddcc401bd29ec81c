"""What is known of a job's memory before it runs, as it is stored with the job. Pure."""

from __future__ import annotations

from launch.config import TrainSpec
from launch.contract import Device, Record
from launch.footprint_record import Footprint
from launch.shape import ModelShape
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.analytic import footprint
from orchestrator.memory.speed import Work, work_of


class Sizing(Record):
    """A job's model as planning sees it: made where the model's files are, by whoever submits the job."""

    family: str
    """The model's architecture, as its configuration names it, and whether a part of its vocabulary alone is trained,
    which is reckoned as if all were: margins are learned by it."""
    work: Work
    cpu: Footprint
    cuda: Footprint

    def on(self, device: Device) -> Footprint:
        return self.cuda if device == "cuda" else self.cpu

    def traced(self, found: Footprint, device: Device) -> Sizing:
        """This, with what was traced instead of worked out."""
        return self.model_copy(update={device: found})


def sizing_of(job: TrainingJob, shape: ModelShape) -> Sizing:
    """By formulas, in milliseconds."""
    spec: TrainSpec = job
    on_cpu = footprint(shape, spec, "cpu")
    family = shape.model_type if spec.model.vocabulary == "whole" else f"{shape.model_type}, used vocabulary"
    return Sizing(family=family, work=work_of(shape, spec, on_cpu), cpu=on_cpu, cuda=footprint(shape, spec, "cuda"))
