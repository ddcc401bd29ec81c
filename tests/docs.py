"""Commands of the documentation, as its readers would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("tuneyard", "export", "kubectl", "make", "sbatch", "srun", "salloc", "python")


def blocks(page: str) -> list[str]:
    """The indented blocks of a page under the root that hold commands, in their order, without the indentation."""
    found = re.findall(r"(?:^ {4}\S.*\n(?:^ {4}.*\n|^\n(?= {4}))*)", (ROOT / page).read_text(), re.MULTILINE)
    texts = ("".join(line[4:] for line in block.splitlines(keepends=True)).strip() for block in found)
    return [text for text in texts if text.split()[0] in COMMANDS]


class Reader:
    """Somebody who reads a page and types what it says, on one machine or another."""

    def __init__(self, page: str, names: Mapping[str, str]) -> None:
        """`names` are what the page calls things, and what they are here."""
        self.names = dict(names)
        self.left = blocks(page)
        """What has not been typed yet."""

    def types(self, begins: str, prefix: Sequence[str] = (), cwd: Path = ROOT, **environment: str) -> str:
        """Run the next block that begins so; what it prints."""
        text = next(text for text in self.left if text.startswith(begins))
        self.left.remove(text)
        for name, here in self.names.items():
            text = text.replace(name, here)
        env = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")} | environment
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        done = subprocess.run(
            [*prefix, "bash", "-euo", "pipefail", "-c", text], cwd=cwd, env=env, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def skips(self, begins: str, why: str) -> None:
        """Not typed here."""
        assert why
        self.left.remove(next(text for text in self.left if text.startswith(begins)))
