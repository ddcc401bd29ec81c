"""Programs of `launch` that print one JSON object, run in this process: each of its own imports torch for seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def told_by(module: str, words: Sequence[str], status: int = 0, *, alone: bool = False) -> dict[str, Any]:
    """What `python -m MODULE WORDS` prints last, when it ends with `status`; `alone` in a process of its own."""
    if alone:
        done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        printed = done.stdout
    else:
        out, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out):
            try:
                importlib.import_module(module).main(words)
            except SystemExit as ended:
                code = int(ended.code or 0)
        assert code == status, out.getvalue()
        printed = out.getvalue()
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found
