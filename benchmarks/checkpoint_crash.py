"""Checkpoints under SIGKILL and on bad storage: what the next attempt makes of what is left.

    python -m benchmarks.checkpoint_crash --kills 200 --flips 1000 [--seed 7] [--stock-kills 20] [--stock-flips 200]

--kills (benchmarks.checkpoint_kills): jobs train on 2 or 4 ranks under DDP and ZeRO-1/2/3, drawn anew for every
attempt, and save every second step. In every attempt one rank kills itself at a named point of a save, or is killed
from outside a random time after a save has begun, or while the attempt resumes. Before the next attempt the store is
looked at by other code than that which reads it. The attempt must resume from the newest checkpoint committed, and its
losses must be those of a training that nobody disturbed. A killed process loses what it has not written; what a power
failure would lose of what was written and not yet synced is not tried.

--flips (benchmarks.checkpoint_flips): one bit flipped, a file cut or missing, or files or directories in each other's
place. Two ranks resume from what is left: from the checkpoint before, with every bit as it was saved, and with a note
beside the damaged one that names the file.

Beside both, Accelerate's save_state under the same kills (benchmarks.checkpoint_stock), and torch's distributed
checkpoint and safetensors with the same faults (benchmarks.checkpoint_formats).

Progress goes to stderr, and the last line of stdout is JSON; with `-o json` it is the only one. The status is 1 if
anything was wrong. Everything is drawn by the seed, but what a kill at a random time hits is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.token_cache import ENV_CACHE


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and under `wrong` whatever was."""
    from benchmarks.checkpoint_flips import flip
    from benchmarks.checkpoint_formats import damage_formats
    from benchmarks.checkpoint_kills import Crashes
    from benchmarks.checkpoint_stock import kill_stock

    figures: dict[str, Any] = {"seed": options.seed}
    wrong: list[str] = []
    if options.kills:
        crashes = vars(Crashes(folder / "kills", options.seed, say=say).kill(options.kills))
        wrong += crashes.pop("wrong")
        figures |= crashes
    if options.stock_kills:
        figures |= vars(kill_stock(folder / "stock", options.stock_kills, options.seed, say))
    if options.flips:
        flips = vars(flip(folder / "flips", options.flips, options.seed, say=say))
        wrong += flips.pop("wrong")
        figures |= flips
    if options.stock_flips:
        for name, found in damage_formats(folder / "formats", options.stock_flips, options.seed, say).items():
            figures |= {f"{name}_{key}": value for key, value in vars(found).items()}
    return figures | {"wrong": wrong}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--stock-kills", type=int, help="by default a tenth of --kills")
    parser.add_argument("--stock-flips", type=int, help="by default a fifth of --flips")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="work here, and leave what was wrong")
    parser.add_argument("-o", choices=("text", "json"), default="text")
    options = parser.parse_args()
    if options.stock_kills is None:
        options.stock_kills = options.kills // 10
    if options.stock_flips is None:
        options.stock_flips = options.flips // 5
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = options.folder or Path(name)
        os.environ[ENV_CACHE] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        figures = measure(folder, options)
    if options.o == "text":
        for key, value in figures.items():
            print(f"{key:36} {value}", file=stdout)
    print(json.dumps(figures), file=stdout, flush=True)
    sys.exit(1 if figures["wrong"] else 0)


if __name__ == "__main__":
    main()
