"""Every layout loads every other's checkpoints: bitwise what was saved, and a real forward pass agrees.

`pytest -m reshard` runs every ordered pair of eleven layouts; the suite runs a part of them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.config import TrainSpec
from launch.engine_config import PERSISTENT_ELEMENTS
from tests.reshard import ENV_TASK, STEPS
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

LAYOUTS = {
    "single": ("single", 1, "none"),
    **{f"{engine}-{size}": (engine, size, "none") for size in (2, 4) for engine in ("ddp", "zero1", "zero2", "zero3")},
    "zero2-2-offload": ("zero2", 2, "optimizer"),
    "zero3-2-offload": ("zero3", 2, "all"),
}
QUARTER = (["single", "ddp-4", "zero1-2", "zero2-4", "zero3-2"], ["single", "ddp-2", "zero2-2-offload", "zero3-4"])
EVERYTHING = (list(LAYOUTS), list(LAYOUTS))


@dataclass
class Yard:
    spec: TrainSpec
    root: Path

    def run(self, layout: str, folder: str, **task: Any) -> list[dict[str, Any]]:
        """One world; what each rank found."""
        engine, size, offload = LAYOUTS[layout]
        plan = a_plan(self.spec, engine, size, 4, offload=offload)
        contract = a_contract(self.root / folder / layout, plan, self.spec)
        launched = start(contract, {ENV_TASK: json.dumps({"root": str(self.root), **task})}, module="tests.reshard")
        launched.wait(240)
        results = [launched.files.rank(rank) / "result.json" for rank in range(size)]
        assert all(path.exists() for path in results), launched.logs()
        return [json.loads(path.read_text()) for path in results]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    root = tmp_path_factory.mktemp("reshard")
    write_bert(root / "bert", hidden=96)
    write_messages(root / "messages.tsv", rows=147)
    spec = a_spec(
        root / "bert", root / "messages.tsv", data={"split": None}, train={"max_steps": 40, "max_grad_norm": 0.5}
    )
    return Yard(spec, root)


SLOW = [pytest.mark.reshard, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("savers", "loaders"),
    [
        pytest.param(*QUARTER, id="quarter", marks=pytest.mark.timeout(600)),
        pytest.param(*EVERYTHING, id="everything", marks=SLOW),
    ],
)
def test_any_layout_loads_any_other(yard: Yard, savers: list[str], loaders: list[str]) -> None:
    saved = {}
    for layout in savers:
        ranks = yard.run(layout, "save", save=layout)
        saved[layout] = ranks[0]["next"]
        assert all(rank["next"] == ranks[0]["next"] for rank in ranks)
    if "zero3-2" in savers:
        sizes = yard.run("single", "sizes", save="sizes")[0]["sizes"]
        assert min(sizes) < PERSISTENT_ELEMENTS < max(sizes), "both kinds of ZeRO-3's parameters"
    for layout in loaders:
        ranks = yard.run(layout, "load", load=savers)
        for saver, (number, rank) in itertools.product(savers, enumerate(ranks)):
            found, pair = rank[saver], f"{saver} -> {layout}, rank {number}"
            assert found["step"] == STEPS, pair
            assert found["tensors"] > 50, pair
            assert found["differing"] == [], pair
            assert found["next"] == pytest.approx(saved[saver], abs=1e-6), pair


@pytest.mark.parametrize("layout", ["single", "ddp-2", "zero2-2", "zero3-2"])
def test_any_step_is_as_good_as_any_other(yard: Yard, layout: str) -> None:
    """With dropout, in mid-epoch and across an epoch's end: bitwise what it would have been without the stop."""
    dropping = yard.spec.model.model_copy(update={"dropout": 0.2})
    spec = yard.spec.model_copy(update={"model": dropping})
    ranks = Yard(spec, yard.root).run(layout, "any", root=str(yard.root / layout), any_step=14)
    for rank in ranks:
        assert rank["differing"] == []
        assert len(rank["losses"]) == 14
