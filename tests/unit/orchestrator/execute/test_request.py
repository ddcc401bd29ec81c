"""The request that starts a node's ranks, and the GPUs that it may name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import yaml

from launch.attempt import AttemptFiles
from launch.contract import NodeShare, RunContract
from orchestrator.cluster.model import Gpu
from orchestrator.execute.gpus import local_gpus, short_type
from orchestrator.execute.member import LaunchRequest
from orchestrator.execute.request import build_request, launch_files
from orchestrator.job.spec import TrainingJob
from orchestrator.memory.plan import plan
from tests.builders import a_command_job, a_training_job

NODES = (
    NodeShare(node="a", address="10.0.0.1", processes=2, gpus=(1, 3), threads=4),
    NodeShare(node="b", address="10.0.0.2", processes=1, gpus=(0,), threads=8),
)


def a_contract(strategy: str = "zero2", device: str = "cuda", command: bool = False) -> RunContract:
    job = a_command_job(3) if command else a_training_job(3, strategy=strategy)
    return RunContract(
        run_id="job-1.2", job_id="job-1", attempt=2, plan=plan(job, 3, device), nodes=NODES, main_port=4567,  # type: ignore[arg-type]
        run_dir="/yard/jobs/job-1/attempt-2", output_dir="/out", checkpoint_dir="/ckpt", tracker_dir="/trackers",
        spec=job.train_spec() if isinstance(job, TrainingJob) else None,
        command=("python", "x.py") if command else None,
        working_dir="/work" if command else None, env={"MINE": "yes"}, env_from={"HF_TOKEN": "NODE_TOKEN"},
    )  # fmt: skip


@pytest.mark.parametrize("index", [0, 1])
def test_a_request_holds_all_that_a_node_needs(index: int) -> None:
    request = build_request(a_contract(), index, python="/py")
    assert request.ranks == ((0, 1), (2,))[index]
    files = AttemptFiles("/yard/jobs/job-1/attempt-2")
    assert set(request.files) == {
        str(files.contract), str(files.accelerate_config(index)), str(files.deepspeed_config),
    }  # fmt: skip
    assert request.argv[0] == "/py"
    assert str(files.accelerate_config(index)) in request.argv
    assert str(files.contract) in request.argv
    assert request.env["MINE"] == "yes"
    assert request.env_from == {"HF_TOKEN": "NODE_TOKEN"}
    assert request.cwd == "/yard/jobs/job-1/attempt-2"
    launcher = yaml.safe_load(request.files[str(files.accelerate_config(index))])
    assert (launcher["machine_rank"], launcher["num_machines"]) == (index, 2)
    # Accelerate divides by the machines: the quotient is what starts on this one.
    assert launcher["num_processes"] // 2 == (2, 1)[index]
    assert (launcher["main_process_ip"], launcher["main_process_port"]) == ("10.0.0.1", 4567)
    assert RunContract.model_validate_json(request.files[str(files.contract)]) == a_contract()


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "ddp"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_left_to_be_guessed(strategy: str, device: str) -> None:
    files = launch_files(a_contract(strategy, device), 0)
    configs = {path: text for path, text in files.items() if not path.endswith("contract.json")}
    assert any("deepspeed" in path for path in configs) == strategy.startswith("zero")
    assert not any('"auto"' in text or ": auto" in text for text in configs.values())
    for path, text in configs.items():
        loaded = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        assert None not in loaded.values(), path


def test_a_command_runs_in_its_own_directory() -> None:
    assert build_request(a_contract(command=True), 0).cwd == "/work"


def test_a_request_survives_its_file() -> None:
    request = build_request(a_contract(), 1, owner=(42, 1.5))
    assert LaunchRequest.loads(request.dumps()) == request
    assert LaunchRequest.loads(build_request(a_contract(), 1).dumps()).owner is None


class FakeNvml:
    """The part of NVML that is asked: a machine with two GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True, names: tuple[str | bytes, ...] = ()) -> None:
        self.driver = driver
        self.names = names
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=(handle + 1) << 30)


@pytest.fixture
def nvml(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml(**request.param)
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    local_gpus.cache_clear()
    yield fake
    local_gpus.cache_clear()


@pytest.mark.parametrize("nvml", [{"names": ("NVIDIA H100 80GB HBM3", b"Tesla T4")}], indirect=True)
def test_gpus_are_counted_in_order(nvml: FakeNvml) -> None:
    assert local_gpus() == (
        Gpu(index=0, type="H100", memory_bytes=1 << 30),
        Gpu(index=1, type="T4", memory_bytes=2 << 30),
    )
    assert nvml.open == 0


@pytest.mark.parametrize("nvml", [{"driver": False}, {"names": ()}], indirect=True)
def test_without_a_driver_or_a_gpu_there_are_none(nvml: FakeNvml) -> None:
    assert local_gpus() == ()
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA", "NVIDIA"),
    ],
)  # fmt: skip
def test_short_names_are_those_of_job_files(name: str, short: str) -> None:
    assert short_type(name) == short


def test_nccl_keeps_a_record_of_collectives_for_a_gang_on_gpus_alone() -> None:
    env = build_request(a_contract(), 0).env
    files = AttemptFiles("/yard/jobs/job-1/attempt-2")
    # torch adds the rank, and ".pipe" to the one that it reads.
    assert env["TORCH_FR_DUMP_TEMP_FILE"] + "2" == str(files.collectives(2))
    assert env["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "2.pipe" == str(files.ask_for_collectives(2))
    assert int(env["TORCH_FR_BUFFER_SIZE"]) > 0
    assert env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert not any(name.startswith("TORCH_") for name in build_request(a_contract(device="cpu"), 0).env)
    own = a_contract().model_copy(update={"env": {"TORCH_FR_BUFFER_SIZE": "9"}})
    assert build_request(own, 0).env["TORCH_FR_BUFFER_SIZE"] == "9", "the job's own word counts"
