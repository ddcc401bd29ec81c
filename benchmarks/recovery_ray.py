"""`python -m benchmarks.recovery_ray FOLDER`: the peer of benchmarks.recovery, Ray Train's TorchTrainer with DDP.

FOLDER has the model, the data and `options.json`; each rank appends to `rank-R.jsonl` there when it has taken a step.
It trains until it is ended. A killed worker is a failure, of which any number are allowed.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(options: dict[str, Any]) -> None:
    """On each worker: as a user of Ray Train writes it."""
    import torch
    from ray import train
    from ray.train.torch import prepare_data_loader, prepare_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, batch, every = Path(options["folder"]), options["batch"], options["every"]
    rank = train.get_context().get_world_rank()
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model: Any = AutoModelForSequenceClassification.from_pretrained(options["model"], num_labels=2)
    with Path(options["data"]).open() as stream:
        lines = csv.DictReader(stream, delimiter="\t", quoting=3)
        rows: Any = [(row["text"], int(row["label"] == "spam")) for row in lines]

    def collate(chosen: list[tuple[str, int]]) -> dict[str, Any]:
        texts = [text for text, _ in chosen]
        encoded = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([label for _, label in chosen])}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = 0
    found = train.get_checkpoint()
    if found is not None:
        with found.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model = prepare_model(model)
    loader = prepare_data_loader(DataLoader(rows, batch_size=batch, shuffle=True, collate_fn=collate))
    with (folder / f"rank-{rank}.jsonl").open("a", buffering=1) as log:
        while True:
            for inputs in loader:
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
                step += 1
                log.write(json.dumps({"time": time.time(), "step": step, "pid": os.getpid()}) + "\n")
                if step % every == 0:
                    with tempfile.TemporaryDirectory() as saved:
                        if rank == 0:
                            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                            torch.save({**state, "step": step}, Path(saved) / "state.pt")
                        checkpoint = train.Checkpoint.from_directory(saved) if rank == 0 else None
                        train.report({"step": step}, checkpoint=checkpoint)


def main() -> None:
    folder = Path(sys.argv[1])
    options = json.loads((folder / "options.json").read_text())
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=options["workers"], include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=options["workers"]),
        run_config=RunConfig(
            storage_path=str(folder / "results"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()
