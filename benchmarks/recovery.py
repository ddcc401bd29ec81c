"""A killed rank: how soon it is seen, and how soon the job trains again; against Ray Train's TorchTrainer.

    python -m benchmarks.recovery [--kills 7]

One job of two processes under DDP, with the same small BERT, batch and interval between checkpoints, alone on this
machine three times: on a Ray yard with a standby on its node, on one without, and as Ray Train runs it. Rank 1 is
killed again and again, each time once the training has saved. `seen_s` is until the first event that tells of it,
`back_s` until rank 0 of the next attempt has taken its first step; medians. Limits: seen within 2 s, back sooner than
Ray Train without standbys, and in half of its time with them. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from launch.checkpoint.manifest import CheckpointId
from launch.contract import ProgressLine
from orchestrator.client import Client
from orchestrator.execute.processes import carrying, end_all
from orchestrator.settings import Settings
from orchestrator.yard.home import connect
from tests.worlds import write_bert, write_messages
from tests.yards import Yard, a_yard, kill, until

ENV_PEER = "TUNEYARD_BENCH_PEER"
HIDDEN, ROWS, BATCH, EVERY = 256, 800, 16, 20
PATIENCE_S = 300.0
SEEN_S, SHARE_WITH_STANDBYS = 2.0, 0.5
Kills = list[dict[str, float]]


def ours(folder: Path, kills: int, standbys: int) -> Kills:
    with a_yard(standbys=str(standbys)) as yard, connect(Settings(home=yard.home)) as client:
        until(lambda: sum(node["standbys"]["count"] for node in yard.json("nodes")) >= standbys)
        job = yard.submit(
            yard.job_file(
                name="kills",
                model={"name_or_path": str(folder / "bert"), "task": "sequence-classification"},
                data={"train": str(folder / "data.tsv"), "max_length": 48},
                train={"max_steps": 10**6, "global_batch_size": 2 * BATCH, "learning_rate": 1e-5},
                strategy="ddp",
                resources={"num_processes": 2},
                checkpoint={"every_steps": EVERY},
                retry={"max_restarts": kills},
            )
        )
        found: Kills = []
        for attempt in range(1, kills + 1):

            def saved(attempt: int = attempt) -> bool:
                newest = client.job(job).checkpoint
                key = CheckpointId.parse(newest.id) if newest is not None else None
                return key is not None and key.attempt == attempt

            until(saved, PATIENCE_S)
            before, (_, pid) = client.events(job)[-1].id, yard.rank_pids(job, attempt)
            at = time.time()
            kill(pid)
            seen = until(partial(_told, client, job, before), PATIENCE_S)
            back = until(partial(_trained, yard, job, attempt + 1), PATIENCE_S)
            found.append({"seen_s": seen - at, "back_s": back - at})
            _say(f"standbys {standbys}", found[-1])
        client.cancel(job)
        yard.json("wait", job, check=False)
        return found


def _told(client: Client, job: str, before: int) -> float | None:
    return next((event.time for event in client.events(job, before) if not event.kind.startswith("checkpoint-")), None)


def _trained(yard: Yard, job: str, attempt: int) -> float | None:
    path = yard.files(job, attempt).progress(0)
    lines = path.read_text().splitlines() if path.exists() else []
    steps = (line for text in lines if (line := ProgressLine.model_validate_json(text)).loss is not None)
    return next((line.time for line in steps), None)


def ray_train(folder: Path, kills: int) -> Kills:
    options = {
        "folder": str(folder), "model": str(folder / "bert"), "data": str(folder / "data.tsv"), "batch": BATCH,
        "every": EVERY, "workers": 2,
    }  # fmt: skip
    (folder / "options.json").write_text(json.dumps(options))
    env = {**os.environ, ENV_PEER: folder.name, "HF_HUB_OFFLINE": "1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}
    with (folder / "ray-train.log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.recovery_ray", str(folder)], env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def last(rank: int) -> dict[str, Any]:
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        assert driver.poll() is None, (folder / "ray-train.log").read_text()[-4000:]
        return json.loads(lines[-1]) if lines else {"time": 0.0, "step": 0, "pid": 0}

    def both_train(step: int) -> bool:
        return bool(last(0)["step"] >= step and last(1)["pid"])

    def first_of_another(pid: int) -> float | None:
        for text in (folder / "rank-0.jsonl").read_text().splitlines():
            line = json.loads(text)
            if line["time"] > at and line["pid"] != pid:
                return float(line["time"])
        return None

    found: Kills = []
    try:
        for _ in range(kills):
            until(partial(both_train, last(0)["step"] + 2 * EVERY), PATIENCE_S)
            main, pid = last(0)["pid"], last(1)["pid"]
            at = time.time()
            kill(pid)
            back = until(partial(first_of_another, main), PATIENCE_S)
            found.append({"back_s": back - at})
            _say("Ray Train", found[-1])
        return found
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        end_all(ENV_PEER, folder.name)
        assert carrying(ENV_PEER, folder.name) == []


def _say(who: str, told: dict[str, float]) -> None:
    print(f"{who:<12} " + "  ".join(f"{key} {value:6.2f}" for key, value in told.items()), file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        write_bert(folder / "bert", hidden=HIDDEN)
        write_messages(folder / "data.tsv", ROWS)
        found = {
            "standby": ours(folder, options.kills, 1),
            "cold": ours(folder, options.kills, 0),
            "ray_train": ray_train(folder, options.kills),
        }
    figures: dict[str, Any] = {"kills": options.kills}
    for who, kills in found.items():
        for key in kills[0]:
            figures[f"{who}_{key}"] = round(statistics.median(one[key] for one in kills), 2)
            figures[f"{who}_{key}_most"] = round(max(one[key] for one in kills), 2)
    peer = figures["ray_train_back_s"]
    figures["standby_to_ray_train"] = round(figures["standby_back_s"] / peer, 3)
    figures["cold_to_ray_train"] = round(figures["cold_back_s"] / peer, 3)
    figures["within_limits"] = (
        max(figures["standby_seen_s"], figures["cold_seen_s"]) <= SEEN_S
        and figures["cold_to_ray_train"] < 1
        and figures["standby_to_ray_train"] <= SHARE_WITH_STANDBYS
    )
    print(json.dumps(figures))
    return 0 if figures["within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
